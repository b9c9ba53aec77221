"""What the GPU suite shares beside :mod:`tests.support`: the device, and the half precision that it has."""

from __future__ import annotations

import functools

import pytest
import torch

from dsts_kernels import FusedDSTS, reference

from ..support import inputs, modules
from ..support.targets import CUDA as DEVICE
from ..support.targets import DTYPES, GPU_BACKENDS, HALF, on_gpu

__all__ = ["DEVICE", "DTYPES", "GPU_BACKENDS", "HALF", "gated_inputs", "needs_memory", "pair", "randn", "why_not"]

gated_inputs = functools.partial(inputs.gated_inputs, device=DEVICE)
randn = functools.partial(inputs.randn, device=DEVICE)


def pair(backend: str | None, channels: int, dtype: torch.dtype, **options) -> tuple[reference.DSTS, FusedDSTS]:
    """:func:`..support.modules.pair` on the GPU."""
    return modules.pair(channels, dtype, backend, DEVICE, **dict(num_neurons=4, score_reduction="mean") | options)


def why_not(backend: str, dtype: torch.dtype) -> str | None:
    """The backend's own reason for not running here in ``dtype``; ``None`` when it runs."""
    return on_gpu(backend).why_not(dtype)


def needs_memory(gib: float) -> None:
    """Skips a test that this GPU has no room for."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, {free:.0f} are free")
