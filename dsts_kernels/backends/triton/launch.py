"""What launchers share: the chip, the device guard, offsets, and features as kernels take them.

Launchers stand beside their kernels: tensors in, tensors out, on the current stream of their device, without a host
synchronisation.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .boxes import Box

INT32 = 2**31 - 1
SPATIAL = (1, 3, 3)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the device of ``x``, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def chip(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessors."""
    if device.type != "cuda":
        return tuning.INTERPRETER, 3
    properties = torch.cuda.get_device_properties(device)
    return tuning.architecture_of((properties.major, properties.minor)), properties.multi_processor_count


def precision(dtype: torch.dtype) -> str:
    return "ieee" if tuning.kind_of(dtype) == "ieee" else "tf32"


def extent(x: Tensor) -> int:
    """The largest offset within a sample of ``(B, C, T, H, W)``."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def wide(*features: Tensor) -> bool:
    """Whether offsets within a sample need 64 bits."""
    return any(extent(x) > INT32 for x in features)


def flat(x: Tensor) -> bool:
    """Whether the positions of a sample follow one another at one stride."""
    strides = [stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    sizes = [size for size in x.shape[2:] if size > 1]
    return all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 1))


def steps_of(x: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides for a kernel, and :func:`flat`; a flat sample's last one is the step from position to position."""
    if not flat(x):
        return x.stride(), False
    step = next((x.stride(i) for i in (4, 3, 2) if x.shape[i] > 1), 1)
    return (*x.stride()[:4], step), True


def rows_of(x: Tensor) -> Tensor:
    """``x (B, C, T, H, W)`` as a dense panel ``(B, T, H, W, C)``, a copy only where it does not lie so."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows of whole 16 bytes, and coordinates that fit."""
    return (tensor.shape[-1] * tensor.element_size()) % 16 == 0 and tensor.data_ptr() % 16 == 0


def dense_strides(shape: torch.Size) -> list[int]:
    """Strides of dense memory. Those that torch gives a side of 1 may be anything, and no descriptor takes that."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def boxed(panel: Tensor, box: Box, columns: int, tma: bool) -> tuple[object, bool]:
    """A panel ``(B, T, H, W, c)`` as a kernel takes it, and whether that is a tensor descriptor."""
    if not (tma and aligned(panel)):
        return panel, False
    return TensorDescriptor(panel, list(panel.shape), dense_strides(panel.shape), [1, *box, columns]), True


def described(matrix: Tensor, block: list[int], tma: bool) -> tuple[object, bool]:
    """Likewise for filters."""
    if not (tma and aligned(matrix)):
        return matrix, False
    return TensorDescriptor(matrix, list(matrix.shape), dense_strides(matrix.shape), block), True


def empty_features(x: Tensor, outputs: int) -> Tensor:
    """``(B, O, T, H, W)``, channels-last."""
    b, _, t, h, w = x.shape
    return x.new_empty(b, t, h, w, outputs).permute(0, 4, 1, 2, 3)
