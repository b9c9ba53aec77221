"""GPU kernels on CPU tensors: the backend whose launches tests look at one by one, and what they share.

That is Triton's in its interpreter where ``TRITON_INTERPRET=1``, else the CUDA backend's, emulated; one process runs
either. Importing this skips a test module where Triton is to interpret and is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsts_kernels import FusedDSTS, reference
from dsts_kernels.backends import BACKENDS, GpuBackend

from . import checks, modules
from .emulation import EmulatedBackend
from .inputs import SIZE
from .targets import DTYPES, INTERPRETED, require_triton


def triton_backend() -> GpuBackend:
    """Triton's kernels, in its interpreter."""
    require_triton()
    return BACKENDS["triton"]


BACKEND = triton_backend() if INTERPRETED else EmulatedBackend()
KERNELS = BACKEND.kernels
NAMES = tuple(checks.GATED.trained)
emulated = pytest.mark.usefixtures("stand_in")  # the parameter brings its own marks
# What a stand-in has not is deselected: bfloat16 in the interpreter and before sm_80.
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check_gated(
    inputs: Sequence[Tensor], needs: Sequence[bool] | None = None, forward: bool = True, **options
) -> list[Tensor]:
    """:func:`.checks.check` of the gated convolution on this backend."""
    return checks.check(checks.GATED, inputs, needs, forward, backend=BACKEND.name, **options)


def pair(channels: int, dtype: torch.dtype = torch.float32, **options) -> tuple[reference.DSTS, FusedDSTS]:
    """:func:`.modules.pair` on this backend, of few layers and neurons."""
    return modules.pair(channels, dtype, BACKEND.name, **dict(num_layers=2, score_reduction="mean") | options)


def everything(x: Tensor, inputs: list[Tensor], fast: torch.nn.Module) -> list[Tensor]:
    """What every kernel that counts within a sample makes of ``x``."""
    operands, grad = [x, *inputs[1:]], torch.ones(len(x), 12, *SIZE, dtype=x.dtype)
    found = [*BACKEND.gated_conv3d_backward(grad, *operands, [True] * 4)]
    found += BACKEND.gated_conv3d_backward(grad, *operands, [True, False, False, False])[:1]
    found += BACKEND.gated_conv3d_backward(grad, *operands, [False, True, False, False])[1:2]
    return [*found, BACKEND.gated_conv3d(*operands), BACKEND.tap_sums(x, 1), BACKEND.tap_sums(x, 9), fast(x)]
