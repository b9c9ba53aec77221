"""Memory of gradients: zeros, used again on Linux, nobody else's while it is held, and where advice is refused."""

from __future__ import annotations

import errno
import mmap
import sys

import pytest
import torch

from dsts_kernels.backends import memory
from dsts_kernels.backends.base import FLOATS
from dsts_kernels.backends.memory import LAZY_ZEROS_BYTES, lazy_zeros

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lazy_zeros(dtype):
    """Lazily zeroed gradients are zero, writable and of the right kind, small and large."""
    for numel in (10, LAZY_ZEROS_BYTES):
        zeros = lazy_zeros(torch.Size((2, numel)), dtype, CPU)
        assert zeros.dtype == dtype and zeros.shape == (2, numel) and zeros.count_nonzero() == 0
        zeros[1].fill_(1)
        assert zeros.sum(dtype=torch.float64) == numel


@pytest.mark.skipif(not memory.KEEPS_MAPS, reason="maps are kept on Linux only")
def test_memory_of_gradients_is_used_again():
    """Rows that will be written keep their pages; all else is zero again, whatever was written, to the last byte."""
    shape, size = torch.Size((5, LAZY_ZEROS_BYTES // 4 + 1001)), (5 * (LAZY_ZEROS_BYTES // 4 + 1001)) * 4
    memory._waiting.pop(size, None)
    zeros = lazy_zeros(shape, torch.float32, CPU)
    address = zeros.data_ptr()
    for rows in ({}, {2: False}, {0: True, 4: False}, {1: True, 2: True, 3: False}, dict.fromkeys(range(5), True)):
        zeros.fill_(7)
        view = zeros.view(-1)[3:]
        del zeros
        assert not memory._waiting.get(size)  # somebody holds a part of it
        del view
        zeros = lazy_zeros(shape, torch.float32, CPU, rows)
        assert zeros.data_ptr() == address and not memory._waiting[size]
        clean = [n for n in range(5) if not rows.get(n)]
        assert not zeros[clean].any()
    del zeros


@pytest.mark.skipif(not memory.KEEPS_MAPS, reason="maps are kept on Linux only")
def test_memory_of_gradients_in_use_is_nobody_elses():
    """Tensors that live have memory of their own, and a few maps wait at most."""
    shape = torch.Size((2, LAZY_ZEROS_BYTES // 8 + 77))
    size = shape.numel() * 8
    tensors = [lazy_zeros(shape, torch.float64, CPU).fill_(n) for n in range(2 * memory.KEPT_OF_A_SIZE)]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert all((t == n).all() for n, t in enumerate(tensors))
    del tensors
    assert len(memory._waiting[size]) == memory.KEPT_OF_A_SIZE
    again = [lazy_zeros(shape, torch.float64, CPU) for _ in range(memory.KEPT_OF_A_SIZE + 1)]
    assert not memory._waiting[size] and not any(t.any() for t in again)


@pytest.mark.skipif(not memory.KEEPS_MAPS, reason="maps are kept on Linux only")
@pytest.mark.parametrize("refused", ["MADV_HUGEPAGE", "MADV_FREE", "MADV_DONTNEED"])
def test_memory_of_gradients_where_linux_takes_no_advice(monkeypatch, refused):
    """As kernels without huge pages, sandboxes and locked memory do: zeros all the same, and no error anywhere."""
    real, errors = mmap.mmap, []

    class Map(real):
        def madvise(self, advice: int, *part: int) -> None:
            if advice == getattr(mmap, refused):
                raise OSError(errno.EINVAL, "Invalid argument")
            super().madvise(advice, *part)

    monkeypatch.setattr(memory.mmap, "mmap", Map)
    monkeypatch.setattr(sys, "excepthook", lambda *error: errors.append(error))
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    shape = torch.Size((3, LAZY_ZEROS_BYTES // 4 + 33))
    memory._waiting.pop(shape.numel() * 4, None)
    for rows in ({}, {1: False}, {0: True}):
        zeros = lazy_zeros(shape, torch.float32, CPU, rows)
        clean = [n for n in range(3) if not rows.get(n)]
        assert not zeros[clean].any()
        zeros.fill_(7)
        del zeros
    assert not errors and len(memory._waiting.pop(shape.numel() * 4)) == (refused != "MADV_FREE")
