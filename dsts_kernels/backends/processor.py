"""What this processor multiplies half types with, and whether panels and products should therefore be half.

Three questions, each asked once per process: what the chip and Linux offer (``csrc/cpu/units.cpp``), whether oneDNN
has kernels for it, and whether these are as fast as such a unit is: a virtual machine may trap tiles,
``ONEDNN_MAX_CPU_ISA`` keeps oneDNN from them, and its backward passes need not be as good as its forward one. So each
pass is measured, against float32, the first time that it is wanted. Forward the margin is two and more, so that no run
falls on the other side; :class:`.algorithm.use_algorithm` pins the way where the same bits are wanted of every run.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import _C


class Unit(NamedTuple):
    """Something that multiplies a half type, by its name in ``_C.units()``."""

    name: str
    title: str
    least: float  # float32's time over its own, of a convolution by oneDNN, below which it is not what it should be
    matrix: bool  # whether direct convolution on it may be cheaper than fast convolution in float32


# Best first. An AMX tile multiplies 16 times as much as an AVX-512 register of float32; 7.2 times were measured on an
# Intel machine (docs/log/cpu.md). `vdpbf16ps` does twice as much: less than fast convolution saves. AVX512-FP16 is
# left out, since oneDNN widens float16 to float32 there.
UNITS = {
    torch.bfloat16: (Unit("amx_bf16", "AMX", 3.0, True), Unit("avx512_bf16", "AVX512_BF16", 1.2, False)),
    torch.float16: (Unit("amx_fp16", "AMX", 3.0, True),),
}
PROBE = (4, 256, 14)  # images (at least one a thread), channels in and out, side: 0.9 GFLOP
PROBE_ROUNDS = 3


@functools.cache
def offered() -> dict[str, bool | str]:
    """``_C.units()``: what chip and operating system offer; nothing without the native module."""
    return {} if _C is None else _C.units()


def why_not_library(dtype: torch.dtype) -> str | None:
    """Why oneDNN, as torch has it, does not convolve this half type; ``None`` where it does."""
    if not torch.backends.mkldnn.is_available() or not torch._C._get_mkldnn_enabled():
        return "torch runs without oneDNN"
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)
    return None if supported is not None and supported() else f"oneDNN has no {name_of(dtype)} here"


def _forward(x: Tensor, w: Tensor) -> None:
    F.conv2d(x, w, padding=1)


def _data(x: Tensor, w: Tensor) -> None:
    F.conv_transpose2d(x, w, padding=1)


def _weights(x: Tensor, w: Tensor) -> None:
    torch.nn.grad.conv2d_weight(x, w.shape, x, padding=1)


PASSES = {"forward": _forward, "data": _data, "weights": _weights}
# What fast convolution in float32 saves of a pass, 3.2 times, with what its transforms and panels cost: beyond this
# direct convolution is the faster one.
LEAST_BACKWARD = 3.5


@functools.cache
def speedup(dtype: torch.dtype, step: str = "forward") -> float:
    """Float32's time over this dtype's, of one pass of oneDNN's convolution: the best of turns, a few milliseconds."""
    images, channels, side = max(PROBE[0], torch.get_num_threads()), *PROBE[1:]
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        wide = [
            torch.ones(size, dtype=torch.float32, device="cpu").contiguous(memory_format=torch.channels_last)
            for size in ((images, channels, side, side), (channels, channels, 3, 3))
        ]
        best = [float("inf")] * 2
        pairs = [wide, [t.to(dtype) for t in wide]]
        for turn in range(1 + PROBE_ROUNDS):
            for i, pair in enumerate(pairs):
                start = time.perf_counter()
                PASSES[step](*pair)
                best[i] = min(best[i], time.perf_counter() - start) if turn else best[i]
    return best[0] / best[1]


@functools.cache
def _unit(dtype: torch.dtype) -> tuple[Unit | None, str]:
    reasons = []
    for unit in UNITS.get(dtype, ()):
        if not offered().get(unit.name):
            refused = offered().get("refused")
            reasons.append(f"Linux refused {unit.title} tiles ({refused})" if unit.matrix and refused else "")
        elif (measured := speedup(dtype)) < unit.least:
            reasons.append(f"{unit.title} is there, but oneDNN was {measured:.1f} times as fast with it as in float32")
        else:
            return unit, f"{unit.title}, measured at {measured:.1f} times float32's rate"
    return None, "; ".join(filter(None, reasons)) or "this processor has nothing that multiplies it faster than float32"


def unit_of(dtype: torch.dtype) -> Unit | None:
    """What multiplies this dtype faster than float32; ``None`` where nothing does, and for the wide dtypes."""
    if not offers(dtype) or why_not_library(dtype) is not None:
        return None
    return _unit(dtype)[0]


def offers(dtype: torch.dtype) -> bool:
    """Whether the chip has anything for this dtype: what most machines answer, and quickly."""
    return dtype in UNITS and any(offered().get(unit.name) for unit in UNITS[dtype])


def beats_fast_convolution(dtype: torch.dtype, step: str) -> bool:
    """Whether direct convolution in a half type may be cheaper than a fast one in float32: where a matrix unit is, and
    for a step back where oneDNN uses it well there too.

    Args:
        step: a key of :data:`PASSES`.
    """
    unit = unit_of(dtype)
    return unit is not None and unit.matrix and (step == "forward" or speedup(dtype, step) >= LEAST_BACKWARD)


def describe(dtype: torch.dtype) -> str:
    """What there is for a half type, or why nothing: for reports."""
    missing = why_not_library(dtype)
    if missing is None or not offers(dtype):
        return _unit(dtype)[1]
    return missing


def name_of(dtype: torch.dtype) -> str:
    """As users write it, without ``torch.``."""
    return str(dtype).removeprefix("torch.")
