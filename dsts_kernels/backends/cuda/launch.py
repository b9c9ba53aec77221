"""What launches are made of: the native module, the chip they go to, addresses, and rows of whole 16 bytes.

Rows that tensor cores read are padded to whole 16 bytes: as they are made, or in a copy where they come from outside
with an odd number of channels. Tests stand in for :func:`native` and :func:`chip`, so launchers ask this module.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..build import _C
from ..gpu import features, grids
from ..gpu.grids import cdiv

MAX_NEURONS = 8192  # kernels keep a score or a mark of each in shared memory


class Chip(NamedTuple):
    """What launches depend on."""

    capability: int  # times ten
    processors: int


@functools.cache
def chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def native() -> ModuleType:
    """The native launchers."""
    return _C.cuda


@functools.lru_cache(64)
def _target(index: int, capability: int, stream: int) -> object:
    return native().Target(index, capability, stream)


def target(x: Tensor) -> object:
    """The device of ``x`` and its current stream."""
    if not x.is_cuda:  # emulated, in tests
        return native().Target(0, chip(x.device).capability, 0)
    return _target(x.device.index, chip(x.device).capability, torch.cuda.current_stream(x.device).cuda_stream)


def uses_tf32(x: Tensor) -> bool:
    """Whether float32 products may be TF32 products: as torch's float32 matmul precision says."""
    if x.dtype != torch.float32 or chip(x.device).capability < 80:
        return False
    return torch.get_float32_matmul_precision() != "highest"


_resident = functools.cache(grids.resident_ctas)


def resident(x: Tensor) -> int:
    """CTAs of a product that a multiprocessor holds."""
    exact = x.dtype == torch.float32 and not uses_tf32(x)
    return _resident(chip(x.device).capability, exact)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def vector(dtype: torch.dtype) -> int:
    """Elements of 16 bytes."""
    return 16 // dtype.itemsize


def padded(x: Tensor) -> Tensor:
    """Dense rows of whole, aligned 16 bytes: ``x`` itself, or a copy with zeros behind each row."""
    missing = -x.shape[-1] % vector(x.dtype)
    if missing:
        return F.pad(x, (0, missing))
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def round_up(n: int, dtype: torch.dtype) -> int:
    return cdiv(n, vector(dtype)) * vector(dtype)


def vectors_fit(x: Tensor) -> bool:
    """Whether 16 bytes at a time can be read along the side of ``(B, C, T, H, W)`` that lies at stride 1."""
    v, strides = vector(x.dtype), x.stride()
    if x.data_ptr() % 16:
        return False
    if strides[1] == 1:
        others = [strides[i] for i in (0, 2, 3, 4) if x.shape[i] > 1]
        return x.shape[1] % v == 0 and all(stride % v == 0 for stride in others)
    steps, flat = features.kernel_strides(x)
    outer = [strides[i] for i in (0, 1) if x.shape[i] > 1]
    return flat and steps[4] == 1 and x.shape[2:].numel() % v == 0 and all(stride % v == 0 for stride in outer)


def check_count(neurons: int) -> None:
    if neurons > MAX_NEURONS:
        raise ValueError(f"neurons: got {neurons}, wanted at most {MAX_NEURONS} on the 'cuda' backend")
