"""Loading a checkpoint's tokenizer, without torch and without running any of the checkpoint's code."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.frontend.errors import PromptError


def load_tokenizer(folder: str | Path) -> Any:
    """The `transformers` tokenizer of a checkpoint folder.

    A folder with tokenizer.json is read by the class that takes that file as it is: it is four times faster to import
    than the automatic choice, which imports torch. Older folders (sentencepiece only) go through the automatic choice.
    Raises ConfigError when the folder has no tokenizer, or a broken one.
    """
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as e:  # whatever the library raises, the user's question is which file is at fault
        raise ConfigError(
            f"the tokenizer in {folder} cannot be loaded ({type(e).__name__}: {e}): "
            "download the checkpoint's tokenizer files again, or name another with tokenizer=..."
        ) from e


def load_in_background(load: Callable[[], Any], after: str = "") -> Future[Any]:
    """Run `load` in a daemon thread: ranks start meanwhile. `.result()` gives its value or raises what it raised.

    after: a module that this process imports too. Two imports at a time take turns, but weights are read and packed beside one:
    so `load` waits for that module.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            if after:
                importlib.import_module(after)
            future.set_result(load())
        except BaseException as e:
            future.set_exception(e)

    Thread(target=run, name="load-tokenizer", daemon=True).start()
    return future


def encode(tokenizer: Any, text: str, what: str, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text. Raises PromptError, naming it by `what`, for one that UTF-8 cannot hold."""
    check_readable(text, what)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def check_readable(text: str, what: str) -> None:
    """Raise PromptError for text with half of a surrogate pair in it: it stands for no character, so no token spells it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise PromptError(
            f"{what} has the lone surrogate {text[e.start]!r} at position {e.start}, which is no character: "
            "read the text with the encoding it was written in, or decode it with errors='replace'."
        ) from None


def decoder_of(tokenizer: Any, skip_special_tokens: bool = True) -> Callable[[Sequence[int]], str]:
    """ids -> text exactly as stored, with no clean-up of spaces (which would make the text of a prefix differ)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: str(backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=4)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that decoding skips when special tokens are skipped. Kept: thousands of added tokens take tens of milliseconds."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return frozenset(i for i, token in added.items() if getattr(token, "special", False)) | frozenset(tokenizer.all_special_ids)


def eos_ids(tokenizer: Any, folder: Path, of_model: Sequence[int]) -> list[int]:
    """Every id that ends a completion: of config.json, of generation_config.json and the tokenizer's own."""
    found = set(of_model)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    path = folder / "generation_config.json"
    if path.is_file():
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(int(i) for i in (value if isinstance(value, list) else [] if value is None else [value]))
    return sorted(found)
