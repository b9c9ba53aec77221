"""The CUDA backend: our own C++ kernels, for compute capability 7.0 and later, in the native module.

Where Triton cannot run (Volta and Turing, or no triton) it is what runs on a GPU.
"""

from __future__ import annotations

import functools

import torch

from ..build import _C, build_record, why_no_module
from ..gpu import GpuBackend, Kernels, dtypes
from ..gpu.measured import capability
from . import kernels

OLDEST = (7, 0)


@functools.cache
def native_targets() -> tuple[str, list[int]] | None:
    """The toolkit that built the native kernels and their targets (``[75, 80, ...]``); ``None`` where none did."""
    facts = None if _C is None else _C.build_info()["cuda"]
    return (facts["version"], facts["targets"]) if facts else None


def runs_on(targets: list[int], major: int, minor: int) -> bool:
    """Whether what was built for ``targets`` runs there: code does on later devices of the same major version, and PTX
    of the last target, compiled when it is loaded, on whatever came after."""
    if 10 * major + minor > max(targets, default=1000):
        return True
    return any(target // 10 == major and target % 10 <= minor for target in targets)


def unsupported(major: int, minor: int) -> str | None:
    """Why this build does not serve a GPU of such a compute capability, and what to install; ``None`` when it does."""
    if (major, minor) < OLDEST:
        return f"it needs compute capability 7.0 (tensor cores), this GPU has {major}.{minor}"
    version, targets = native_targets() or ("", [])
    if not runs_on(targets, major, minor):
        advice = "install the package where a CUDA 12.8 or later nvcc is found"
        if (major, minor) < (7, 5):
            advice = (
                "CUDA 13 left compute capability 7.0: install the package where the nvcc of a CUDA 12 toolkit is found "
                "(12.9 is the last), with a torch built for CUDA 12.6 or earlier (its version ends in +cu126)"
            )
        names = ", ".join(f"{target / 10:.1f}" for target in targets)
        return f"its kernels were built by nvcc {version} for {names}, this GPU has {major}.{minor}; {advice}"
    return None


def unsupported_by_torch(major: int, minor: int) -> str | None:
    """Why the torch that is installed does not serve such a GPU; ``None`` when it does."""
    built = [int(name.removeprefix("sm_")) for name in torch.cuda.get_arch_list() if name[3:].isdigit()]
    if not built or runs_on(built, major, minor):
        return None
    advice = "a build of torch for CUDA 12.6 (its version ends in +cu126)" if major == 7 else "another build of torch"
    names = ", ".join(f"{target / 10:.1f}" for target in built)
    return f"torch {torch.__version__} was built for {names}, this GPU has {major}.{minor}; install {advice}"


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why this build and this torch do not serve ``device``: asked at every op, so kept."""
    major, minor = capability(device)
    return unsupported(major, minor) or unsupported_by_torch(major, minor)


class CudaBackend(GpuBackend):
    """Native kernels on a GPU."""

    name = "cuda"
    remark = "our CUDA C++ kernels on the GPU, without a host synchronisation"

    @property
    def kernels(self) -> Kernels:
        return kernels

    def missing(self) -> str | None:
        if (why := why_no_module()) is not None:
            return f"{why}; DSTS_BUILD=cuda at install says why when the build fails"
        if native_targets() is None:
            built, reason = build_record()
            why = f": {reason}" if reason else ""
            return (
                f"the native module was built without CUDA kernels ({built}{why}); install the package where nvcc is "
                "found, DSTS_BUILD=cuda says why when that fails"
            )
        return None if torch.cuda.is_available() else "torch finds no CUDA GPU"

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if (reason := self.missing()) is not None:
            return reason
        if device.type != "cuda":
            return f"it runs on CUDA tensors, not on {device.type}"
        if torch.version.hip is not None:
            return "it was made for NVIDIA GPUs; this is a ROCm build of torch"
        major, minor = capability(device)
        return refusal(device) or dtypes.why_not(dtype, 10 * major + minor)
