"""An engine that computes nothing and is never late: every request gets a token each 50 ms. For measuring what is above it."""

from __future__ import annotations

import select
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.cluster.contract import EngineClient
from lockstep.cluster.health import EngineHealth, ReplicaHealth, RequestInfo, own_process
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import resolve
from lockstep.engine.sizing import MemoryPlan
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.observability.timeline import Timeline
from lockstep.observability.trace import Profile
from lockstep.protocol import EngineOutput, EngineRequest

PERIOD_S = 0.05
PHASES = 100  # a prompt of n tokens has its outputs at n % PHASES hundredths of the period, on the monotonic clock
NAP_S = 0.5
MANY = 1 << 16
TOKENS = tuple(range(300, 364))  # ids that every vocabulary of size has, most with a text of their own


def phase_s(prompt_tokens: int) -> float:
    """When, in each period, the tokens of a prompt of this length are due."""
    return PERIOD_S * (prompt_tokens % PHASES) / PHASES


def make(config: EngineConfig, spec: ModelSpec, folder: Path, *, replaced: bool = False) -> PacedClient:
    """For `EngineHandle(client="lockstep.testing.paced:make")`."""
    config = resolve(config)[0]
    model = replace(config.model, max_model_len=config.model.max_model_len or 2048)
    scheduler = replace(config.scheduler, max_num_seqs=MANY, max_num_batched_tokens=MANY)
    return PacedClient(replace(config, model=model, scheduler=scheduler))


class PacedClient(EngineClient):
    """See EngineClient. Requests of one phase have their tokens in one step, as those of a batch do."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.model.max_model_len
        ranks = (RankMemory(rank=0, weight_bytes=0, free_bytes=0, kv_bytes_per_block=1),)
        self.config, self.timeline = config, Timeline()
        self.failure: ExecutorError | None = None
        self.memory = MemoryPlan(1 << 20, 16, MANY, MANY, config.model.max_model_len, ranks, "nothing: it is a fake")
        self._due: dict[float, dict[str, EngineRequest]] = {}  # phase -> its requests
        self._next: dict[float, float] = {}  # phase -> when its next step is
        self._made: dict[str, int] = {}
        self._ended: list[EngineOutput] = []
        self._fd: int | None = None
        self._tokens = 0
        self._process = own_process()
        self._paused, self._sleep_level = False, 0

    def check_request(self, request: EngineRequest) -> None:
        pass

    def add_request(self, request: EngineRequest) -> None:
        phase = phase_s(len(request.prompt_token_ids))
        self._due.setdefault(phase, {})[request.request_id] = request
        self._made[request.request_id] = len(request.output_token_ids)
        if phase not in self._next:
            now = time.monotonic()
            self._next[phase] = now - (now - phase) % PERIOD_S + PERIOD_S

    def abort(self, request_ids: Iterable[str]) -> None:
        for name in request_ids:
            for requests in self._due.values():
                if requests.pop(name, None) is not None:
                    self._ended.append(EngineOutput(request_id=name, new_token_ids=[], finish_reason="abort"))

    def step(self) -> list[EngineOutput]:
        """Wait for the next phase that is due, or for a message."""
        first = min(self._next.values(), default=time.monotonic() + NAP_S)
        wait_s = 0.0 if self._ended else NAP_S if self._paused else first - time.monotonic()
        if wait_s > 0 and self._fd is not None and select.select([self._fd], [], [], wait_s)[0]:
            return []
        outputs, self._ended = self._ended, []
        now = 0.0 if self._paused else time.monotonic()
        for phase in [phase for phase, at in self._next.items() if at <= now]:
            outputs += self._advance(phase)
            self._next[phase] += PERIOD_S
            if not self._due[phase]:
                del self._due[phase], self._next[phase]
        return outputs

    def _advance(self, phase: float) -> list[EngineOutput]:
        """A token for every request of the phase."""
        outputs = []
        for name, request in list(self._due[phase].items()):
            made = self._made[name] = self._made[name] + 1
            over = made == request.sampling.max_tokens
            token = TOKENS[made % len(TOKENS)]
            outputs.append(EngineOutput(request_id=name, new_token_ids=[token], finish_reason="length" if over else None))
            if over:
                del self._due[phase][name], self._made[name]
        self._tokens += len(outputs)
        return outputs

    def watch(self, fd: int) -> None:
        self._fd = fd

    def stats(self) -> EngineStats:
        numbers = dict.fromkeys(EngineStats.__struct_fields__, 0)
        running = sum(map(len, self._due.values()))
        return EngineStats(**{**numbers, "running": running, "kv_blocks": 1, "generated_tokens": self._tokens})

    def ranks(self) -> list[RankMemory]:
        return list(self.memory.ranks)

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return []

    def start_profile(self) -> None:
        pass

    def stop_profile(self) -> Profile:
        raise ValueError("there is nothing to profile in a fake engine.")

    def health(self) -> EngineHealth:
        pid, born = self._process
        one = ReplicaHealth(replica=0, state="ready", pid=pid, stats=self.stats())
        return EngineHealth(pid=pid, born=born, replicas=[one], paused=self._paused, sleep_level=self._sleep_level)

    def requests(self) -> list[RequestInfo]:
        now_s = time.monotonic()
        found = [
            RequestInfo(
                request_id=name,
                age_s=max(0.0, now_s - request.arrival_s) if request.arrival_s else 0.0,
                prompt_tokens=len(request.prompt_token_ids),
                output_tokens=self._made[name],
                state="running" if self._made[name] else "waiting",
                replica=0,
            )
            for requests in self._due.values()
            for name, request in requests.items()
        ]
        return sorted(found, key=lambda info: -info.age_s)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._sleep_level:
            raise ValueError(f"the engine sleeps (level {self._sleep_level}): wake it up instead.")
        self._go_on()

    def sleep(self, level: int = 1) -> None:
        if level not in (1, 2) or self._sleep_level not in (0, level):
            raise ValueError(f"level={level} cannot be now: it is 1 or 2, and a sleeper is woken up first.")
        self._paused, self._sleep_level = True, level

    def wake_up(self) -> None:
        if self._sleep_level:
            self._go_on()

    def _go_on(self) -> None:
        """Tokens that were due meanwhile are not made up for."""
        self._paused, self._sleep_level = False, 0
        now = time.monotonic()
        self._next = {phase: now - (now - phase) % PERIOD_S + PERIOD_S for phase in self._next}

    def reset_prefix_cache(self) -> None:
        pass

    def shutdown(self) -> None:
        pass
