"""Structured outputs where tokens are sampled: which may come next in each request, and when its text is complete.

Only the output rank has these; the others are told the tokens. A request's matcher is made from its parameters, and catches up with
the outputs that the request has: none at first, all of them after a preemption or when it was another replica's before.

    slot taken     -> the matcher is made, on a thread: it compiles while the prompt is computed
    before a token -> it catches up; what it does not allow is banned
    after a token  -> it takes the token; the request ends here where no more may follow

Nothing that goes wrong here is anybody's but the one request's: its row is reported as ended, with the reason.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from lockstep.grammar.bounds import GrammarError
from lockstep.grammar.compiled import grammar_of, guarded, new_matcher, reason
from lockstep.protocol import StepPlan, StructuredOutputs
from lockstep.worker.batch import I32, I64, AlteredRow, Flags

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_S = 60.0  # for a vocabulary and a grammar; both are bounded, and take a second at most
KEPT = 32  # compiled grammars
NO_TOKEN = "no token can be chosen: allowed_token_ids, bad_words or logit_bias ban all that its grammar allows."


def no_vocabulary() -> LLTokenizer:
    """Where there is no tokenizer, no text can be held to anything."""
    raise GrammarError("there is no tokenizer here.")


class Grammars:
    """The matchers of the requests that have one, by slot."""

    def __init__(self, load_vocabulary: Callable[[], LLTokenizer]) -> None:
        """load_vocabulary: called once, on a thread, for the first request that needs it. May raise GrammarError."""
        self._load = load_vocabulary
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, Future[LLMatcher]] = OrderedDict()  # at the start of a text, the latest used last
        self._followers: dict[int, _Follower] = {}

    def apply(self, plan: StepPlan) -> None:
        """Take in who leaves and who comes."""
        for slot in plan.freed:
            self._followers.pop(slot, None)
        for new in plan.new:
            if new.sampling.structured_outputs is not None:
                self._followers[new.slot] = _Follower(self._compile(new.sampling.structured_outputs))

    def restrict(self, line: torch.Tensor, row: AlteredRow) -> None:
        """Ban in `line [vocab]` what the row's grammar does not allow next. Does nothing for a row without one, or past its end."""
        follower = self._followers.get(row.slot)
        if follower is None or follower.over:
            return
        try:
            allowed = follower.allowed(row.tokens[row.num_prompt_tokens :], len(line))
        except GrammarError as e:
            follower.fail(str(e))
            return
        line.masked_fill_(torch.from_numpy(~allowed).to(line.device), float("-inf"))

    def advance(self, altered: list[AlteredRow], tokens: I64) -> list[tuple[int, str | None]]:
        """Tell the rows' matchers what was sampled, `tokens [rows]`. Returns (row, why) of those that end: None, or an error."""
        ended = []
        for row in altered:
            follower = self._followers.get(row.slot)
            if follower is None:
                continue
            if not follower.over:
                follower.take(int(tokens[row.row]))
            if follower.over:
                ended.append((row.row, follower.error))
        return ended

    def _compile(self, wanted: StructuredOutputs) -> Future[LLMatcher]:
        key = msgspec.msgpack.encode(wanted)
        found = self._compiled.pop(key, None)
        self._compiled[key] = found = found or self._thread.submit(self._make, wanted)
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return found

    def _make(self, wanted: StructuredOutputs) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._load()
        return new_matcher(self._vocabulary, grammar_of(wanted))


@dataclass
class _Follower:
    """One request's matcher, and how many of its outputs it has seen."""

    compiled: Future[LLMatcher]
    matcher: LLMatcher | None = None
    seen: int = 0
    over: bool = False
    error: str | None = None  # why it is over; None: it is complete

    def allowed(self, outputs: I32, vocab_size: int) -> Flags:
        """Which of the vocabulary may follow `outputs`. Raises GrammarError."""
        matcher = self._ready()
        with guarded():
            if len(outputs) > self.seen:
                missed = outputs[self.seen :].tolist()
                if not matcher.consume_tokens(missed):
                    raise GrammarError(f"the outputs so far do not match its grammar: {reason(matcher.get_error())}")
                self.seen += len(missed)
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise GrammarError(reason(matcher.get_error()))
        return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        """The next output."""
        matcher = self._ready()
        if matcher.is_stopped():  # it allowed no more before: whatever was sampled
            self.over = True
            return
        try:
            with guarded():
                if token < 0 or not matcher.validate_tokens([token]):
                    raise GrammarError(NO_TOKEN)
                matcher.consume_token(token)
                self.seen += 1
        except GrammarError as e:
            self.fail(str(e))
            return
        if matcher.is_error():
            self.fail(reason(matcher.get_error()))
        elif matcher.is_stopped():
            self.over = True

    def fail(self, why: str) -> None:
        self.over, self.error = True, f"structured_outputs: {why}"

    def _ready(self) -> LLMatcher:
        """Its own matcher, once compiled. Raises GrammarError."""
        if self.matcher is None:
            try:
                with guarded():
                    self.matcher = self.compiled.result(COMPILE_S).deep_copy()
            except ImportError as e:
                raise GrammarError(f"llguidance cannot be imported here ({e}): install lockstep with it.") from None
        return self.matcher
