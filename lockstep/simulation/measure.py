"""Asks ranks for the seconds of their operations, and sorts the answers by what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import NamedTuple

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.distributed.partition import ShardMap
from lockstep.executor.contract import Executor
from lockstep.planner.calibration import Line, Mode, ProductRates
from lockstep.planner.cpu_ops import far_share, pairs_of, product_s
from lockstep.planner.cpu_tables import GATED, PLAIN, ROW
from lockstep.planner.layout import Layout
from lockstep.planner.memory import weight_bytes
from lockstep.planner.model import ModelShape, from_spec
from lockstep.simulation import rates_fit
from lockstep.simulation.rates_fit import Product
from lockstep.simulation.samples_kept import with_samples
from lockstep.utils.noise import undisturbed

Case = tuple[int, int, int]  # rows, tokens that each computes, tokens that each holds afterwards
# Decode over rows and contexts, then prompts: each of these rows is a point of the products' table.
DECODE: tuple[Case, ...] = (
    (1, 1, 64),
    (1, 1, 1024),
    (2, 1, 256),
    (4, 1, 128),
    (8, 1, 64),
    (8, 1, 768),
    (16, 1, 128),
    (32, 1, 64),
    (32, 1, 512),
)
PREFILL: tuple[Case, ...] = ((1, 64, 64), (1, 128, 640), (4, 64, 64), (2, 512, 512))
CASES = (*DECODE, *PREFILL)
LONGEST: Case = (2, 1024, 1024)  # of the smaller models: of a large one it takes seconds
READ, MULTIPLY = DECODE[0], PREFILL[2]
TIMEOUT_S = 120.0
PER_LAYER = {"qkv", "rope", "attention", "out", "gate_up", "down"}


def model(hidden: int, columns: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> ModelSpec:
    """A Llama of these sizes."""
    return ModelSpec(
        "LlamaForCausalLM", hidden, layers, heads, kv_heads, head_dim, columns, vocab, 4096,
        layer_kinds=("full",) * layers, dtype="bfloat16",
    )  # fmt: skip


# From one that stays in the caches of any core to two that must be read from memory. Shapes and head groups differ.
MODELS = (
    model(192, 512, 4, 6, 2, 32, 2048),
    model(320, 896, 5, 10, 5, 32, 4096),
    model(384, 1024, 6, 6, 6, 64, 6144),
    model(768, 2560, 6, 12, 3, 64, 8192),
    model(1280, 4608, 4, 10, 2, 128, 10240),
)


@dataclass(frozen=True)
class Answer:
    """What one rank measured of one model: the seconds of each kind of operation, by case."""

    shape: ModelShape
    tp: int
    cases: Sequence[Case]
    times: Sequence[dict[str, float]]

    def of(self, case: Case) -> dict[str, float]:
        """The times of one of the cases."""
        return self.times[self.cases.index(case)]

    @property
    def work(self) -> int:
        """Bytes of the weights that a step reads."""
        return weight_bytes(self.shape, Layout(tp=self.tp))

    def sizes(self) -> tuple[int, int, int]:
        """Widths of queries, of keys, and columns of the MLP on the first rank."""
        assert self.shape.spec is not None
        part = ShardMap.of(self.shape.spec, self.tp, 0)
        return part.heads.q.size * self.shape.head_dim, part.heads.kv.size * self.shape.head_dim, part.mlp.size


def ask(
    executor: Executor,
    spec: ModelSpec,
    cases: Sequence[Case],
    seconds: float,
    *,
    tp: int,
    alone: bool,
    only: int | None = None,
    usual: bool = False,
) -> Answer:
    """What rank 0 finds, all ranks measuring at the same time (`only`: this many of them). usual: means, not what is undisturbed."""
    args = (msgspec.to_builtins(spec), [list(case) for case in cases], seconds, alone, only, usual)
    answers = executor.collective_rpc("operation_seconds", args, timeout=TIMEOUT_S + 4 * seconds)
    return Answer(from_spec(spec, "calibration"), tp, cases, answers[0])


def joined(answers: Sequence[Answer]) -> Answer:
    """Answers to the same cases as one: every operation undisturbed."""
    every = zip(*(answer.times for answer in answers), strict=True)
    return replace(answers[0], times=[{kind: undisturbed(times[kind] for times in each) for kind in each[0]} for each in every])


def disturbed(answers: Sequence[Answer]) -> float:
    """How much longer than undisturbed these cases took in the usual one of several answers: 1.2 is a fifth longer. What slows each of
    them alike is not seen."""
    steps = [[step_of(answer, times) for times in answer.times] for answer in answers]
    return mean(median(each) / undisturbed(each) for each in zip(*steps, strict=True))


def step_of(answer: Answer, times: dict[str, float]) -> float:
    """All operations of one step, from the seconds of one of each kind."""
    layers = answer.shape.num_layers
    return sum(seconds * (layers if kind in PER_LAYER else 1) for kind, seconds in times.items())


class Speeds(NamedTuple):
    """What a rank does now: bytes/s of weights that no cache holds, and flop/s of many rows. See `Mode`."""

    read: float
    multiply: float


def speeds(largest: Answer) -> Speeds:
    """From the largest model's answers to `READ` and `MULTIPLY`."""
    q, kv, columns = largest.sizes()
    weights = largest.shape.hidden_size * (2 * q + 2 * kv + 3 * columns)
    read, multiply = (sum(largest.of(case)[kind] for kind in ("qkv", "out", "gate_up", "down")) for case in (READ, MULTIPLY))
    return Speeds(weights * largest.shape.itemsize / read, 2 * MULTIPLY[0] * MULTIPLY[1] * weights / multiply)


