"""What a message costs: latency plus bytes over bandwidth, in exact fractions."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from lockstep.planner.hardware import Link


@dataclass(frozen=True)
class Line:
    """Seconds of a collective as a straight line in its bytes: fixed_s + per_byte_s * S."""

    fixed_s: Fraction
    per_byte_s: Fraction

    def seconds(self, size_bytes: int | Fraction) -> Fraction:
        return self.fixed_s + self.per_byte_s * size_bytes

    @property
    def balance_bytes(self) -> Fraction:
        """The size at which latency and bandwidth cost the same: below it latency is the most of the cost, above it bandwidth."""
        return self.fixed_s / self.per_byte_s

    def crossover_bytes(self, other: Line) -> Fraction | None:
        """The size at which both cost the same, or None when one is never dearer than the other."""
        if self.per_byte_s == other.per_byte_s:
            return None
        size = (other.fixed_s - self.fixed_s) / (self.per_byte_s - other.per_byte_s)
        return size if size > 0 else None


@dataclass(frozen=True)
class Wire:
    """A link without a knee, exactly: launch_s once for a collective, step_s for each step of messages, bytes per second."""

    launch_s: Fraction
    step_s: Fraction
    bandwidth: Fraction

    @classmethod
    def of(cls, link: Link) -> Wire:
        """The planner's link, by the decimal numbers that were written for it; its knee is left out."""
        return cls(*(Fraction(repr(value)) for value in (link.launch_s, link.step_s, link.bandwidth)))

    def p2p(self) -> Line:
        """One message."""
        return Line(self.launch_s + self.step_s, 1 / self.bandwidth)


def ring_line(n: int, wire: Wire) -> Line:
    """launch + 2(n-1) steps, and 2(n-1)/n of the bytes."""
    return Line(wire.launch_s + 2 * (n - 1) * wire.step_s, Fraction(2 * (n - 1), n) / wire.bandwidth)


def tree_line(n: int, wire: Wire) -> Line:
    """launch + 2 ceil(log2 n) steps, each with all the bytes."""
    steps = 2 * (n - 1).bit_length()
    return Line(wire.launch_s + steps * wire.step_s, steps / wire.bandwidth)


def one_shot_line(n: int, wire: Wire) -> Line:
    """launch + 1 step, and n-1 times the bytes."""
    return Line(wire.launch_s + wire.step_s, (n - 1) / wire.bandwidth)


def two_shot_line(n: int, wire: Wire) -> Line:
    """launch + 2 steps, and 2(n-1)/n of the bytes."""
    return Line(wire.launch_s + 2 * wire.step_s, Fraction(2 * (n - 1), n) / wire.bandwidth)


def hierarchical_line(nodes: int, per_node: int, inside: Wire, between: Wire) -> Line:
    """2(r-1) steps inside with 2(r-1)/r of the bytes, 2(g-1) steps between with 2(g-1)/g of one r-th of them; the dearer launch."""
    r, g = per_node, nodes
    used = [wire for wire, count in ((inside, r), (between, g)) if count > 1]
    fixed = max(wire.launch_s for wire in used) + 2 * (r - 1) * inside.step_s + 2 * (g - 1) * between.step_s
    return Line(fixed, Fraction(2 * (r - 1), r) / inside.bandwidth + Fraction(2 * (g - 1), g * r) / between.bandwidth)


def tree_over_nodes_line(nodes: int, per_node: int, inside: Wire, between: Wire) -> Line:
    """A tree whose lower levels stay in a node: per_node must be a power of two."""
    low, high = 2 * (per_node - 1).bit_length(), 2 * (nodes - 1).bit_length()
    fixed = max(inside.launch_s, between.launch_s) + low * inside.step_s + high * between.step_s
    return Line(fixed, low / inside.bandwidth + high / between.bandwidth)


def lines(nodes: int, per_node: int, inside: Wire, between: Wire) -> dict[str, Line]:
    """Every algorithm over all ranks of the nodes, by name. `between` must be no faster than `inside`.

    A ring over several nodes has a message between nodes in every step, so each of its steps costs what that one does.
    """
    n = nodes * per_node
    if nodes == 1:
        return {
            f: make(n, inside)
            for f, make in (("ring", ring_line), ("tree", tree_line), ("one-shot", one_shot_line), ("two-shot", two_shot_line))
        }
    found = {"ring": ring_line(n, between)}
    if per_node & (per_node - 1) == 0:
        found["tree"] = tree_over_nodes_line(nodes, per_node, inside, between)
    if per_node > 1:
        found["hierarchical"] = hierarchical_line(nodes, per_node, inside, between)
    return found
