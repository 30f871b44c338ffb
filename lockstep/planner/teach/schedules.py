"""All-reduce as messages: who sends which part of the buffer to whom, step by step.

A buffer is cut into `chunks` equal parts. All messages of a step leave together, with what their senders held before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lockstep.planner.teach.checks import within
from lockstep.planner.teach.svg import COLOURS, Canvas

Blocks = Sequence[Sequence[int]]  # the chunks of each block that a ring passes on


@dataclass(frozen=True, slots=True)
class Message:
    """In `step`, rank `source` sends its `chunks` to rank `target`, which adds them to its own or puts them in their place."""

    step: int
    source: int
    target: int
    chunks: Sequence[int]
    adds: bool


@dataclass(frozen=True)
class Schedule:
    """All messages of one all-reduce among `ranks`."""

    name: str
    ranks: int
    chunks: int
    messages: tuple[Message, ...]

    @property
    def steps(self) -> int:
        return 1 + max((message.step for message in self.messages), default=-1)

    def by_step(self) -> list[list[Message]]:
        """The messages of each step."""
        found: list[list[Message]] = [[] for _ in range(self.steps)]
        for message in self.messages:
            found[message.step].append(message)
        return found

    def size(self, message: Message, size_bytes: int) -> Fraction:
        """Bytes of a message, of a buffer of `size_bytes`."""
        return Fraction(len(message.chunks) * size_bytes, self.chunks)

    def sent(self, size_bytes: int) -> list[Fraction]:
        """Bytes that each rank sends in all."""
        chunks = [0] * self.ranks
        for message in self.messages:
            chunks[message.source] += len(message.chunks)
        return [Fraction(count * size_bytes, self.chunks) for count in chunks]


def run(schedule: Schedule, buffers: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """What every rank holds in the end. buffers[rank][chunk] is anything that adds; the inputs are left as they are."""
    assert len(buffers) == schedule.ranks and all(len(b) == schedule.chunks for b in buffers), "a buffer for each rank, cut into the chunks"
    held = [list(buffer) for buffer in buffers]
    for messages in schedule.by_step():
        sent = [(message, [held[message.source][chunk] for chunk in message.chunks]) for message in messages]
        for message, values in sent:
            mine = held[message.target]
            for chunk, value in zip(message.chunks, values, strict=True):
                mine[chunk] = mine[chunk] + value if message.adds else value
    return held


def ring(ranks: int) -> Schedule:
    """Everybody sends to the right. 1. n - 1 steps: what came is added and passed on; rank i then has all of block i + 1.
    2. n - 1 steps: the finished blocks go round. (Patarasuk and Yuan, 2009.)"""
    members, blocks = range(ranks), [[chunk] for chunk in range(ranks)]
    messages = _scatter(members, blocks, 0) + _gather(members, blocks, ranks - 1)
    return Schedule("ring", ranks, ranks, tuple(messages))


def tree(ranks: int) -> Schedule:
    """A binomial tree: in level k, rank r with r mod 2^(k+1) = 2^k hands everything to r - 2^k; then the same way back."""
    levels = (ranks - 1).bit_length()
    messages = []
    for level in range(levels):
        for rank in range(1 << level, ranks, 2 << level):
            below = rank - (1 << level)
            messages.append(Message(level, rank, below, (0,), True))
            messages.append(Message(2 * levels - 1 - level, below, rank, (0,), False))
    return Schedule("tree", ranks, 1, tuple(sorted(messages, key=lambda message: (message.step, message.source))))


def one_shot(ranks: int) -> Schedule:
    """Everybody sends everything to everybody, and adds what comes: one step."""
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    return Schedule("one-shot", ranks, 1, tuple(Message(0, a, b, (0,), True) for a, b in pairs))


def two_shot(ranks: int) -> Schedule:
    """1. Rank i collects block i from all others and adds. 2. It sends the sum to all others."""
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    collect = [Message(0, a, b, (b,), True) for a, b in pairs]
    return Schedule("two-shot", ranks, ranks, tuple(collect + [Message(1, a, b, (a,), False) for a, b in pairs]))


def hierarchical(nodes: int, per_node: int) -> Schedule:
    """1. Ring reduce-scatter in each node; 2. ring all-reduce between the nodes, each rank of a node with its peers and its own
    block; 3. ring all-gather in each node. Only 1/per_node of the buffer leaves a rank for another node in each pass."""
    blocks = [range(b * nodes, (b + 1) * nodes) for b in range(per_node)]
    messages = []
    across, last = per_node - 1, per_node - 1 + 2 * (nodes - 1)
    for node in range(nodes):
        inside = range(node * per_node, (node + 1) * per_node)
        messages += _scatter(inside, blocks, 0) + _gather(inside, blocks, last)
    for local in range(per_node):
        peers = range(local, nodes * per_node, per_node)
        own = [[chunk] for chunk in blocks[(local + 1) % per_node]]
        messages += _scatter(peers, own, across) + _gather(peers, own, across + nodes - 1)
    ordered = sorted(messages, key=lambda message: (message.step, message.source))
    return Schedule("hierarchical", nodes * per_node, nodes * per_node, tuple(ordered))


def _scatter(members: Sequence[int], blocks: Blocks, first: int) -> list[Message]:
    """Ring reduce-scatter from step `first` on: member i ends with block i + 1."""
    n = len(members)
    return [Message(first + s, members[i], members[(i + 1) % n], blocks[(i - s) % n], True) for s in range(n - 1) for i in range(n)]


def _gather(members: Sequence[int], blocks: Blocks, first: int) -> list[Message]:
    """Ring all-gather from step `first` on: member i begins with block i + 1."""
    n = len(members)
    return [Message(first + s, members[i], members[(i + 1) % n], blocks[(i + 1 - s) % n], False) for s in range(n - 1) for i in range(n)]


MAKERS: dict[str, Callable[[int], Schedule]] = {"ring": ring, "tree": tree, "one-shot": one_shot, "two-shot": two_shot}


def make(name: str, nodes: int, per_node: int) -> Schedule:
    """The schedule of that name for all ranks of the nodes. Raises ConfigError for fewer than 2 or more than 1024 ranks."""
    within("ranks", nodes * per_node, 2, 1024)
    return hierarchical(nodes, per_node) if name == "hierarchical" else MAKERS[name](nodes * per_node)


def picture(schedule: Schedule) -> str:
    """Ranks from left to right, steps from top to bottom; an arrow for each message, in its first chunk's colour."""
    apart, tall, left, top = 110.0, 46.0, 90.0, 84.0
    canvas = Canvas(
        max(540, left + apart * (schedule.ranks - 1) + 60),
        top + tall * schedule.steps + 40,
        f"All-reduce: {schedule.name}, {schedule.ranks} ranks",
    )
    for rank in range(schedule.ranks):
        x = left + apart * rank
        canvas.text(x, top - 24, f"rank {rank}", anchor="middle", kind="b")
        canvas.line(x, top - 14, x, top + tall * schedule.steps, kind="a")
    for message in schedule.messages:
        y, rightwards = top + tall * message.step, message.target > message.source
        start, end = left + apart * message.source, left + apart * message.target
        colour = COLOURS[message.chunks[0] % len(COLOURS)]
        canvas.arrow(start, y, end, y + tall * 0.62, colour, dashed=not message.adds)
        shift = 0.25 if rightwards else 0.1  # near the sender, where arrows of other ranks do not cross
        canvas.text(
            start + (end - start) * shift, y + tall * 0.62 * shift - 5, ",".join(map(str, message.chunks)), anchor="middle", kind="s"
        )
    for step in range(schedule.steps):
        canvas.text(12, top + tall * (step + 0.4), f"step {step + 1}", kind="s")
    canvas.text(
        12, canvas.height - 14, "The number is the part that is sent. Solid: added to the receiver's. Dashed: the finished sum.", kind="s"
    )
    return canvas.svg()
