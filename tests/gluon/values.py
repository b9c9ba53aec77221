"""Scalars, tensors in registers, and device memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from .faults import Fault, line


class DType:
    """An element's type: what carries it in NumPy, its bytes in memory, and how values are rounded to it."""

    def __init__(self, name: str, carrier: type, itemsize: int, half: torch.dtype | None = None) -> None:
        self.name, self.carrier, self.itemsize, self.half = name, carrier, itemsize, half
        self.element_ty = self  # of a pointer to it

    def cast(self, a: object) -> np.ndarray:
        a = np.asarray(a).astype(self.carrier)
        return a if self.half is None else torch.from_numpy(a).to(self.half).float().numpy()


DTYPES = {
    "int1": DType("int1", np.bool_, 1),
    "int32": DType("int32", np.int32, 4),
    "int64": DType("int64", np.int64, 8),
    "float32": DType("float32", np.float32, 4),
    "bfloat16": DType("bfloat16", np.float32, 2, torch.bfloat16),
    "float16": DType("float16", np.float32, 2, torch.float16),
}


def quotient(a, b):
    """Division of integers, which truncates."""
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


def remainder(a, b):
    return a - b * quotient(a, b)


def _int_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _int_remainder(a: int, b: int) -> int:
    return a - b * _int_quotient(a, b)


class Int(int):
    """A 32-bit integer scalar; what it becomes may not leave its bits."""

    BITS = 32

    def to(self, dtype: DType) -> Int | float:
        if dtype.carrier is np.float32:
            return float(self)
        return Int64(self) if dtype.name == "int64" else fitting(self, Int)


class Int64(Int):
    BITS = 64


def fitting(value: int, kind: type[Int]) -> Int:
    if not -(1 << kind.BITS - 1) <= value < 1 << kind.BITS - 1:
        raise Fault(f"{line()}: int{kind.BITS} overflows: {value}")
    return kind(value)


def _of_ints(function: Callable[[int, int], int], turned: bool) -> Callable:
    def method(self: Int, other: object) -> Int:
        if not isinstance(other, int):
            return NotImplemented
        a, b = (int(other), int(self)) if turned else (int(self), int(other))
        return fitting(function(a, b), Int64 if Int64 in (type(self), type(other)) else Int)

    return method


class Tensor:
    """A tensor in registers."""

    __hash__ = None

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def __getitem__(self, key: object) -> Tensor:
        return Tensor(self.data[key])

    def to(self, dtype: DType) -> Tensor:
        return Tensor(dtype.cast(self.data))


def raw(value: object) -> object:
    """Without its wrapping."""
    return value.data if isinstance(value, Tensor) else value


def combine(a: object, b: object, function: Callable) -> Tensor:
    """``function`` of two values of which one is a tensor. Integers may not overflow, ranks must be alike."""
    a, b = (np.int64(v) if isinstance(v, Int64) else int(v) if isinstance(v, Int) else v for v in (raw(a), raw(b)))
    if 0 != np.ndim(a) != np.ndim(b) != 0:
        raise Fault(f"{line()}: ranks {np.ndim(a)} and {np.ndim(b)} do not go together")
    kind = np.result_type(a, b)  # a scalar takes the tensor's type, but for one of 64 bits
    if kind.kind != "i":
        return Tensor(np.asarray(function(a, b)))
    found = np.asarray(function(np.asarray(a, np.int64), np.asarray(b, np.int64)))
    if found.dtype == bool:
        return Tensor(found)
    narrow = found.astype(kind)
    if np.any(narrow != found):
        raise Fault(f"{line()}: {kind} overflows: {found[narrow != found].flat[0]}")
    return Tensor(narrow)


def _of_tensors(function: Callable, turned: bool) -> Callable:
    def method(self: Tensor, other: object) -> Tensor:
        if isinstance(other, Pointer):
            return NotImplemented
        return combine(other, self, function) if turned else combine(self, other, function)

    return method


_ARITHMETIC = {name.rstrip("_"): getattr(operator, name) for name in "add sub mul and_ or_ xor lshift rshift".split()}
for _name, _function in _ARITHMETIC.items() | {"floordiv": _int_quotient, "mod": _int_remainder}.items():
    for _prefix in ("", "r"):
        setattr(Int, f"__{_prefix}{_name}__", _of_ints(_function, bool(_prefix)))
for _name in ("truediv", "lt", "le", "gt", "ge", "eq", "ne"):
    _ARITHMETIC[_name] = getattr(operator, _name)
for _name, _function in _ARITHMETIC.items() | {"floordiv": quotient, "mod": remainder}.items():
    for _prefix in ("", "r"):
        setattr(Tensor, f"__{_prefix}{_name}__", _of_tensors(_function, bool(_prefix)))


class Memory:
    """Device memory of one tensor, and how often each element was stored."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.dtype = DTYPES[dtype]
        self.data = np.ascontiguousarray(self.dtype.cast(array))
        self.flat = self.data.reshape(-1)
        self.stores = np.zeros(self.flat.size, np.int64)


class Pointer:
    """Places in a memory."""

    def __init__(self, memory: Memory, at: object = 0) -> None:
        self.memory, self.at, self.dtype = memory, at, memory.dtype

    def __add__(self, steps: object) -> Pointer:
        at = raw(steps)
        return Pointer(self.memory, self.at + (int(at) if isinstance(at, int) else at.astype(np.int64)))

    __radd__ = __add__

    def cells(self, mask: object, value: object = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where to read or write, which of them, and ``value`` there."""
        mask = True if mask is None else raw(mask)
        at, mask, value = np.broadcast_arrays(np.asarray(self.at), mask, raw(value))
        if np.any(mask & ((at < 0) | (at >= self.memory.flat.size))):
            raise Fault(f"{line()}: outside of a memory of {self.memory.flat.size} elements")
        return np.where(mask, at, 0), mask, value
