"""Memory given back to the system by a rank that sleeps."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Sequence

import torch

_PAGE = mmap.PAGESIZE
_MADV_DONTNEED = 4


def forget_contents(tensors: Sequence[torch.Tensor]) -> None:
    """Give the tensors' pages back; the tensors stay where they are, hold nothing of worth, and take pages anew as they are written.

    On CPU only, where the system can do that: the compute kernels hold the tensors' addresses, which in this way stay right.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        past = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        if past > first:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(past - first), _MADV_DONTNEED)


def collect(device: torch.device) -> None:
    """Free what nobody holds any more, and hand it to the system."""
    gc.unfreeze()  # ranks freeze what they loaded
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