def product_samples(answer: Answer) -> list[Product]:
    """Every product of every case."""
    q, kv, columns = answer.sizes()
    hidden, found = answer.shape.hidden_size, []
    for (rows, tokens, _), times in zip(answer.cases, answer.times, strict=True):
        for kind, n, k, gated, row in (
            ("qkv", q + 2 * kv, hidden, False, False),
            ("out", hidden, q, False, True),
            ("gate_up", 2 * columns, hidden, True, False),
            ("down", hidden, columns, False, True),
        ):
            if kind in times:
                found.append(Product(rows * tokens, n, k, answer.work, gated=gated, row=row, seconds=times[kind]))
    return found


def attention_samples(answers: Sequence[Answer], busy: int, cache_bytes: int, *, decode: bool) -> tuple[list[list[float]], list[float]]:
    """Rows of (bytes, pairs, query rows, bytes from memory, scores) and their seconds."""
    features, seconds = [], []
    for answer in answers:
        q, kv, _ = answer.sizes()
        for (rows, tokens, length), times in zip(answer.cases, answer.times, strict=True):
            if "attention" in times and (tokens == 1) == decode:
                size = 2 * kv * answer.shape.itemsize * rows * length
                far = far_share(busy * (answer.work + answer.shape.num_layers * size), cache_bytes)
                pairs = float(rows * pairs_of(tokens, length) * q)
                features.append([float(size), pairs, float(rows * tokens * q), size * far, pairs / answer.shape.head_dim])
                seconds.append(times["attention"])
    return features, seconds


def rope_width(answer: Answer) -> int:
    """Of queries, keys and values."""
    q, kv, _ = answer.sizes()
    return q + 2 * kv


def over_tokens(answers: Sequence[Answer], kind: str, width: Callable[[Answer], int], wanted: Callable[[int], bool] = bool) -> Line:
    """A line over tokens x `width(answer)`. wanted: which cases, by the tokens that each row computes."""
    return rates_fit.line(
        (rows * tokens * width(answer), times[kind])
        for answer in answers
        for (rows, tokens, _), times in zip(answer.cases, answer.times, strict=True)
        if kind in times and wanted(tokens)
    )


