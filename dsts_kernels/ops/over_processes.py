"""A sum over the processes that share a batch: what statistics of a whole batch need where each process has a part.

Which processes these are is asked as the op runs: those of the ``DistributedDataParallel`` whose forward pass it is in.
An op, so that compilers leave the question alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ._library import define


class _Quiet(threading.local):
    alone = False


_quiet = _Quiet()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A block of this thread that asks no other process: while a CUDA graph is captured, in which none could answer."""
    before, _quiet.alone = _quiet.alone, True
    try:
        yield
    finally:
        _quiet.alone = before


def group_of_pass() -> dist.ProcessGroup | None:
    """The processes of the ``DistributedDataParallel`` whose forward pass runs in this process, if any."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return None if wrapper is None else wrapper.process_group


def _sum(own: Tensor) -> Tensor:
    total, group = own.clone(), None if _quiet.alone else group_of_pass()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


sum_op = define(
    "sum_over_processes(Tensor own) -> Tensor", _sum, lambda own: torch.empty_like(own), differentiable=False
)


def sum_over_processes(own: Tensor) -> Tensor:
    """The sum of every process's ``own``, in ``DistributedDataParallel``'s forward pass; ``own`` itself elsewhere."""
    return sum_op(own) if dist.is_available() and dist.is_initialized() else own
