"""Watches a call: which memory it makes, which kernels it launches, and on which places of which memory.

:mod:`.recorded` makes of it what later calls of the same kind do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch, load

aten = torch.ops.aten
FRESH = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}
ZEROS = {aten.zeros.default}
ALIGNMENT = 512  # bytes: what torch's allocator gives on a GPU


class Memory:
    """A block of memory that a call was given, or made: ``start`` to ``stop``, and the launches that used it."""

    def __init__(self, tensor: Tensor, zeroed: bool = False) -> None:
        sides = zip(tensor.shape, tensor.stride(), strict=True)
        extent = sum((size - 1) * stride for size, stride in sides) + 1 if tensor.numel() else 0
        self.start = tensor.data_ptr()
        self.stop = self.start + extent * tensor.element_size()
        self.tensor, self.zeroed = tensor, zeroed  # held, so that no other memory comes to lie there meanwhile
        self.first = self.last = -1

    @property
    def size(self) -> int:
        return self.stop - self.start

    def used(self, index: int) -> None:
        """By launch ``index``."""
        self.first, self.last = index if self.first < 0 else self.first, index

    def is_storage_of(self, tensor: Tensor) -> bool:
        return self.tensor.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    def overlaps(self, other: Memory) -> bool:
        return self.start < other.stop and other.start < self.stop


class Place(NamedTuple):
    """Where an argument of a kernel points: so many bytes into a block of memory."""

    memory: Memory
    offset: int


class Box(NamedTuple):
    """A tensor descriptor there, Triton's or Gluon's, and what makes another for an address."""

    place: Place
    make: Callable[[int, torch.dtype, torch.Size, tuple[int, ...]], object]
    dtype: torch.dtype
    shape: torch.Size
    block: tuple[int, ...]


class Launched(NamedTuple):
    """A launch, and what its tensors were."""

    compiled: launch.Compiled
    grid: tuple[int, ...]
    arguments: list[Place | Box | None]


class Recorder(TorchDispatchMode):
    """Watches a call. ``reason`` says why it cannot be recorded; such a call is done all the same.

    Launches come by :func:`.launch.start`. Triton's hook counts those that Triton does itself, so that a launch past it
    is noticed.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = [Memory(tensor) for tensor in tensors]
        self.made: list[Memory] = []
        self.launches: list[Launched] = []
        self.counters: Memory | None = None
        self.counted = 0
        self.reason: str | None = None
        self.thread, self.by_triton, self.expected = threading.get_ident(), 0, 0

    def __enter__(self) -> Recorder:
        launch.knobs.runtime.launch_enter_hook.add(self.counts)
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        launch.knobs.runtime.launch_enter_hook.remove(self.counts)
        if self.by_triton != self.expected:
            self.refuse("it launches past launch.start")

    def counts(self, metadata: object) -> None:
        self.by_triton += threading.get_ident() == self.thread

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in FRESH or func in ZEROS:
            self.made.append(Memory(out, func in ZEROS))
        elif not func.is_view:
            self.refuse(f"it calls {func}")
        return out

    def takes_counters(self, tensor: Tensor, count: int) -> None:
        """Of :func:`.launch.zeroed`, whose every launch leaves them zero, so that all of a call share them."""
        if self.counters is None or self.counters.start != tensor.data_ptr():
            self.counters = Memory(tensor)
        self.counted = max(self.counted, count)

    def launched(
        self, compiled: launch.Compiled, was_known: bool, grid: tuple[int, ...], tensors: Sequence[object]
    ) -> None:
        """Of :func:`.launch.start`, which leaves a kernel that it does not know yet to Triton."""
        self.expected += not was_known
        arguments: list[Place | Box | None] = []
        for tensor in tensors:
            if tensor is None:
                arguments.append(None)
            elif hasattr(tensor, "block_shape"):
                place = self.place(tensor.base.data_ptr())
                make = launch.described_at if type(tensor) is TensorDescriptor else load("gluon.ring").box_at
                shape, block = torch.Size(tensor.shape), tuple(tensor.block_shape)
                arguments.append(Box(place, make, tensor.base.dtype, shape, block))
            else:
                arguments.append(self.place(tensor.data_ptr()))
        self.launches.append(Launched(compiled, grid, arguments))

    def place(self, address: int) -> Place | None:
        counters = [] if self.counters is None else [self.counters]
        for memory in (*counters, *self.given, *self.made):
            if memory.start <= address < memory.stop:
                memory.used(len(self.launches))
                return Place(memory, address - memory.start)
        self.refuse("it launches on memory that it was not given and did not make")
        return None

    def share_memory(self) -> bool:
        """Whether arguments lie in one another's memory, so that nobody can tell which of them a kernel was given."""
        return any(a.overlaps(b) for i, a in enumerate(self.given) for b in self.given[:i])


def packed(memories: Sequence[Memory]) -> tuple[int, dict[int, int]]:
    """Bytes of one block for ``memories``, and where in it each lies. Those that are never in use together may share.

    Launches run one after the other, so memory is free again after the last launch that uses it.
    """
    offsets: dict[int, int] = {}
    total, placed = 0, []
    for memory in sorted(memories, key=lambda m: -m.size):
        at = 0
        for start, stop, other in sorted(placed, key=lambda p: p[0]):
            together = memory.first <= other.last and other.first <= memory.last
            if together and at < stop and start < at + memory.size:
                at = stop
        stop = at + -(-memory.size // ALIGNMENT) * ALIGNMENT
        placed.append((at, stop, memory))
        offsets[id(memory)], total = at, max(total, stop)
    return total, offsets
