"""What native kernels are tested in: each instruction set of this machine in turn, one thread, poisoned memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import pytest
import torch

from dsts_kernels.backends.build import _C
from dsts_kernels.testing import poisoned_memory

M_PERTURB = -6  # glibc: fill allocated memory with the complement of a byte; 0x7f7f7f7f is 3.4e38 as a float


@pytest.fixture(params=() if _C is None else _C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use."""
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that torch's threads would compete with the kernels'; the same numbers in every test."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_scratch() -> Iterator[None]:
    """Memory that kernels and torch allocate holds no zeros."""
    perturb = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if perturb is not None:
        perturb(M_PERTURB, 0x80)
    with poisoned_memory():
        yield
    if perturb is not None:
        perturb(M_PERTURB, 0)
