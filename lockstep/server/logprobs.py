"""Log-probabilities as the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lockstep.frontend.outputs import Logprob, Position
from lockstep.server.schemas.wire import ChatLogprobs, CompletionLogprobs, TokenBytes, TokenLogprob
from lockstep.server.text_offsets import TextOffsets, prompt_offsets

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say
UNKNOWN = "\ufffd"


class LogprobWriter:
    """Writes positions in both forms. One per request."""

    def __init__(self, tokenizer: Any, *, as_ids: bool = False) -> None:
        """as_ids: tokens are named "token_id:123" instead of by their text."""
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def completion(self, positions: Sequence[Position], offsets: TextOffsets) -> CompletionLogprobs:
        """The older form. offsets: where the choice's next tokens begin."""
        out = CompletionLogprobs([], [], [], [])
        for position in positions:
            token, chosen = next(iter(position.items()))
            offset = offsets.next(token, chosen.decoded_token or "")
            self._add(out, offset, self._text(token, chosen), chosen.logprob, self._top(position))
        return out

    def prompt(self, ids: Sequence[int], positions: Sequence[Position | None], text: str) -> CompletionLogprobs:
        """The older form of an echoed prompt; nothing is known of its first token but its text."""
        offsets = prompt_offsets(self._tokenizer, ids, text)
        first = self._tokenizer.decode([ids[0]], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        begin = offsets.next(ids[0], first)
        out = CompletionLogprobs([begin], [None], [f"token_id:{ids[0]}" if self._as_ids else first], [None])
        rest = self.completion([p for p in positions if p is not None], offsets)
        return joined(out, rest)

    def chat(self, positions: Sequence[Position], top: int) -> ChatLogprobs:
        """The newer form, with the `top` likeliest at each position."""
        return ChatLogprobs([self._entry(position, top) for position in positions])

    def _entry(self, position: Position, top: int) -> TokenLogprob:
        token, chosen = next(iter(position.items()))
        best = sorted((item for item in position.items() if item[1].rank <= top), key=lambda item: item[1].rank)
        return TokenLogprob(
            self._text(token, chosen), least(chosen.logprob), self._bytes(token, chosen), [TokenBytes(*self._named(t, p)) for t, p in best]
        )

    def _named(self, token: int, one: Logprob) -> tuple[str, float, list[int]]:
        return self._text(token, one), least(one.logprob), self._bytes(token, one)

    def _top(self, position: Position) -> dict[str, float]:
        """Text -> log-probability; of tokens that look the same, the likeliest."""
        found: dict[str, float] = {}
        for token, one in position.items():
            text = self._text(token, one)
            found[text] = max(found.get(text, LEAST), least(one.logprob))
        return found

    @staticmethod
    def _add(out: CompletionLogprobs, offset: int, text: str, logprob: float, top: dict[str, float]) -> None:
        out.text_offset.append(offset)
        out.tokens.append(text)
        out.token_logprobs.append(least(logprob))
        out.top_logprobs.append(top)

    def _text(self, token: int, one: Logprob) -> str:
        return f"token_id:{token}" if self._as_ids else one.decoded_token or ""

    def _bytes(self, token: int, one: Logprob) -> list[int]:
        return list(token_bytes(self._tokenizer, token, one.decoded_token or ""))


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """One after the other."""
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def least(logprob: float) -> float:
    return max(logprob, LEAST)


def prompt_positions(positions: Sequence[Position | None] | None) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` of a response: by token id, null for the first position."""
    shown: list[dict[str, Any] | None] = []
    for position in positions or ():
        entries = None
        if position is not None:
            entries = {str(t): {"logprob": least(p.logprob), "rank": p.rank, "decoded_token": p.decoded_token} for t, p in position.items()}
        shown.append(entries)
    return shown


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """The bytes that a token stands for, also where they are a part of a character (then its text is U+FFFD)."""
    if UNKNOWN not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    table = byte_letters()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else text.encode()


@cache
def byte_letters() -> dict[str, int]:
    """Letter -> byte, as byte-level vocabularies spell bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
