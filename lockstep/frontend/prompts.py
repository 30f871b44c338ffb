"""The forms a prompt may have, and what can be said against one before a model is loaded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lockstep.engine.errors import RequestError
from lockstep.frontend.errors import PromptError
from lockstep.frontend.tokenizer import check_readable, encode

Prompt = str | Sequence[int] | Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


def parse(prompt: Prompt) -> tuple[str | None, list[int] | None, str | None]:
    """(text, token ids, cache salt) of a prompt in any of its forms; ids None: the text is still to be encoded.

    Raises PromptError for what is none of them.
    """
    salt = None
    if isinstance(prompt, Mapping):
        unknown = [k for k in prompt if k not in PROMPT_KEYS]
        if unknown or not ("prompt" in prompt or "prompt_token_ids" in prompt):
            raise PromptError(
                f"prompt has the keys {list(prompt)}: give `prompt` (text) or `prompt_token_ids`, and optionally `cache_salt`."
            )
        salt = prompt.get("cache_salt")
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), _ids(prompt["prompt_token_ids"]), salt
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return prompt, None, salt
    if isinstance(prompt, bytes):
        raise PromptError("prompt is bytes: decode it to text, or give a list of token ids.")
    return None, _ids(prompt), salt


def _ids(prompt: Any) -> list[int]:
    """Token ids as plain integers, from a list, an array or a tensor. Raises PromptError for anything else."""
    try:
        return [operator.index(t) for t in prompt]
    except TypeError:
        kind = type(prompt).__name__
        raise PromptError(f"prompt is a {kind} that is not a list of integers: give text, token ids, or a dict with one of them.") from None


@contextmanager
def named(index: int, of: int) -> Iterator[None]:
    """Refusals inside say which of the user's prompts they are about, when there are several."""
    try:
        yield
    except (PromptError, RequestError) as e:
        raise type(e)(f"prompts[{index}]: {e}" if of > 1 else str(e)) from None


def check_early(prompts: Sequence[Prompt], load_tokenizer: Callable[[], Any]) -> None:
    """Raise PromptError for the first prompt that is refused whatever the model: no prompt, no characters, or no token.

    Empty text is one token where the tokenizer adds a beginning, so the tokenizer is loaded for it, and for nothing else.
    """
    for index, prompt in enumerate(prompts):
        with named(index, len(prompts)):
            text, ids, _ = parse(prompt)
            if ids is None and text:
                check_readable(text, "prompt")
            elif not (ids or (ids is None and encode(load_tokenizer(), "", "prompt"))):
                raise PromptError("an empty prompt (0 tokens) cannot run: a prompt needs at least 1 token.")
