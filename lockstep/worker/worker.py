"""One rank: a device, the model's share on it, its part of the KV cache, and the steps it runs.

Life: init_device -> load_model -> memory -> initialize_kv_cache -> execute_model ... Every public method may be called
by name through the executor; all ranks get the same calls in the same order.
"""

from __future__ import annotations

import gc
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from lockstep.config.defaults import default_token_budget, most_num_seqs
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.source import tokenizer_folder
from lockstep.config.tree import EngineConfig
from lockstep.distributed.groups import ParallelGroups
from lockstep.grammar.vocabulary import load_vocabulary
from lockstep.kernels import threads
from lockstep.kernels.library import library
from lockstep.models import native
from lockstep.models.decoder import DecoderModel
from lockstep.models.registry import build_model
from lockstep.observability.logging import get_logger
from lockstep.observability.timeline import Recorded, Row
from lockstep.protocol import RankMemory, StepPlan, StepResult
from lockstep.utils import env
from lockstep.utils.cores import RankCores
from lockstep.weights.dummy import fill_dummy
from lockstep.weights.loader import load_weights
from lockstep.worker import kv, memory, profile, rates, sleep, tracing
from lockstep.worker.agreement import check_kernels
from lockstep.worker.batch import BatchState
from lockstep.worker.meter import Meter
from lockstep.worker.model_runner import ModelRunner
from lockstep.worker.recorder import Recorder
from lockstep.worker.step_clock import StepClock

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from lockstep.distributed.progress import ProgressCell

_log = get_logger(__name__)


