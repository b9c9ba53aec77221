"""The CUDA backend on CPU tensors: its launchers as they are, over kernels that ``tests/emulator`` compiled.

It stands in for the backend of its name, so ops and modules reach it by ``backend="cuda"``. Every test runs as on sm_70
and as on sm_80; ``DSTS_EMULATED=address-800`` and the like choose one of them and a sanitizer's build. Kernels are
compiled when the first test runs, not when tests are collected.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import pytest
import torch

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.cuda import CudaBackend, launch
from dsts_kernels.backends.gpu import dtypes
from tests.emulator import build

FLAVOUR, *_ARCH = (os.environ.get("DSTS_EMULATED") or "plain").split("-")
ARCHS = tuple(map(int, _ARCH)) or (700, 800)


@functools.cache
def compiled(arch: int) -> ModuleType:
    """The native module with its kernels emulated."""
    return build.load(build.build(FLAVOUR, arch))


class EmulatedBackend(CudaBackend):
    """Runs on CPU tensors, as on a chip of ``arch`` with so many multiprocessors."""

    arch, processors = ARCHS[0], 3

    def missing(self) -> str | None:
        return None

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"kernels are emulated for CPU tensors, not for {device.type}"
        return dtypes.why_not(dtype, self.arch // 10)

    def emulate(self, arch: int, patch: pytest.MonkeyPatch) -> None:
        """Until ``patch`` is undone this is the CUDA backend."""
        patch.setattr(self, "arch", arch)
        patch.setattr(launch, "native", lambda: compiled(self.arch))
        patch.setattr(launch, "chip", lambda device: launch.Chip(self.arch // 10, self.processors))
        patch.setitem(BACKENDS, self.name, self)


def run_in_any_order(arch: int) -> None:
    """Blocks of emulated launches run in another order, two at a time, and so do their threads."""
    emulator = compiled(arch).emulator
    emulator.seed(int(torch.randint(2**31, ())))
    emulator.workers(2)
