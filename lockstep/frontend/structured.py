"""Structured outputs at the door: a constraint that cannot be kept is refused before anything is queued."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import msgspec

from lockstep.frontend.errors import PromptError
from lockstep.grammar.bounds import GrammarError
from lockstep.grammar.compiled import check
from lockstep.protocol import StructuredOutputs

REMEMBERED = 256  # verdicts


class StructuredChecker:
    """Says whether a constraint compiles, and remembers it. For any number of threads; one compiles at a time, on one core."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # constraint -> what is wrong with it, "" for nothing
        self._compiling, self._lock = threading.Lock(), threading.Lock()

    def knows(self, wanted: StructuredOutputs) -> bool:
        """Whether `check` answers at once."""
        return self._known(_name(wanted)) is not None

    def check(self, wanted: StructuredOutputs) -> None:
        """Raise PromptError, with the reason, when outputs cannot be held to it. The first time it takes milliseconds, or a second."""
        name = _name(wanted)
        verdict = self._known(name)
        if verdict is None:
            with self._compiling:
                verdict = self._known(name)
                if verdict is None:
                    verdict = _verdict(wanted)
                    self._remember(name, verdict)
        if verdict:
            raise PromptError(verdict)

    def _known(self, name: bytes) -> str | None:
        with self._lock:
            if name in self._verdicts:
                self._verdicts.move_to_end(name)
            return self._verdicts.get(name)

    def _remember(self, name: bytes, verdict: str) -> None:
        with self._lock:
            self._verdicts[name] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)


def _verdict(wanted: StructuredOutputs) -> str:
    try:
        check(wanted)
    except GrammarError as e:
        if str(e).startswith("structured_outputs."):
            return str(e)
        if wanted.grammar is not None:
            return f"structured_outputs.grammar cannot be kept to (it is read in Lark's syntax, from the rule `start` on): {e}"
        return f"structured_outputs cannot be kept to: {e}"
    except ImportError as e:
        return f"structured_outputs needs llguidance, which cannot be imported ({e}): pip install llguidance."
    return ""


def _name(wanted: StructuredOutputs) -> bytes:
    """What tells constraints apart. Raises PromptError for one that is no plain data."""
    try:
        return hashlib.blake2b(msgspec.msgpack.encode(wanted), digest_size=16).digest()
    except (TypeError, ValueError, OverflowError, RecursionError) as e:
        raise PromptError(f"structured_outputs is no plain data: {e}.") from None
