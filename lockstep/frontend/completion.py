"""One completion as it grows: its tokens, text and log-probabilities, and whether a stop string ended it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lockstep.frontend.detokenizer import Detokenizer, StopChecker
from lockstep.frontend.outputs import CompletionOutput, position
from lockstep.protocol import EngineOutput, RequestOutputKind, SamplingParams


class Completion:
    """Takes the engine's outputs of one request; `output` is all there is so far."""

    def __init__(self, index: int, sampling: SamplingParams, detokenizer: Detokenizer | None, text_of: Callable[[int], str | None]) -> None:
        self.output = CompletionOutput(index)
        self._sampling, self._detokenizer, self._text_of = sampling, detokenizer, text_of
        self._stop = StopChecker(list(sampling.stop or ()), include=sampling.include_stop_str_in_output)
        # Text that nobody reads before the end is decoded once, at the end.
        self._late = sampling.output_kind == RequestOutputKind.FINAL_ONLY and not sampling.stop
        self._undecoded: list[int] = []
        self._given_text, self._given_tokens, self._given_end = 0, 0, False
        if sampling.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def take(self, news: EngineOutput) -> bool:
        """Add what one step brought. True when a stop string ended it here, while the engine still runs it."""
        out, last = self.output, len(news.new_token_ids) - 1
        stop_token = news.finish_reason == "stop" and not self._sampling.include_stop_str_in_output
        for i, token in enumerate(news.new_token_ids):
            out.token_ids.append(token)
            if news.logprobs is not None and out.logprobs is not None:
                out.logprobs.append(position(news.logprobs[i], self._text_of))
                out.cumulative_logprob = (out.cumulative_logprob or 0.0) + news.logprobs[i].logprobs[0]
            if not (stop_token and i == last):
                self._read(token)
            if self._stop.matched is not None:
                out.finish_reason, out.stop_reason = "stop", self._stop.matched
                return news.finish_reason is None
        if news.finish_reason is not None:
            self._end(news)
        return False

    def delta(self) -> CompletionOutput | None:
        """What came since the last call, None when nothing did. The end is told once."""
        out = self.output
        text, tokens = out.text[self._given_text :], out.token_ids[self._given_tokens :]
        if not text and not tokens and (self._given_end or not out.finished):
            return None
        logprobs = out.logprobs[self._given_tokens :] if out.logprobs is not None else None
        self._given_text, self._given_tokens, self._given_end = len(out.text), len(out.token_ids), out.finished
        return CompletionOutput(out.index, text, tokens, out.cumulative_logprob, logprobs, out.finish_reason, out.stop_reason)

    def snapshot(self) -> CompletionOutput:
        """All there is so far, as its own object."""
        out = self.output
        return replace(out, token_ids=list(out.token_ids), logprobs=None if out.logprobs is None else list(out.logprobs))

    def _read(self, token: int) -> None:
        if self._detokenizer is None:
            return
        if self._late:
            self._undecoded.append(token)
            return
        may_stop = len(self.output.token_ids) > self._sampling.min_tokens
        self.output.text += self._stop.feed(self._detokenizer.extend([token]), may_stop=may_stop)

    def _end(self, news: EngineOutput) -> None:
        out = self.output
        if self._detokenizer is not None:
            rest = self._detokenizer.extend(self._undecoded) + self._detokenizer.finish()
            out.text += self._stop.feed(rest, may_stop=len(out.token_ids) > self._sampling.min_tokens) + self._stop.finish()
        if self._stop.matched is not None:
            out.finish_reason, out.stop_reason = "stop", self._stop.matched
        else:
            out.finish_reason, out.stop_reason = news.finish_reason, news.stop_reason
