"""Two recorded runs, bit against bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[int, int]  # (request, position)


@dataclass
class Run:
    """What one engine computed for all requests. layers: per rank, its layers' numbers and each position's digests.

    Without digests only logits were recorded. Without logits nobody recorded, and the engine chose tokens the short way.
    """

    tp: int
    threads: int
    chunk: int
    batch: int
    cached: bool
    seconds: float
    tokens: list[list[int]] = field(default_factory=list)  # by request, those chosen
    pp: int = 1
    logits: dict[Key, Any] = field(default_factory=dict)
    layers: list[tuple[tuple[int, ...], dict[Key, Any]]] = field(default_factory=list)

    def read(self, path: Path) -> Run:
        """Add what the ranks saved at `path`, and remove it."""
        import numpy as np
        import torch

        for file in sorted(path.parent.glob(f"{path.name}-rank*.npz")):
            with np.load(file) as saved:
                for key, row in zip(saved["logit_keys"].tolist(), saved["logits"], strict=True):
                    self.logits[tuple(key)] = torch.from_numpy(row)
                digests = dict(zip(map(tuple, saved["layer_keys"].tolist()), saved["digests"], strict=True))
                self.layers.append((tuple(saved["layer_numbers"].tolist()), digests))
            file.unlink()
        assert self.logits and self.layers, f"no rank saved anything at {path}"
        return self

    @property
    def name(self) -> str:
        together = f"{self.batch} requests together" if self.batch > 1 else "requests alone"
        pp = f" PP={self.pp}" if self.pp > 1 else ""
        cached = ", prompts cached" if self.cached else ""
        return f"TP={self.tp}{pp}, {self.threads} thread(s), {self.chunk} tokens a step, {together}{cached}"

    def row(self) -> str:
        """The run's line of the table, but for the verdict."""
        positions = (len(self.layers[0][1]) or "-") if self.layers else "tokens"
        how = "together" if self.batch > 1 else "alone"
        return (
            f"{self.tp:>3} {self.pp:>3} {self.threads:>7} {self.chunk:>6} {how:>9} {'hits' if self.cached else '-':>6}"
            f" {positions:>10} {len(self.logits) or 'only':>7} {self.seconds:>8.1f}"
        )


@dataclass(frozen=True)
class Difference:
    """Where two runs part. layer: the first whose output differs there, None: `what` does, and no layer."""

    request: int
    position: int
    layer: int | None
    rank: int
    detail: str
    what: str = "the logits"

    def __str__(self) -> str:
        where = self.what if self.layer is None else f"layer {self.layer} on rank {self.rank}"
        return f"request {self.request}, position {self.position}, first in {where}{self.detail}"


def compare(reference: Run, other: Run) -> Difference | None:
    """The first difference in position order, None when every bit agrees. Asserts that both hold the same positions' logits.

    A run compared with itself tells whether its ranks agree.
    """
    found = [*_in_layers(reference, other), *_in_logits(reference, other), *_in_tokens(reference, other)]
    assert found or not other.logits or reference.logits.keys() == other.logits.keys(), "the runs sampled different positions"
    return min(found, key=lambda d: (d.position, d.layer if d.layer is not None else 1 << 30), default=None)


def _in_layers(reference: Run, other: Run) -> list[Difference]:
    """For each rank of `other`, its first differing position and layer. Positions that a cache hit left out are not compared."""
    known: dict[Key, dict[int, int]] = {}
    for numbers, digests in reference.layers:
        for key, row in digests.items():
            known.setdefault(key, {}).update(zip(numbers, row.tolist(), strict=True))
    found = []
    for rank, (numbers, digests) in enumerate(other.layers):
        for key in sorted(digests.keys() & known.keys(), key=lambda k: k[1]):
            differing = [n for n, d in zip(numbers, digests[key].tolist(), strict=True) if known[key].get(n) != d]
            if differing:
                found.append(Difference(*key, differing[0], rank, ""))
                break
    return found


def _in_logits(reference: Run, other: Run) -> list[Difference]:
    import torch

    for key in sorted(reference.logits.keys() & other.logits.keys(), key=lambda k: k[1]):
        ours, theirs = reference.logits[key], other.logits[key]
        if not torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):  # as bits: NaN is not equal to itself
            gap = (ours - theirs).abs()
            count = int((ours.view(torch.int32) != theirs.view(torch.int32)).sum())
            return [Difference(*key, None, 0, f": {count} of {ours.numel()} logits, by up to {gap.max().item():.3g}")]
    return []


def _in_tokens(reference: Run, other: Run) -> list[Difference]:
    for request, (ours, theirs) in enumerate(zip(reference.tokens, other.tokens, strict=True)):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                return [Difference(request, number, None, 0, f": number {number} is {b}, not {a}", "the tokens chosen")]
    return []
