"""A model's vocabulary as llguidance wants it: the bytes of every token, in a trie."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.grammar.bounds import GrammarError
from lockstep.grammar.compiled import guarded

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_PLAIN = (re.compile(r'"truncation"\s*:\s*null'), re.compile(r'"padding"\s*:\s*null'))


def load_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The vocabulary of the tokenizer in `folder`, for logits of `vocab_size`. Seconds where it is large: call it once.

    Raises GrammarError when it cannot be read, or has no tokens that a text could be made of.
    """
    from llguidance import LLTokenizer

    form = _definition(folder)
    eos = [token for token in eos_token_ids if token < vocab_size] or None
    with guarded():
        try:
            return LLTokenizer(form, n_vocab=vocab_size, eos_token=eos)
        except ValueError:  # the tokenizer has more tokens than the model has logits: those are never sampled
            return LLTokenizer(form, eos_token=eos)


def _definition(folder: Path) -> str:
    """The tokenizer.json of a folder, made from older forms where there is none. Without truncation and padding."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if all(sign.search(text, 0, 2000) for sign in _PLAIN):  # as nearly always: megabytes need not be parsed here
                return text
            return json.dumps(json.loads(text) | {"truncation": None, "padding": None})
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return str(backend.to_str())
    except Exception as e:
        raise GrammarError(f"the tokenizer in {folder.name} cannot be used for structured outputs ({type(e).__name__}: {e}).") from None
