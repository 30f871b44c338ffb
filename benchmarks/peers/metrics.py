"""What is measured: workloads, how one repetition of each becomes a figure, and rounds in which all engines take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from children import Child, turn

from lockstep.cli.bench import machine, workload
from lockstep.cli.bench.workload import Workload

PROMPT, OUTPUT = 128, 128  # decode: tokens of prompt and of output
_WARM = {"prompts": [[101 + i for i in range(16)]], "outs": [2]}  # asked after each continue: the pause has cooled caches
Answer = dict[str, Any]


def run(child: Child, work: Workload) -> Answer:
    """One workload on one engine. Raises ValueError when it gave not as many tokens as it was asked for."""
    answer = child.ask({"prompts": work.prompts, "outs": work.output_lens})
    given = [len(tokens) for tokens in answer["tokens"]]
    if given != work.output_lens:
        raise ValueError(f"{child.label} was asked for {work.output_lens} tokens and gave {given}: its figures would mean nothing.")
    return answer


@dataclass(frozen=True)
class Metric:
    """One line of the table. `measure(child, seed)` is one repetition: the figure, and the tokens it gave, to compare."""

    name: str
    unit: str
    measure: Callable[[Child, int], tuple[float, list[list[int]]]]
    warm: Callable[[Child, int], None]


def decode(vocab: int, batch: int) -> Metric:
    """Output tokens a second after the first of each: the time for 128 of each request less the time for one of each."""

    def measure(child: Child, seed: int) -> tuple[float, list[list[int]]]:
        first = run(child, workload.fixed(vocab, batch, PROMPT, 1, 2 * seed))
        whole = run(child, workload.fixed(vocab, batch, PROMPT, OUTPUT, 2 * seed + 1))
        return batch * (OUTPUT - 1) / (whole["seconds"] - first["seconds"]), whole["tokens"]

    def warm(child: Child, seed: int) -> None:
        run(child, workload.fixed(vocab, batch, PROMPT, 3, 2 * seed))

    return Metric(f"decode_tok_s_b{batch}", "tok/s", measure, warm)


def prefill(vocab: int, batch: int = 8, length: int = 512) -> Metric:
    """Prompt tokens a second: prompts of `length`, one output token each."""

    def measure(child: Child, seed: int) -> tuple[float, list[list[int]]]:
        answer = run(child, workload.fixed(vocab, batch, length, 1, seed))
        return batch * length / answer["seconds"], answer["tokens"]

    def warm(child: Child, seed: int) -> None:
        measure(child, seed)

    return Metric(f"prefill_tok_s_{batch}x{length}", "tok/s", measure, warm)


def mixed(vocab: int) -> Metric:
    """Output tokens a second of 64 requests at once, prompts of 32-512 and outputs of 16-256 tokens, seed 7."""
    work = workload.mixed(vocab)

    def measure(child: Child, seed: int) -> tuple[float, list[list[int]]]:
        answer = run(child, work.shifted(seed, vocab))  # the same lengths, so that repetitions are alike
        return work.output_tokens / answer["seconds"], answer["tokens"]

    def warm(child: Child, seed: int) -> None:
        run(child, Workload("warm", work.prompts, [2] * len(work.prompts)))

    return Metric("mixed64_out_tok_s", "tok/s", measure, warm)


@dataclass
class Round:
    """One repetition of every engine, in turn. All by label."""

    values: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    other_cores: dict[str, float] = field(default_factory=dict)  # processor use by strangers meanwhile
    own_cores: dict[str, float] = field(default_factory=dict)  # by the engine itself
    limit: float = 0.0  # what the probe found in this round: GB/s or GFLOP/s; 0: not measured

    @property
    def dirt(self) -> float:
        """The strangers' use in the worst of its measurements."""
        return max(self.other_cores.values())


@dataclass(frozen=True)
class Patience:
    """quiet_cores: strangers' use that still counts as quiet. wait_s: per measurement, for quiet. extra: dirty rounds repeated."""

    quiet_cores: float
    wait_s: float
    extra: int


def wait_quiet(patience: Patience) -> None:
    """Return when strangers have left the machine alone for half a second, or when patience ends."""
    deadline = time.monotonic() + patience.wait_s
    while time.monotonic() < deadline:
        watch = machine.Noise()
        time.sleep(0.5)
        if watch.other_cores() <= patience.quiet_cores + 0.02:  # a clock tick of 10 ms is 0.02 cores of half a second
            return


def rounds(
    metric: Metric, children: Sequence[Child], repetitions: int, patience: Patience, probe: Callable[[], float] | None = None
) -> list[Round]:
    """`repetitions` rounds, the quietest of those run. Every engine is stopped but the one at work, before and after."""
    for child in children:
        with turn(child):
            metric.warm(child, 1)
    done: list[Round] = []
    while len(done) < repetitions or (
        sum(r.dirt <= patience.quiet_cores for r in done) < repetitions and len(done) < repetitions + patience.extra
    ):
        seed = 100 + len(done)
        order = children if len(done) % 2 == 0 else children[::-1]  # A B, B A: a drift of the machine hits all alike
        this = Round(limit=probe() if probe is not None else 0.0)
        for child in order:
            _turn(metric, child, seed, this, patience)
        done.append(this)
    return sorted(done, key=lambda r: r.dirt)[:repetitions]


def _turn(metric: Metric, child: Child, seed: int, this: Round, patience: Patience) -> None:
    wait_quiet(patience)
    with turn(child):
        child.ask(_WARM)
        watch, before, start = machine.Noise(), child.cpu_s(), time.perf_counter()
        this.values[child.label], this.tokens[child.label] = metric.measure(child, seed)
        this.own_cores[child.label] = round((child.cpu_s() - before) / (time.perf_counter() - start), 2)
        this.other_cores[child.label] = watch.other_cores()


def idle_cores(child: Child, for_s: float = 1.0) -> float:
    """Processor use of an engine that has nothing to do but is not stopped, in cores."""
    with turn(child):
        child.ask(_WARM)
        time.sleep(0.5)
        before = child.cpu_s()
        time.sleep(for_s)
        return round((child.cpu_s() - before) / for_s, 3)


def peak_pss_mib(child: Child, vocab: int, every_s: float = 0.05) -> float:
    """The most memory the engine had at once during `mixed64`, a shared page counted once. Slows it: never timed."""
    stop, peak = threading.Event(), [0.0]

    def sample() -> None:
        while not stop.wait(every_s):
            peak[0] = max(peak[0], child.pss_mib())

    with turn(child):
        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            run(child, workload.mixed(vocab).shifted(3, vocab))
        finally:
            stop.set()
            sampler.join()
    return peak[0]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """How alike two answers to the same prompts are: the mean share of each output that is the same from its start on.

    Greedy tokens of different kernels part at the first near tie, so 1 is not to be expected in 16 bits; near 0 means
    that somebody computes something else.
    """
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        shares.append(same / len(a))
    return round(sum(shares) / len(shares), 3)
