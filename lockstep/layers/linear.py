"""Linear layers cut over the tensor-parallel group (Shoeybi et al. 2019, Megatron-LM, section 3).

A column-parallel layer cuts the output dim and needs no communication. A row-parallel layer cuts the input dim exactly
as the column layer feeding it was cut, and sums the partial outputs with one all-reduce. Weights are stored as torch
does: `[out, in]`. `units` says how many indivisible units (heads) the cut dim has; by default every column is one.

forward returns `(out, bias or None)`: with `skip_bias_add` the bias is handed back instead of added. With
`return_bias=False` it returns `out` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Unpack

from torch import Tensor, cat, split
from torch.nn import functional as F

from lockstep.config.errors import ConfigError
from lockstep.distributed.partition import Shard, atom_bounds, shards
from lockstep.distributed.reduction_tree import ReductionTree
from lockstep.kernels.packed import PackedLinear
from lockstep.kernels.reference.linear import int8_scale
from lockstep.layers.base import Piece, Place, ShardId, TensorParallelModule, gather_shards
from lockstep.utils import env


def cut_columns(size: int, units: int | None, tp_size: int, prefix: str = "") -> tuple[Shard, ...]:
    """The columns of each rank when `size` columns are `units` equally wide units. Raises ValueError if they are not."""
    units = size if units is None else units
    if units < 1 or size % units:
        raise ValueError(f"{prefix or 'a parallel layer'} has {size} columns, which cannot be {units} equal units.")
    return tuple(cut.scaled(size // units) for cut in shards(units, tp_size))


class LinearBase(TensorParallelModule):
    """Parameters and the bias convention that all linear layers share."""

    def __init__(
        self, input_size: int, output_size: int, bias: bool, skip_bias_add: bool, return_bias: bool, **place: Unpack[Place]
    ) -> None:
        super().__init__(**place)
        self.input_size = input_size
        self.output_size = output_size
        self.has_bias = bias
        self.skip_bias_add = skip_bias_add
        self.return_bias = return_bias
        self.packed: PackedLinear | None = None

    def pack(self, quantization: str | None = None) -> None:
        """Put the weight into the order in which the CPU kernels read it, and let go of the plain one.

        From then on `models.native` computes with `packed`; `forward` cannot. quantization: None or "int8" (one scale per
        output). Every rank must call it: scales of a layer whose input is cut are agreed on.
        """
        scale = self._int8_scale() if quantization == "int8" else None
        if scale is not None and not scale.isfinite().all():
            raise ConfigError(
                f"quantization='int8' cannot hold the weight of {self.prefix or type(self).__name__}: a row of it is not finite."
                " Use a checkpoint without infinities, or no quantization."
            )
        self.packed = self._packed(scale)
        self.weight.data = self.weight.data.new_empty(0)

    def _packed(self, scale: Tensor | None) -> PackedLinear:
        return PackedLinear(self.weight.data, scale=scale)

    def _int8_scale(self) -> Tensor:
        """Per output `[out]` float32."""
        return int8_scale(self.weight.data)

    def _allocate(self, rows: int, columns: int) -> None:
        """Make the local weight `[rows, columns]` and, if there is one, the bias `[rows]`."""
        self.weight = self._empty(rows, columns)
        if self.has_bias:
            self.bias = self._empty(rows)
        else:
            self.register_parameter("bias", None)

    def _fused_bias(self) -> Tensor | None:
        return None if self.skip_bias_add else self.bias

    def _result(self, out: Tensor) -> Any:
        if not self.return_bias:
            return out
        return out, (self.bias if self.skip_bias_add else None)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape if self.packed is None else self.packed.shape
        split = f"here {columns} -> {rows}, rank {self.tp_rank} of {self.tp_size}" if self.tp_size > 1 else "whole"
        return f"{self.input_size} -> {self.output_size}, bias={self.has_bias}, {split}"


class ReplicatedLinear(LinearBase):
    """The whole layer on every rank. `[..., input_size] -> [..., output_size]`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        skip_bias_add: bool = False,
        return_bias: bool = True,
        **place: Unpack[Place],
    ) -> None:
        super().__init__(input_size, output_size, bias, skip_bias_add, return_bias, **place)
        self._allocate(output_size, input_size)

    def forward(self, x: Tensor) -> Any:
        return self._result(F.linear(x, self.weight, self._fused_bias()))


