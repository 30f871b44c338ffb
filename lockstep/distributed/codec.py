"""Objects on the wire: msgpack with a few typed extensions, never pickle.

What goes in comes out with the same types: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset,
torch dtype / device / Size, TensorMetadata, CPU tensors and numpy arrays (as raw bytes). Anything else is a TypeError
before a byte is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor


class TensorMetadata(NamedTuple):
    """What a receiver needs to allocate a tensor. `device` is the type only ("cpu", "cuda"): the index is the receiver's own."""

    device: str
    dtype: torch.dtype
    size: torch.Size


class Nested(list[Any]):
    """The (key, metadata or value) pairs of a dict inside a tensor dict."""


_TUPLE, _SET, _FROZENSET, _DTYPE, _DEVICE, _SIZE, _TENSOR, _METADATA, _INT, _DICT, _COMPLEX, _ARRAY, _NESTED = range(1, 14)
_PLAIN = (type(None), bool, float, str, bytes)
_encoder = msgspec.msgpack.Encoder()


def encode(obj: Any) -> bytes:
    """`obj` as bytes. Raises TypeError naming the place and the type of what cannot be sent."""
    return _encoder.encode(_pack(obj, "object"))


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The object that `encode` was given. Raises msgspec.DecodeError when `data` is not one."""
    return _decoder.decode(data)


def _pack(obj: Any, where: str) -> Any:
    kind = type(obj)
    if kind in _PLAIN:
        return obj
    if kind is int:
        return obj if -(2**63) <= obj < 2**63 else msgspec.msgpack.Ext(_INT, str(obj).encode())
    if kind is list:
        return [_pack(item, f"{where}[{i}]") for i, item in enumerate(obj)]
    if kind is dict:
        if all(type(key) is str for key in obj):
            return {key: _pack(value, f"{where}[{key!r}]") for key, value in obj.items()}
        pairs = [[_pack(key, f"{where} key"), _pack(value, f"{where}[{key!r}]")] for key, value in obj.items()]
        return msgspec.msgpack.Ext(_DICT, _encoder.encode(pairs))
    if isinstance(obj, Tensor):
        return _ext(_TENSOR, _tensor_parts(obj, where))
    packer = _PACKERS.get(kind)
    if packer is None:
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot cross processes: send plain data "
            "(numbers, text, bytes, lists, tuples, dicts, sets) or CPU tensors."
        )
    code, parts = packer
    return _ext(code, [_pack(part, where) for part in parts(obj)])


def _ext(code: int, parts: list[Any]) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, _encoder.encode(parts))


def _tensor_parts(x: Tensor, where: str) -> list[Any]:
    if x.device.type != "cpu" or x.layout != torch.strided:
        raise TypeError(f"{where} is a {x.layout} tensor on {x.device}: only dense CPU tensors go inside an object; use a tensor dict.")
    flat = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return [_dtype_name(x.dtype), list(x.shape), flat.numpy().tobytes()]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise msgspec.DecodeError(f"{name!r} is not a dtype")
    return found


def _array(name: str, shape: list[int], data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(data), dtype=np.dtype(name)).reshape(shape)


def _tensor(name: str, shape: list[int], data: bytes) -> Tensor:
    dtype = _dtype(name)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


_PACKERS: dict[type, tuple[int, Callable[[Any], list[Any]]]] = {
    tuple: (_TUPLE, list),
    set: (_SET, list),
    frozenset: (_FROZENSET, list),
    torch.dtype: (_DTYPE, lambda x: [_dtype_name(x)]),
    torch.device: (_DEVICE, lambda x: [str(x)]),
    torch.Size: (_SIZE, list),
    TensorMetadata: (_METADATA, lambda x: [x.device, _dtype_name(x.dtype), list(x.size)]),
    complex: (_COMPLEX, lambda x: [x.real, x.imag]),
    np.ndarray: (_ARRAY, lambda x: [x.dtype.str, list(x.shape), np.ascontiguousarray(x).tobytes()]),
    Nested: (_NESTED, list),
}
_UNPACKERS: dict[int, Callable[[list[Any]], Any]] = {
    _TUPLE: tuple,
    _SET: set,
    _FROZENSET: frozenset,
    _DTYPE: lambda parts: _dtype(parts[0]),
    _DEVICE: lambda parts: torch.device(parts[0]),
    _SIZE: torch.Size,
    _METADATA: lambda parts: TensorMetadata(parts[0], _dtype(parts[1]), torch.Size(parts[2])),
    _COMPLEX: lambda parts: complex(*parts),
    _ARRAY: lambda parts: _array(*parts),
    _TENSOR: lambda parts: _tensor(*parts),
    _NESTED: Nested,
    _DICT: lambda pairs: dict(map(tuple, pairs)),
}


def _unpack(code: int, data: memoryview) -> Any:
    if code == _INT:
        return int(bytes(data))
    if code not in _UNPACKERS:
        raise msgspec.DecodeError(f"unknown extension {code}")
    return _UNPACKERS[code](_decoder.decode(data))


_decoder = msgspec.msgpack.Decoder(ext_hook=_unpack)