class Worker(Recorded):
    """One rank of an engine.

    config: resolved (device, dtype and max_model_len are set). folder: the checkpoint. local_rank: among the ranks of
    this host; on CUDA the device's number. groups: made by the executor, torch.distributed is ready.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        folder: Path,
        rank: int,
        local_rank: int,
        groups: ParallelGroups,
        progress: ProgressCell | None = None,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.folder, self.groups, self.progress = config, spec, folder, groups, progress
        self.rank, self.local_rank = rank, local_rank
        self.device = torch.device("cpu")
        self._model: DecoderModel | None = None
        self._runner: ModelRunner | None = None
        self._free_bytes: int | None = None
        self._activation_bytes = 0
        self._kv_bytes = 0
        self._threads = self._torch_threads = 0  # this rank's share; torch's own before
        self._watch = ExitStack()
        self._kv: list[torch.Tensor] = []
        self._asleep: RankMemory | None = None  # what it has while it sleeps
        self._rehearsals: rates.Rehearsals | None = None  # calibration's models
        self._step_clock: StepClock | None = None
        self._sleeping_blocks = 0  # KV blocks that it will have again
        self._meter = Meter(groups, progress) if progress is not None and groups.world.world_size > 1 else None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV cache."""
        name = self.config.model.dtype
        assert name != "auto", "the configuration was not resolved: dtype is still auto"
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]

    @property
    def model(self) -> DecoderModel:
        """The model, once loaded."""
        assert self._model is not None, "load_model comes first"
        return self._model

    @property
    def runner(self) -> ModelRunner:
        """What runs steps, once the KV cache is there."""
        assert self._runner is not None, "initialize_kv_cache comes first"
        return self._runner

    def init_device(self, share: RankCores | None = None, own_process: bool = False) -> None:
        """Take the device: on CUDA the GPU numbered local_rank, on CPU this rank's share of the cores.

        share: None for as many threads as torch has now, not bound. own_process: this process has nothing else to do.
        """
        self._mark("init")
        if self.config.runtime.device == "cuda":
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self._torch_threads = torch.get_num_threads()
            share = share or RankCores((), self.config.parallel.threads_per_rank or self._torch_threads)
            self._threads = share.threads
            threads.take(share, own_process)

    def load_model(self) -> None:
        """Build the model and fill this rank's share of its weights. Raises WeightError for a checkpoint that does not fit."""
        self._mark("load", "0 %")
        packed, quantization = self._packs(), self.config.model.quantization
        self._model = model = build_model(
            self.spec, self.groups, self.dtype, self.device, partition=self.config.parallel.pipeline_layer_partition
        )
        if self.config.model.load_format == "dummy":
            fill_dummy(model, self.config.model.seed, progress=self._loaded)
        else:
            load_weights(model, self.folder, progress=self._loaded, packers=model.packers(quantization) if packed else {})
        if packed:
            self._mark("pack")
            model.pack(profile.LargestStep.of(self.config, self.spec).tokens, quantization)
        self._mark("loaded")

    def _packs(self) -> bool:
        """Whether the weights are handed to the CPU kernels; where that cannot be on CPU, say why and go on with torch's operations."""
        quantization = self.config.model.quantization
        reason = native.why_not(self.device, self.config.cache.block_size)
        if reason and self.device.type == "cpu" and self._threads:
            torch.set_num_threads(self._threads)
        if reason and quantization:
            raise ConfigError(f"quantization={quantization!r} needs the CPU kernels, but {reason}.")
        if reason and self.device.type == "cpu" and library() is not None and self.rank == 0:
            _log.warning("plain torch operations run, slower and not bit for bit the same across splits: %s", reason)
        if env.loose_atoms() and self.rank == 0:
            _log.warning("LOCKSTEP_LOOSE_ATOMS is set: answers depend on the split. It is there to measure what equal bits cost.")
        if self.device.type == "cpu":
            check_kernels(self.groups.world, native=not reason)
        return not reason

    def memory(self) -> RankMemory:
        """This rank's memory. `free_bytes` is found once, before the KV cache is allocated."""
        if self._asleep is not None:
            return self._asleep
        per_block = kv.bytes_per_block(self.model.kv_layers(), self.config.cache.block_size, self.dtype)
        if self._free_bytes is None:
            self._mark("profile")
            room = profile.room_bytes(self.config, self.device, self.config.parallel.ranks_here)
            self._activation_bytes = profile.largest_step_bytes(self.model, self.spec, self.config, self.groups, self.device)
            self._free_bytes = max(0, room - self._activation_bytes)
            self._mark("ready")
        return RankMemory(
            rank=self.rank,
            weight_bytes=memory.weight_bytes(self.model),
            free_bytes=self._free_bytes,
            kv_bytes_per_block=per_block,
            kv_bytes=self._kv_bytes,
            owned_bytes=memory.owned_bytes(self.model, self._kv_bytes, self._runner.state.nbytes if self._runner else 0, self.groups),
            peak_bytes=memory.peak_bytes(self.device),
        )

    def initialize_kv_cache(self, num_blocks: int) -> None:
        """Allocate `num_blocks` KV blocks, bind them to the layers and run a first small step."""
        assert self._runner is None, "the KV cache is allocated once"
        self._mark("kv cache")
        block_size = self.config.cache.block_size
        self._bind_kv(num_blocks)
        slots = most_num_seqs(self.config, default_token_budget(self.config, self.spec))
        state = BatchState(slots, self.config.model.max_model_len or self.spec.max_position_embeddings, block_size)
        self._runner = ModelRunner(
            self.model,
            self.spec,
            self.groups,
            state=state,
            device=self.device,
            progress=self.progress,
            timeline=self.timeline,
            vocabulary=self._vocabulary,
            meter=self._meter,
        )
        self._mark("warm-up")
        self._runner.rehearse([1], [1])
        self._mark("ready")

    def _bind_kv(self, num_blocks: int) -> None:
        block_size = self.config.cache.block_size
        self._kv = kv.allocate(self.model.kv_layers(), num_blocks, block_size, dtype=self.dtype, device=self.device)
        self.model.bind_kv(self._kv)
        self._kv_bytes = sum(t.nbytes for t in self._kv)

    def sleep(self, level: int) -> None:
        """Give the KV cache's memory back (level 1), and the weights' (level 2). No step until `wake_up`; requests start anew then."""
        before = self.memory()
        self._mark("falling asleep")
        self._watch.close()
        blocks = self._kv[0].shape[1]
        if level == 1 and self.device.type == "cpu":
            sleep.forget_contents(self._kv)
        elif level == 1:
            self._bind_kv(1)
        else:
            self._kv = []
            self.runner.rest()
            self._model = None
        sleep.collect(self.device)
        left = before.weight_bytes if level == 1 else 0
        self._asleep = msgspec.structs.replace(before, weight_bytes=left, kv_bytes=0)
        self._sleeping_blocks = blocks
        self._mark("asleep")

    def wake_up(self) -> None:
        """Take the memory again: weights are read as at the start."""
        if self._asleep is None:
            return
        if self._model is None:
            self.load_model()
            self._bind_kv(self._sleeping_blocks)
            self.runner.rise(self.model)
        elif self.device.type != "cpu":
            self._bind_kv(self._sleeping_blocks)
        self._asleep = None
        gc.freeze()
        self._mark("ready")

    def execute_model(self, plan: StepPlan) -> StepResult | None:
        """Run one step. Its result on the rank that samples, None on the others."""
        result = self.runner.execute(plan)
        if self._meter is not None:
            self._meter.stepped()
        if self.progress is not None and self.device.type == "cuda":
            self.progress.times.memory(device_bytes=torch.cuda.memory_reserved(self.device))
        return result

    def record(self, path: str, layers: bool = True) -> None:
        """Record what the next steps compute; `path` ends it and saves there, a file for each rank. "": begin anew.

        layers: what layers compute too, for which the last one computes every token.
        """
        recorder = self.runner.recorder
        if path:
            assert recorder is not None, "record: nothing was begun"
            recorder.save(Path(f"{path}-rank{self.rank}.npz"))
            self.runner.record(None)
        else:
            self.runner.record(Recorder(), layers)

    def start_timeline(self) -> None:
        """Record this rank's steps, and what happens inside them, from now on."""
        self._watch.close()
        self._watch = tracing.watch(self.model, self.groups, self.timeline)
        super().start_timeline()

    def take_timeline(self) -> tuple[list[Row], int]:
        """Stop; the spans since the start, and how many more there was no room for."""
        self._watch.close()
        return super().take_timeline()

    def start_step_clock(self) -> None:
        """Note from now on how much of each step is operations. For calibration, on a model that its kernels run."""
        assert self._step_clock is None, "take_step_clock comes first"
        self._step_clock = StepClock(self.model)

    def take_step_clock(self) -> list[float]:
        """Stop; the seconds of operations of each step since the start."""
        assert self._step_clock is not None, "start_step_clock comes first"
        clock, self._step_clock = self._step_clock, None
        return clock.close()

    def operation_seconds(
        self, spec: dict[str, Any], cases: list[list[int]], seconds: float, alone: bool, only: int | None, usual: bool
    ) -> list[dict[str, float]]:
        """For calibration: see `worker.rates`. alone: a whole model on each rank, all at the same time, instead of one cut over
        them. only: so many ranks measure, the others wait. usual: means, with what neighbours take."""
        self.groups.tp.barrier()
        if only is not None and self.rank >= only:
            return []
        if self._rehearsals is None:
            self._rehearsals = rates.Rehearsals(self.groups, self.dtype, self.config.cache.block_size, self.config.model.quantization)
        meeting = self.groups.tp if only is None else ParallelGroups.solo().tp
        return self._rehearsals.seconds(spec, [(a, b, c) for a, b, c in cases], seconds, alone=alone, usual=usual, meeting=meeting)

    def shutdown(self) -> None:
        """Leave torch's threads as they were: the process may be the user's."""
        self._rehearsals = None
        if self._meter is not None:
            self._meter.close()
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)

    def num_threads(self) -> int:
        """Threads that this rank computes with."""
        return torch.get_num_threads() if self._model is None or self._model.native is None else int(library().team_size())

    def ping(self) -> int:
        """This rank's number: a sign that it answers."""
        return self.rank

    def process_id(self) -> int:
        """Of this rank's process."""
        return os.getpid()

    def memory_summary(self) -> dict[str, int]:
        """Bytes by use: weights, kv, activations (the largest step's, as planned) and the peak so far."""
        return {
            "rank": self.rank,
            "weight_bytes": memory.weight_bytes(self.model),
            "kv_bytes": self._kv_bytes,
            "activation_bytes": self._activation_bytes,
            "peak_bytes": memory.peak_bytes(self.device),
        }

    def parameter_digest(self) -> str:
        """SHA-256 over this rank's parameters, names and bytes: equal shards have equal digests."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        for name, module in self.model.named_modules():
            if (packed := getattr(module, "packed", None)) is not None:
                digest.update(f"{name}{packed.shape}".encode() + packed.tobytes())
        return digest.hexdigest()

    def _vocabulary(self) -> LLTokenizer:
        """For structured outputs, on a thread of the output rank."""
        return load_vocabulary(tokenizer_folder(self.config.model, self.folder), self.spec.vocab_size, self.spec.eos_token_ids)

    def _loaded(self, done: int, total: int, tensor: str) -> None:
        self._mark("load", f"{100 * done // max(total, 1)} %, {tensor}")

    def _mark(self, phase: str, note: str = "") -> None:
        if self.progress is not None:
            self.progress.set(phase=phase, note=note)
