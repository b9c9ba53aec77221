"""The CUDA backend on CPU tensors: its launchers as they are, over kernels that ``tests/emulator`` compiled for the CPU.

``DSTS_EMULATED=address-800`` and the like choose a sanitizer's build and the architecture; by default each is plain and
sm_70. It stands in for the backend of its name, so ops and modules reach it by ``backend="cuda"``.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.cuda import CudaBackend, kernels, unsupported_dtype
from tests.emulator import build

FLAVOUR, ARCH = os.environ.get("DSTS_EMULATED", "plain-700").split("-")
PROCESSORS = 3
EMULATED: ModuleType = build.load(build.build(FLAVOUR, int(ARCH)))


class EmulatedBackend(CudaBackend):
    """Runs on CPU tensors."""

    def __init__(self) -> None:
        kernels.native = lambda: EMULATED
        kernels.chip = lambda device: kernels.Chip(int(ARCH) // 10, PROCESSORS)
        BACKENDS["cuda"] = self

    def missing(self) -> str | None:
        return None

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"kernels are emulated for CPU tensors, not for {device.type}"
        return unsupported_dtype(dtype, int(ARCH) // 100)
