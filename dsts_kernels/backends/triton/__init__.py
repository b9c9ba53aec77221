"""The Triton backend: our own GPU kernels, for compute capability 8.0 and later.

Nothing here imports triton before a kernel runs. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors in Triton's
interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from types import ModuleType

import torch

from ..gpu import GpuBackend, Kernels, dtypes
from ..gpu.measured import capability
from .gluon import plan

# All others are kernels and their launchers.
HELPERS = ("common", "epilogue", "gluon", "launch", "recorded", "recorder", "schedule", "tuning")
LAUNCHERS = tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in (*HELPERS, "kernels"))
IN_GLUON = {  # parts of ops that have a second kernel there, with its switch
    "frozen_layer": {"convolution": "gluon_conv"},
    "gated_conv3d": {
        "gradients of features and gates": "gluon_data_gradient",
        "gradients of filters": "gluon_weight_gradient",
    },
    "mixing_conv3d": {"gradients of filters": "gluon_weight_gradient"},
}
OLDEST = (3, 6)  # of the versions the kernels were tried with


@functools.cache
def load(module: str) -> ModuleType:
    """A module of launchers, imported when first wanted: triton takes half a second."""
    return importlib.import_module(f".{module}", __name__)


@functools.cache
def unusable() -> str | None:
    """Why the triton that is installed, if one is, does not serve; found out without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of one's own
        return None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    wanted = ".".join(map(str, OLDEST))
    return f"triton {version} is installed, {wanted} or later is needed" if numbers < OLDEST else None


class TritonBackend(GpuBackend):
    """Kernels on a GPU; on CPU tensors only in the interpreter."""

    name = "triton"
    remark = "our kernels on the GPU, without a host synchronisation"

    def missing(self) -> str | None:
        if (reason := unusable()) is not None:
            return reason
        if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
            return None
        return "torch finds no CUDA GPU; set TRITON_INTERPRET=1 to run its kernels in Triton's interpreter, slowly"

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if (reason := self.missing()) is not None:
            return reason
        if os.environ.get("TRITON_INTERPRET") == "1":
            if device.type != "cpu":
                return f"TRITON_INTERPRET=1 runs kernels on CPU tensors, not on {device.type}"
        elif device.type != "cuda":
            return f"it runs on CUDA tensors, not on {device.type}"
        elif torch.version.hip is not None:
            return "it was made for NVIDIA GPUs; this is a ROCm build of torch"
        elif capability(device) < (8, 0):
            major, minor = capability(device)
            return f"Triton needs compute capability 8.0, this GPU has {major}.{minor}"
        return dtypes.why_not(dtype)

    def note(self, op: str, device: torch.device, dtype: torch.dtype) -> str:
        notes = [self.remark]
        for part, switch in IN_GLUON.get(op, {}).items():
            on_gpu = device.type == "cuda"
            reason = plan.why_not(capability(device), dtype, switch) if on_gpu else "it runs on GPUs alone"
            notes.append(f"its {part} " + ("in Gluon" if reason is None else f"not in Gluon: {reason}"))
        return "; ".join(notes)

    @property
    def kernels(self) -> Kernels:
        return load("kernels")


def _recorded(name: str) -> Callable:
    """A method of every GPU backend, by an earlier call of the same kind."""
    method = getattr(GpuBackend, name)

    @functools.wraps(method)
    def op(self: TritonBackend, *args: object) -> object:
        return load("recorded").call(name, method, self, *args)

    return op


RECORDED = (
    "frozen_layer", "gated_conv3d", "gated_conv3d_keeping", "gated_conv3d_backward", "mixing_conv3d",
    "mixing_conv3d_backward", "route", "route_backward",
)  # fmt: skip
if os.environ.get("TRITON_INTERPRET") != "1":  # which compiles nothing, so that there is nothing to do again
    for _name in RECORDED:
        setattr(TritonBackend, _name, _recorded(_name))
