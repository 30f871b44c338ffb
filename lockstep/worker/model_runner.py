"""One step on one rank: from a plan to tokens. Every rank runs the same lines in the same order.

    apply the plan -> inputs -> forward -> logits of the sampled rows -> sample -> broadcast -> append

Only the output rank (TP rank 0 of the last pipeline stage) holds logits and samples; the tokens are broadcast, so that
every rank's state goes on by itself and the next plan may be made before this step's result is known. Where all rows just take
the most likely token, nobody holds logits: each rank of the stage finds it from one pair per row and rank. In a pipeline tokens
go to the first stage alone, which waits for them when a step needs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from lockstep.attention.batch import AttentionBatch
from lockstep.config.model_spec import ModelSpec
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.handles import Handle
from lockstep.models.decoder import DecoderModel
from lockstep.observability.timeline import Timeline
from lockstep.protocol import StepPlan, StepResult, TokenLogprobs
from lockstep.worker import hop
from lockstep.worker.batch import I64, BatchState, SampleRows
from lockstep.worker.grammars import Grammars, no_vocabulary
from lockstep.worker.inputs import StepInputs, build_inputs, rehearsal_inputs
from lockstep.worker.logprobs import chunk_rows, token_logprobs
from lockstep.worker.pooling import Pooler
from lockstep.worker.recorder import Recorder
from lockstep.worker.returns import Returns
from lockstep.worker.sampler import Sampled, Sampler, argmax
from lockstep.worker.tracing import add_operations

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from lockstep.distributed.progress import ProgressCell
    from lockstep.worker.meter import Meter

# Spans in which a stage idles.
RECEIVE, SEND, RETURN = "wait for the stage before", "wait for the next stage", "wait for the last stage"
PromptLogprobs = list[tuple[int, list[TokenLogprobs]]]
_NOTHING = nullcontext()


class ModelRunner:
    """Runs steps of `model` (KV cache bound) and keeps the batch state. `progress` is told each step's number and kind."""

    def __init__(
        self,
        model: DecoderModel,
        spec: ModelSpec,
        groups: ParallelGroups,
        *,
        state: BatchState,
        device: torch.device,
        progress: ProgressCell | None = None,
        timeline: Timeline | None = None,
        vocabulary: Callable[[], LLTokenizer] = no_vocabulary,
        meter: Meter | None = None,
    ) -> None:
        """vocabulary: loads what structured outputs need, when the first is asked for."""
        self.model, self.spec, self.groups = model, spec, groups
        self.state, self.device, self.progress = state, device, progress
        self.timeline, self.meter = timeline or Timeline(), meter
        self.grammars = Grammars(vocabulary) if self.is_output_rank else None
        self.pooler = Pooler()
        self.sampler = Sampler(self.grammars)
        self.sending: list[Handle] = []  # what the next stage has not taken yet
        self.returns = Returns(groups, state) if groups.pp.world_size > 1 else None
        self.recorder: Recorder | None = None

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank samples and reports."""
        return bool(self.groups.tp.rank_in_group == 0 and self.groups.pp.is_last_rank)

    def rest(self) -> None:
        """Let go of the model. Slots keep their numbers: plans to come know them."""
        del self.model

    def rise(self, model: DecoderModel) -> None:
        """Go on with a model that is the same, loaded again."""
        self.model = model

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step. Returns its result on the output rank, None on the others."""
        began = time.perf_counter()
        self.state.apply(plan)
        self.pooler.apply(plan)
        if self.grammars is not None:
            self.grammars.apply(plan)
        self.timeline.lap("apply")
        if not plan.slots:  # a plan that only gives slots back
            return StepResult(step=plan.step, tokens=[]) if self.is_output_rank else None
        self._mark(plan)
        if self.returns is not None and self.groups.pp.is_first_rank:
            with self.timeline.span(RETURN, "idle"), self._stage(whole=True):
                self.returns.take(np.array(plan.slots, np.int64))
        inputs = build_inputs(self.state, plan)
        if self.recorder is not None:
            self.recorder.begin(inputs, self.state)
        self.timeline.lap("inputs")
        hidden = self.forward(inputs, self._wanted(inputs))
        add_operations(self.model, self.timeline)
        self.timeline.lap("forward")
        prompt_logprobs = self._prompt_logprobs(hidden, inputs) if hidden is not None and self.state.curious else []
        sampled = self._sample(hidden, inputs)
        if self.returns is None:
            self.state.append(inputs.sampled_slots, sampled.tokens)
        else:
            self.returns.sampled(inputs.sampled_slots, sampled.tokens)
        self.timeline.lap("sample")
        if not self.is_output_rank:
            return None
        assert hidden is not None
        return StepResult(
            step=plan.step,
            tokens=sampled.tokens.tolist(),
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            ended=sampled.ended,
            embeddings=self.pooler.take(hidden, inputs, self.state),
            compute_s=time.perf_counter() - began,
        )

    @torch.inference_mode()
    def rehearse(self, query_lens: list[int], seq_lens: list[int]) -> None:
        """Run a step of no request, for what it sets up or costs: kernels picked, buffers grown, connections made.

        Every rank must call it alike, before the first real step. No request's state is touched.
        """
        inputs = rehearsal_inputs(query_lens, seq_lens, self.state.block_size)
        hidden = self.forward(inputs)
        logits = None
        if hidden is not None:
            last = hidden[self._to_device(inputs.last_tokens)]
            self.model.compute_top_tokens(last)
            logits = self.model.compute_logits(last)
        tokens = np.zeros(len(query_lens), np.int64) if logits is None else argmax(logits)
        if self.groups.pp.world_size == 1:
            self.groups.tp.broadcast(self._to_device(tokens), src=0)

    def _wanted(self, inputs: StepInputs) -> I64 | None:
        """The tokens whose hidden states this step's results are made of: what is sampled, if nobody asks for more. None: all.

        At least one, so that no operation meets a step of nothing.
        """
        if len(inputs.sampled_rows) == len(inputs.input_ids) or (self.state.curious and self._more_wanted(inputs)):
            return None
        return inputs.last_tokens if len(inputs.sampled_rows) else np.zeros(1, np.int64)

    def _more_wanted(self, inputs: StepInputs) -> bool:
        in_prompt = inputs.seq_lens - inputs.query_lens < self.state.prompt_lens[inputs.slots] - 1  # its last token predicts no prompt
        asked = self.state.prompt_logprobs[inputs.slots] >= 0
        return bool((in_prompt & asked).any() or self.state.pools[inputs.slots].any())

    def forward(self, inputs: StepInputs, wanted: I64 | None = None) -> torch.Tensor | None:
        """Hidden states `[tokens, hidden]` of the step's tokens; None on a pipeline stage before the last, which sends them on.

        Of the `wanted` tokens only, `[wanted, hidden]`, where the model can do without the others (DecoderModel.forward).

        Their keys and values are in the cache afterwards.
        """
        batch = AttentionBatch.build(inputs.query_lens, inputs.seq_lens, inputs.block_tables, self.state.block_size, self.device)
        with self.timeline.span(RECEIVE, "idle"), self._stage():
            given = hop.receive(self.groups)
        meter = self.meter if self.model.native is not None else None
        before = meter.waited_ns() if meter is not None else 0
        result = self.model(self._to_device(inputs.input_ids), batch, given, wanted)
        if meter is not None:
            meter.layers(before)
        if isinstance(result, torch.Tensor):
            return result
        with self.timeline.span(SEND, "idle"), self._stage():
            for handle in self.sending:  # of the step before
                handle.wait()
        self.sending = hop.send(self.groups, result)
        return None

    def _stage(self, *, whole: bool = False) -> AbstractContextManager[None]:
        return self.meter.stage(whole=whole) if self.meter is not None and self.groups.pp.world_size > 1 else _NOTHING

    def _sample(self, hidden: torch.Tensor | None, inputs: StepInputs) -> Sampled:
        """One token for each sampled row, the same on every rank; log-probabilities on the output rank only.

        In a pipeline the output rank alone has tokens; the others' are not looked at.
        """
        count = len(inputs.sampled_rows)
        if not count:
            return Sampled(np.empty(0, np.int64), None)
        sampled = None
        if hidden is not None:
            last = hidden if count == len(hidden) else hidden[self._to_device(inputs.last_tokens)]  # all of them, where all decode
            rows = self.state.sample_rows(inputs.sampled_slots) if self.state.choosy or self.recorder is not None else None
            if rows is None or (rows.plain_greedy and self.recorder is None):  # whole logits need not be gathered, and every rank knows
                return Sampled(self.model.compute_top_tokens(last).cpu().numpy(), None)
            sampled = self._choose(last, rows)
        if self.groups.pp.world_size > 1:
            return sampled or Sampled(np.empty(0, np.int64), None)
        if self.groups.tp.world_size == 1:
            assert sampled is not None
            return sampled
        tokens = torch.empty(count, dtype=torch.int64, device=self.device) if sampled is None else self._to_device(sampled.tokens)
        everyones: I64 = self.groups.tp.broadcast(tokens, src=0).cpu().numpy()
        return Sampled(everyones, sampled.logprobs, sampled.ended) if sampled else Sampled(everyones, None)

    def _choose(self, hidden: torch.Tensor, rows: SampleRows) -> Sampled | None:
        """Tokens for `hidden [rows, hidden]` on the output rank. Every rank takes part."""
        logits = self.model.compute_logits(hidden)
        if logits is None:
            return None
        if self.recorder is not None:
            self.recorder.logits(logits)
        return self.sampler.sample(logits, rows)

    def record(self, recorder: Recorder | None, layers: bool = True) -> None:
        """Tell `recorder` what later steps compute; None: nobody any more. Every rank must do it at the same step.

        layers: what each layer does too, not the logits alone.
        """
        self.recorder = recorder
        self.model.watch_layers(recorder.layer if recorder is not None and layers else None)

    def _prompt_logprobs(self, hidden: torch.Tensor, inputs: StepInputs) -> PromptLogprobs:
        """For each row that asked: the prompt tokens that this step's positions predict. Filled on the output rank only.

        The logits of a long prompt are made a few rows at a time; every rank makes the same pieces.
        """
        found: PromptLogprobs = []
        after = np.cumsum(inputs.query_lens)
        for row in np.flatnonzero(self.state.prompt_logprobs[inputs.slots] >= 0).tolist():
            slot = int(inputs.slots[row])
            start = int(inputs.seq_lens[row] - inputs.query_lens[row])
            count = min(int(inputs.seq_lens[row]), int(self.state.prompt_lens[slot]) - 1) - start
            if count > 0:
                at = int(after[row] - inputs.query_lens[row])
                given: I64 = self.state.tokens[slot, start + 1 : start + 1 + count].astype(np.int64)
                found.append((slot, self._given_logprobs(hidden[at : at + count], given, int(self.state.prompt_logprobs[slot]))))
        return found if self.is_output_rank else []

    def _given_logprobs(self, hidden: torch.Tensor, given: I64, top: int) -> list[TokenLogprobs]:
        """Log-probabilities of `given [rows]`, each predicted by its row of `hidden [rows, hidden]`."""
        found: list[TokenLogprobs] = []
        step = chunk_rows(self.spec.vocab_size)
        for at in range(0, len(given), step):
            logits = self.model.compute_logits(hidden[at : at + step])
            if logits is not None:
                tokens = given[at : at + step]
                found += token_logprobs(logits, tokens, np.full(len(tokens), top, np.int64))
        return found

    def _to_device(self, array: I64) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _mark(self, plan: StepPlan) -> None:
        """Tell the progress cell what this rank begins: a wait that fails names it."""
        if self.progress is not None:
            self.progress.set(phase="step", step=plan.step, note="prefill" if max(plan.num_tokens) > 1 else "decode")
