"""How many bytes a weight takes once it is packed for the CPU kernels. Pure arithmetic, no torch: the planner asks too.

The layout is csrc/packed.h's: panels of 64 outputs, each atom of the input dim filled up to a whole granule.
"""

from __future__ import annotations

from collections.abc import Sequence

PANEL = 64


def packed_bytes(outputs: int, atoms: Sequence[int], itemsize: int, *, gated: bool = False, granule: int = 1, scaled: bool = False) -> int:
    """Bytes of a packed weight of `outputs` rows whose input dim is cut into atoms of these lengths.

    gated: two halves of `outputs` interleaved in runs of 32. granule: 2 where bfloat16 or int8 is stored (32 with AMX), else 1.
    scaled: int8 with a float32 scale for each output.
    """
    depth = sum(-(-length // granule) * granule for length in atoms)
    panels = -(-(outputs // 2) // (PANEL // 2)) if gated else -(-outputs // PANEL)
    return panels * PANEL * depth * itemsize + (4 * outputs if scaled else 0)
