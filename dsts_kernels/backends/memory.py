"""Zeros whose pages cost neither time nor memory until they are written: what stacked gradients are made of.

The gradient of a stack of neurons is zero but for the chosen ones, and writing those zeros out would cost more
than the gradient itself. On Linux a large one is a map of the system's own, on huge pages. When its tensor is gone the
map is kept for the next gradient of its size, for the system takes longer to provide and clear a page than a kernel to
fill it. Rows that will be written again keep their pages; all others give theirs back, as nobody knows what was written
to them meanwhile. A map that waits is the system's for the asking (``MADV_FREE``): it holds no memory that is short.

Not every Linux takes each advice: some have no huge pages, some are sandboxes, some programs lock their memory. Nothing
is wrong then, but slower: small pages, zeros that are written, maps that go back.
"""

from __future__ import annotations

import itertools
import mmap
import sys
import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

LAZY_ZEROS_BYTES = 1 << 20
# Elsewhere MADV_DONTNEED does not promise zeros.
KEEPS_MAPS = sys.platform == "linux" and hasattr(mmap, "MADV_FREE")
KEPT_OF_A_SIZE = 4  # maps that wait: of a module with more layers some gradients live on anyhow

_waiting: dict[int, list[mmap.mmap]] = {}  # by size; steps of its own need no lock, and a finalizer may run in any


def lazy_zeros(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, rows: Mapping[int, bool] | None = None
) -> Tensor:
    """Zeros of any floating dtype; lazy on a CPU and from :data:`LAZY_ZEROS_BYTES` on.

    ``rows`` are those, of the first dimension, that the caller will write: true for one that it will write as a whole,
    which then is not zero but undefined.
    """
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < LAZY_ZEROS_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    if not KEEPS_MAPS:
        return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
    waiting = _waiting.setdefault(size, [])
    try:
        found, used = waiting.pop(), True
    except IndexError:
        found, used = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), False
        _advise(found, mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(found, np.uint8)
    if used:
        _clear(found, memory, size // shape[0], rows or {})
    weakref.finalize(memory, _keep, waiting, found).atexit = False
    return torch.from_numpy(memory).view(dtype).view(shape)


def _keep(waiting: list[mmap.mmap], found: mmap.mmap) -> None:
    """What becomes of a map whose tensor is gone: the oldest one that waits makes room for it."""
    if not _advise(found, mmap.MADV_FREE):  # it would hold memory
        return
    waiting.append(found)
    if len(waiting) > KEPT_OF_A_SIZE:
        waiting.pop(0)


def _advise(found: mmap.mmap, advice: int, *part: int) -> bool:
    """Whether the system took an advice, for the whole map or for ``start, length``."""
    try:
        found.madvise(advice, *part)
    except OSError:
        return False
    return True


def _clear(found: mmap.mmap, memory: np.ndarray, row: int, rows: Mapping[int, bool]) -> None:
    """Zeros again, in all but the rows of ``row`` bytes that will be written as a whole."""
    for begin, end in _gaps(len(memory), row, rows):
        # Whole pages go back; what is left of pages that are kept is written.
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if end == len(memory):
            last = end
        if first < last and _advise(found, mmap.MADV_DONTNEED, first, last - first):
            memory[begin:first] = 0
            memory[last:end] = 0
        else:
            memory[begin:end] = 0
    for n, whole in rows.items():
        if not whole:
            memory[n * row : (n + 1) * row] = 0


def _gaps(size: int, row: int, rows: Mapping[int, bool]) -> Iterator[tuple[int, int]]:
    """What lies between the rows."""
    edges = [0, *itertools.chain.from_iterable((n * row, (n + 1) * row) for n in sorted(rows)), size]
    return ((begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end)
