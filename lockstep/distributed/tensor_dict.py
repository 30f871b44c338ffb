"""Taking dicts of tensors apart for the wire and putting them together again.

A dict becomes a list of (key, TensorMetadata or value) and the list of its tensors, in order; dicts inside become `Nested`
lists. The receiver allocates from the metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lockstep.distributed.codec import Nested, TensorMetadata

MetadataList = list[tuple[Any, Any]]


def _split_tensor_dict(tensor_dict: dict[Any, Any]) -> tuple[MetadataList, list[Tensor]]:
    """-> (metadata list, tensors), both in insertion order. Tensors come out contiguous."""
    metadata: MetadataList = []
    tensors: list[Tensor] = []
    for key, value in tensor_dict.items():
        if isinstance(value, Tensor):
            # Contiguous before the metadata goes out: a failure later would leave the receiver waiting.
            dense = value.detach().contiguous()
            metadata.append((key, TensorMetadata(dense.device.type, dense.dtype, dense.size())))
            tensors.append(dense)
        elif isinstance(value, dict):
            inner, inner_tensors = _split_tensor_dict(value)
            metadata.append((key, Nested(inner)))
            tensors.extend(inner_tensors)
        else:
            metadata.append((key, value))
    return metadata, tensors


def join_tensor_dict(metadata: MetadataList, tensors: Iterator[Tensor]) -> dict[Any, Any]:
    """The dict that was taken apart, with `tensors` (in order) in the places of the metadata."""
    joined: dict[Any, Any] = {}
    for key, value in metadata:
        if isinstance(value, TensorMetadata):
            joined[key] = next(tensors)
        elif isinstance(value, Nested):
            joined[key] = join_tensor_dict(value, tensors)
        else:
            joined[key] = value
    return joined


def tensor_keys(metadata: MetadataList, prefix: str = "") -> Iterator[tuple[str, TensorMetadata]]:
    """Every tensor's key and metadata, in order; keys of inner dicts as "outer.inner"."""
    for key, value in metadata:
        if isinstance(value, TensorMetadata):
            yield f"{prefix}{key}", value
        elif isinstance(value, Nested):
            yield from tensor_keys(value, f"{prefix}{key}.")


def allocate(metadata: TensorMetadata, device: torch.device) -> Tensor:
    """An empty tensor as described, on the receiver's own `device` of that type (the CPU for "cpu")."""
    where = device if metadata.device == device.type else torch.device(metadata.device)
    return torch.empty(metadata.size, dtype=metadata.dtype, device=where)
