"""Where an op can run: a backend, and a device or what stands in for one. A test that takes ``target`` runs on each.

=================  ==========================================================================  ===================
``cpu``            the native CPU backend
``eager``          plain PyTorch on CPU tensors
``cpu-units``      the native CPU backend as on matrix units: direct convolutions in half types
``triton``         Triton's kernels on a GPU                                                   marked ``gpu``
``cuda``           the CUDA backend's kernels on a GPU                                         marked ``gpu``
``cuda-sm_70``     the CUDA backend's kernels on CPU tensors, emulated: see ``tests/emulator``  marked ``emulated``
``triton-interp``  Triton's kernels on CPU tensors, in its interpreter                         alone: see below
=================  ==========================================================================  ===================

Triton decides at its import whether it interprets, so ``TRITON_INTERPRET=1`` must be set from outside, and then there
is no other target: ``TRITON_INTERPRET=1 pytest tests``. Emulated tests take a C++ compiler and are asked for by
``pytest -m emulated``; collecting them compiles nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends import BACKENDS, GpuBackend
from dsts_kernels.backends.triton import unusable

from .emulation import ARCHS, EmulatedBackend
from .inputs import SIZE, TILES, randn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_BACKENDS = ("triton", "cuda")
NO_GPU = "no CUDA GPU here: torch.cuda.is_available() is False"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=lambda dtype: str(dtype).removeprefix("torch."))
large, huge = pytest.mark.large, pytest.mark.huge


@dataclass(frozen=True)
class Target:
    """One of the table above; ``dtype`` is the one of tests that take one only, ``half`` the best half precision."""

    name: str
    backend: str
    dtypes: Sequence[torch.dtype]
    dtype: torch.dtype
    half: torch.dtype
    device: torch.device = CPU
    stand_in: bool = False  # for a GPU, and far slower than one
    units: bool = False  # the CPU backend as if the processor had matrix units, direct convolution forced
    arch: int = 0  # that emulated kernels are compiled for: 700, 800

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a small sample. On a GPU all tests share them: each is a compilation."""
        return SIZE if self.stand_in else (3, 6, 5)

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Frames, rows and columns of several tiles where kernels are small, ragged on every side."""
        return TILES if self.stand_in else (3, 6, 5)

    @property
    def outputs(self) -> int:
        """Channels of an output: whole 16 bytes of any dtype on a GPU, fewer where one is stood in for."""
        return 12 if self.stand_in else 40

    def randn(self, *size: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal noise where this target computes."""
        return randn(*size, dtype=dtype or self.dtype, device=self.device, scale=scale)

    def why_not(self, dtype: torch.dtype) -> str | None:
        """The backend's own reason for not running here in ``dtype``; ``None`` when it runs."""
        return BACKENDS[self.backend].why_not("gated_conv3d", self.device, dtype)

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        if self.device == CUDA:  # deterministic algorithms, which poison memory, warn there
            return [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
        if not self.stand_in:
            return []
        return [pytest.mark.filterwarnings("ignore:invalid value"), *([] if INTERPRETED else [pytest.mark.emulated])]


def require_triton() -> None:
    """Skips where there is no triton that serves: an old torch names an old one."""
    if (reason := unusable()) is not None:
        pytest.skip(reason, allow_module_level=True)


def half() -> torch.dtype:
    """bfloat16; float16 on a GPU that has no other half precision, where no backend of ours runs bfloat16."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float16


HALF = half()


def on_cpu(name: str) -> Target:
    return Target(name, name, (torch.float64, *DTYPES), torch.float64, torch.bfloat16)


def on_matrix_units() -> Target:
    return Target("cpu-units", "cpu", (torch.bfloat16, torch.float16), torch.bfloat16, torch.bfloat16, units=True)


def on_gpu(name: str) -> Target:
    kinds = DTYPES if torch.bfloat16 == HALF else DTYPES[:2]
    return Target(name, name, kinds, HALF, HALF, CUDA)


def emulated(arch: int) -> Target:
    """The dtypes are those that the backend has on such a chip."""
    backend = EmulatedBackend()
    backend.arch = arch
    kinds = [dtype for dtype in DTYPES if backend.why_not("gated_conv3d", CPU, dtype) is None]
    return Target(f"cuda-sm_{arch // 10}", "cuda", kinds, torch.float32, kinds[-1], stand_in=True, arch=arch)


def interpreted() -> Target:
    """The interpreter gets bfloat16 products wrong."""
    return Target("triton-interp", "triton", DTYPES[:2], torch.float32, torch.float16, stand_in=True)


if INTERPRETED:
    TARGETS = [interpreted()]
else:
    TARGETS = [*map(on_cpu, ("cpu", "eager")), on_matrix_units(), *map(on_gpu, GPU_BACKENDS), *map(emulated, ARCHS)]

# What a test asks for by a parameter's name: every target, those with GPU kernels, and what stands in for a GPU.
KINDS = {
    "target": TARGETS,
    "gpu_target": [target for target in TARGETS if isinstance(BACKENDS[target.backend], GpuBackend)],
    "stand_in": [target for target in TARGETS if target.stand_in],
}


def target_of(item: pytest.Item) -> Target | None:
    """What a collected test runs on, where it takes a target."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    return next((given[kind] for kind in KINDS if kind in given), None)


def is_left_out(item: pytest.Item) -> bool:
    """A dtype that the target has not, or a size that takes too long without a GPU, or where one is stood in for."""
    target = target_of(item)
    if target is None:
        return False
    dtype = item.callspec.params.get("dtype", target.dtype)
    too_long = {"huge"} if target.device == CPU else set()
    too_long |= {"large"} if target.stand_in else set()
    return dtype not in target.dtypes or any(mark.name in too_long for mark in item.iter_markers())