def mode_of(answers: Sequence[Answer], *, ranks: int, busy: int, threads: int, cache_bytes: int) -> Mode:
    """The constants of models that are whole on their rank, and the samples that say more than they do. The last model is the largest."""
    found = [p for answer in answers for p in product_samples(answer)]
    products = rates_fit.with_far(rates_fit.products(found), busy, cache_bytes)
    now = speeds(answers[-1])
    heads = [((1.0, x, float(busy * work > cache_bytes)), seconds, whole) for x, work, seconds, whole in _heads(answers, products)]
    base, each, far_s = rates_fit.fit(*zip(*heads, strict=True))
    mode = Mode(
        ranks=ranks,
        busy=busy,
        threads=threads,
        bandwidth=now.read,
        flops=now.multiply,
        products=products,
        decode=rates_fit.attention(*attention_samples(answers, busy, cache_bytes, decode=True)),
        prefill=rates_fit.attention(*attention_samples(answers, busy, cache_bytes, decode=False)),
        rope=over_tokens(answers, "rope", rope_width, lambda tokens: tokens > 1),
        rope_one=over_tokens(answers, "rope", rope_width, lambda tokens: tokens == 1),
        angles=over_tokens(answers, "angles", lambda a: a.shape.head_dim),
        embed=over_tokens(answers, "embed", lambda a: a.shape.hidden_size),
        norm=over_tokens(answers, "norm", lambda a: a.shape.hidden_size),
        choose=Line(base, each),
        choose_far_s=far_s,
    )
    rows = {"product": [(p.rows, p.n, p.k, p.work, GATED if p.gated else ROW if p.row else PLAIN, p.seconds) for p in found]}
    for decode in (True, False):
        each = zip(*attention_samples(answers, busy, cache_bytes, decode=decode), strict=True)
        rows[f"{'decode' if decode else 'prefill'} attention"] = [
            (b, p, q, far / b, scores, p / b, s) for (b, p, q, far, scores), s in each
        ]
    return with_samples(mode, rows)


def _heads(answers: Sequence[Answer], products: Sequence[ProductRates]) -> list[tuple[float, int, float, float]]:
    """(rows x vocabulary, bytes of weights, seconds beyond the product, all seconds) of each case's logits and choice."""
    found = []
    for answer in answers:
        vocab = answer.shape.vocab_size // answer.tp
        for (rows, _, _), times in zip(answer.cases, answer.times, strict=True):
            if "head" in times:
                product = product_s(products, rows, vocab, answer.shape.hidden_size, answer.work)
                found.append((float(rows * vocab), answer.work, times["head"] - product, times["head"]))
    return found


def with_collectives(mode: Mode, answers: Sequence[Answer], cache_bytes: int) -> Mode:
    """The mode, and what summing over the ranks and choosing among them adds to models that are cut over them."""
    sums = []
    for answer in answers:
        q, _, columns = answer.sizes()
        hidden = answer.shape.hidden_size
        for (rows, tokens, _), times in zip(answer.cases, answer.times, strict=True):
            both = [(name, k) for name, k in (("out", q), ("down", columns)) if name in times]
            plain = sum(product_s(mode.products, rows * tokens, hidden, k, answer.work, row=True) for _, k in both)
            if both:
                whole = sum(times[name] for name, _ in both)
                sums.append((float(rows * tokens * hidden), (whole - plain) / len(both), whole / len(both)))
    heads = []
    for x, work, seconds, whole in _heads(answers, mode.products):
        chosen = mode.choose.at(x) + (mode.choose_far_s if mode.ranks * work > cache_bytes else 0.0)
        heads.append((x, seconds - chosen, whole))
    return msgspec.structs.replace(mode, combine=rates_fit.rest_line(sums), exchange=rates_fit.rest_line(heads))
