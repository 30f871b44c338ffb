"""What a prompt may be where text and token ids, one of them or several, are taken."""

from __future__ import annotations

from typing import Any

from lockstep.server.schemas.common import MAX_IDS

KINDS = "text, a list of texts, a list of token ids, or a list of lists of token ids"


def one_kind(value: Any, most: int) -> Any:
    """The same value, where it is of one kind and of at most so many prompts.

    Raises ValueError, which says in one sentence what a prompt may be, rather than what is wrong with each kind.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"it must be {KINDS}, and not empty: from 1 to {most} prompts.")
    kinds = set(map(type, value))
    if kinds == {int}:
        if len(value) > MAX_IDS:
            raise ValueError(f"it has {len(value)} token ids, more than {MAX_IDS}, which no context holds: shorten it.")
        return value
    if len(value) > most:
        raise ValueError(f"it has {len(value)} prompts: at most {most} are taken in one request.")
    if kinds == {str}:
        return value
    if kinds == {list} and all(set(map(type, one)) <= {int} for one in value):
        if [] in value:
            raise ValueError(f"it has an empty prompt, number {value.index([])} from 0 on: give each at least one token.")
        return value
    raise ValueError(f"it must be {KINDS}, and nothing mixed.")
