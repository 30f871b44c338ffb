"""The least time of a step: bytes that memory must deliver, operations that must be done.

The worked examples of "How to scale your model" (jax-ml/scaling-book, inference) come out of these two functions.
"""

from __future__ import annotations


def weights_s(tokens: float, weight_bytes: float, parameters: float, bandwidth: float, flops: float) -> float:
    """Reading the weights once, or multiplying every parameter with each of `tokens`: whichever lasts longer."""
    return max(weight_bytes / bandwidth, 2 * parameters * tokens / flops)


def decode_step_s(batch: int, weight_bytes: float, kv_bytes: float, bandwidth: float, parameters: float = 0.0, flops: float = 1.0) -> float:
    """One token for each of `batch` sequences: every sequence's `kv_bytes` are read, and the weights once for all of them.

    bandwidth, flops: of all devices together. Without `parameters` the weights are taken as bound by memory.
    """
    return batch * kv_bytes / bandwidth + weights_s(batch, weight_bytes, parameters, bandwidth, flops)


def critical_batch(bandwidth: float, flops: float, bytes_per_parameter: float = 2.0) -> float:
    """The batch at which multiplying takes as long as reading the weights; below it a bigger batch is free of charge."""
    return flops * bytes_per_parameter / (2 * bandwidth)
