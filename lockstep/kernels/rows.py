"""Choices from rows of logits: the kernels where they are, torch and numpy elsewhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lockstep.kernels.library import library
from lockstep.kernels.reference import sampling

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def row_argmax(logits: Tensor) -> Tensor:
    """The most likely token of each row of `logits [rows, vocab]`, `[rows]` int64; the lowest id where several are."""
    return row_largest(logits)[1]


def row_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As row_argmax, and before it the logits of these tokens, `[rows]` float32."""
    lib = library() if logits.device.type == "cpu" else None
    if lib is None or logits.dtype != torch.float32 or logits.stride(1) != 1:
        if logits.device.type == "cpu":  # numpy's is vectorised, torch's is not
            ids = torch.from_numpy(logits.float().numpy().argmax(axis=1))
        else:
            ids = logits.argmax(dim=-1)
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float(), ids
    rows, vocab = logits.shape
    values, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    lib.argmax_rows(logits.data_ptr(), rows, vocab, logits.stride(0), ids.data_ptr(), values.data_ptr())
    return values, ids


def draw(logits: F32, u: F64, *, temperature: F64, min_p: F64, top_k: I64, top_p: F64) -> I64:
    """One token per row of `logits [rows, vocab]`; the others are `[rows]`. See `reference.sampling.draw`."""
    lib = library()
    if lib is None:
        return sampling.draw(logits, u, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    if logits.strides[1] != logits.itemsize:
        logits = np.ascontiguousarray(logits)
    ids = np.empty(len(logits), np.int64)
    # Named, so that they live through the call.
    columns = [np.ascontiguousarray(a, np.float64) for a in (u, temperature, min_p)]
    k, p = np.ascontiguousarray(top_k, np.int64), np.ascontiguousarray(top_p, np.float64)
    lib.draw_rows(
        logits.ctypes.data, *logits.shape, logits.strides[0] // logits.itemsize, *(a.ctypes.data for a in columns), k.ctypes.data,
        p.ctypes.data, ids.ctypes.data,
    )  # fmt: skip
    return ids


def logprobs(logits: Tensor, tokens: I64, count: int) -> tuple[F32, I64, I64, F32]:
    """See `reference.sampling.logprobs`."""
    lib = library()
    if lib is None or logits.device.type != "cpu" or logits.stride(1) != 1:
        return sampling.logprobs(logits, tokens, count)
    rows, tokens = len(tokens), np.ascontiguousarray(tokens)
    own, ranks = np.empty(rows, np.float32), np.empty(rows, np.int64)
    ids, values = np.empty((rows, count), np.int64), np.empty((rows, count), np.float32)
    found = (a.ctypes.data for a in (own, ranks, ids, values))
    lib.logprob_rows(logits.data_ptr(), rows, logits.shape[1], logits.stride(0), tokens.ctypes.data, count, *found)
    return own, ranks, ids, values
