"""Where tokens begin in the text that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.frontend.detokenizer import UNKNOWN, Detokenizer
from lockstep.frontend.tokenizer import decoder_of, special_ids

MOST_ADDED = 3  # special tokens that a tokenizer puts before a text, or behind it


class TextOffsets:
    """The offsets of one growing text, in characters. They never decrease, and a token's is known as soon as the token is.

    A token that is a part of a character has the offset of that character. What is held back from a stream counts, and so
    does what a stop string cuts off: whether text is told yet changes no offset.
    """

    def __init__(
        self, tokenizer: Any, *, begin: int = 0, end: int | None = None, context: Sequence[int] = (), special: bool = False, added: int = 0
    ) -> None:
        """begin: of the first token. end: no offset is beyond. context: the tokens before. special: those have text too, but for so
        many `added` before the first that has some."""
        skip = frozenset[int]() if special else special_ids(tokenizer)
        self._text = Detokenizer(decoder_of(tokenizer, skip_special_tokens=not special), context=context[-64:], skip=skip)
        self._certain, self._end, self._added = begin, end, added

    def next(self, token: int, alone: str) -> int:
        """The offset of the next token. alone: its own text, which has U+FFFD where it is no whole characters."""
        if self._added:
            self._added -= 1
            return self._certain
        more, offset = self._text.extend([token]), self._certain
        self._certain += len(more)
        before = more.removesuffix(alone) if alone else more
        if len(before) < len(more) and set(before) == {UNKNOWN} and UNKNOWN not in alone:
            offset += len(before)  # bytes that were no character after all
        return offset if self._end is None else min(offset, self._end)


def prompt_offsets(tokenizer: Any, ids: Sequence[int], text: str) -> TextOffsets:
    """Of a prompt's tokens in its text. Those that its tokenizer adds before and behind it have no text there; special tokens that
    stand in it have theirs."""
    decode, special = decoder_of(tokenizer, skip_special_tokens=False), special_ids(tokenizer)
    before = next((i for i, token in enumerate(ids[:MOST_ADDED]) if token not in special), min(len(ids), MOST_ADDED))
    behind = next((i for i, token in enumerate(reversed(ids[-MOST_ADDED:])) if token not in special), min(len(ids), MOST_ADDED))
    for first in range(before + 1):
        for last in range(behind + 1):
            if decode(ids[first : len(ids) - last]) == text:
                return TextOffsets(tokenizer, end=len(text), special=True, added=first)
    return TextOffsets(tokenizer, end=len(text))