class ColumnParallelLinear(LinearBase):
    """Each rank computes its own run of output columns. `[..., input_size] -> [..., output_size of this rank]`.

    With `gather_output` every rank gets all columns, at the price of an all-gather.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        return_bias: bool = True,
        units: int | None = None,
        **place: Unpack[Place],
    ) -> None:
        super().__init__(input_size, output_size, bias, skip_bias_add, return_bias, **place)
        self.gather_output = gather_output and self.tp_size > 1
        self.cuts = cut_columns(output_size, units, self.tp_size, self.prefix)
        self.shard = self.cuts[self.tp_rank]
        self._allocate(self.shard.size, input_size)

    def pieces(self, param: str, shard_id: ShardId = None) -> Piece:
        self._check_shard_id(param, shard_id)
        return self._rows(param, 0, self.shard, self.output_size)

    def _rows(self, param: str, dest_start: int, rows: Shard, full_rows: int) -> Piece:
        shape = (full_rows,) if param == "bias" else (full_rows, self.input_size)
        return Piece(0, dest_start, rows.start, rows.stop, shape)

    def forward(self, x: Tensor) -> Any:
        out = F.linear(x, self.weight, self._fused_bias())
        return self._result(self._gather(out) if self.gather_output else out)

    def _gather(self, out: Tensor) -> Tensor:
        return gather_shards(self.tp, out, self.cuts)

    def _result(self, out: Tensor) -> Any:
        if not self.return_bias:
            return out
        if not self.skip_bias_add or self.bias is None:
            return out, None
        return out, (self._gather(self.bias) if self.gather_output else self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of one input, computed in one product (gate and up projection).

    `output_sizes` are the full sizes; each is cut by itself, so a rank's output is `[its part of 0 | its part of 1 | ...]`.
    Shard ids are 0, 1, ... With `gather_output` the result is the full outputs one after the other.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        return_bias: bool = True,
        **place: Unpack[Place],
    ) -> None:
        LinearBase.__init__(self, input_size, sum(output_sizes), bias, skip_bias_add, return_bias, **place)
        self.gather_output = gather_output and self.tp_size > 1
        self.output_sizes = tuple(output_sizes)
        self.parts = tuple(cut_columns(size, None, self.tp_size, self.prefix) for size in self.output_sizes)
        self.part_sizes = tuple(cuts[self.tp_rank].size for cuts in self.parts)
        self._allocate(sum(self.part_sizes), input_size)

    def shard_ids(self, param: str) -> tuple[ShardId, ...]:
        return tuple(range(len(self.output_sizes)))

    def pieces(self, param: str, shard_id: ShardId = None) -> Piece:
        self._check_shard_id(param, shard_id)
        assert isinstance(shard_id, int)
        rows = self.parts[shard_id][self.tp_rank]
        return self._rows(param, sum(self.part_sizes[:shard_id]), rows, self.output_sizes[shard_id])

    def _packed(self, scale: Tensor | None) -> PackedLinear:
        """Two outputs are packed side by side, so that one operation can compute `act(gate) * up`."""
        return PackedLinear(self.weight.data, gated=len(self.output_sizes) == 2, scale=scale)

    def _gather(self, out: Tensor) -> Tensor:
        columns = split(out, list(self.part_sizes), dim=-1)
        return cat([gather_shards(self.tp, part.contiguous(), cuts) for part, cuts in zip(columns, self.parts, strict=True)], dim=-1)


class RowParallelLinear(LinearBase):
    """Each rank multiplies its own run of input columns; the partial outputs are summed by one all-reduce.

    `[..., input_size of this rank] -> [..., output_size]`; the whole input is taken, and cut here, with
    `input_is_parallel=False`. The bias is added once, after the sum. With `reduce_results=False` the partial output is
    returned, and a bias that would be added to it is refused: it would count once per rank.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        reduce_results: bool = True,
        return_bias: bool = True,
        units: int | None = None,
        **place: Unpack[Place],
    ) -> None:
        if bias and not reduce_results and not skip_bias_add:
            raise ValueError(
                "When not reduce the results, adding bias to the results can lead to incorrect results:"
                " set reduce_results=True, skip_bias_add=True or bias=False."
            )
        super().__init__(input_size, output_size, bias, skip_bias_add, return_bias, **place)
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        self.cuts = cut_columns(input_size, units, self.tp_size, self.prefix)
        self.shard = self.cuts[self.tp_rank]
        self.units = input_size if units is None else units
        self._allocate(output_size, self.shard.size)

    @cached_property
    def _atoms(self) -> tuple[int, ...]:
        """The borders of the atoms in which the input dim is summed, in columns of the whole layer."""
        if env.loose_atoms():
            return (0, *(cut.stop for cut in self.cuts))
        return tuple(bound * (self.input_size // self.units) for bound in atom_bounds(self.units, self.tp_size))

    @cached_property
    def tree(self) -> ReductionTree:
        """How the ranks' partial sums are combined."""
        runs = [(self._atoms.index(cut.start), self._atoms.index(cut.stop)) for cut in self.cuts]
        return ReductionTree.of(len(self._atoms) - 1, runs)

    def _packed(self, scale: Tensor | None) -> PackedLinear:
        first, stop = self._atoms.index(self.shard.start), self._atoms.index(self.shard.stop)
        bounds = [bound - self.shard.start for bound in self._atoms[first : stop + 1]]
        return PackedLinear(self.weight.data, bounds=bounds, first=first, total=len(self._atoms) - 1, scale=scale)

    def _int8_scale(self) -> Tensor:
        scale = super()._int8_scale()
        return scale if self.tp_size == 1 else self.tp.all_gather(scale.unsqueeze(0), dim=0).amax(dim=0)

    def pieces(self, param: str, shard_id: ShardId = None) -> Piece:
        if param == "bias":
            return super().pieces(param, shard_id)
        self._check_shard_id(param, shard_id)
        return Piece(1, 0, self.shard.start, self.shard.stop, (self.output_size, self.input_size))

    def forward(self, x: Tensor) -> Any:
        if self.tp_size == 1:
            return self._result(F.linear(x, self.weight, self._fused_bias()))
        if not self.input_is_parallel:
            x = x.narrow(-1, self.shard.start, self.shard.size)
        out = F.linear(x, self.weight)
        if self.reduce_results:
            self.tp.all_reduce_(out)
            if self.bias is not None and not self.skip_bias_add:
                out += self.bias
        return self._result(out)
