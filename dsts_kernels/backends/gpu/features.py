"""Features as kernels take them: how far apart their elements lie, channels last, and new ones."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .grids import INT32

SPATIAL = (1, 3, 3)  # the kernel of a spatial operator


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the device of ``x``, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def extent(x: Tensor) -> int:
    """The largest offset within a sample of ``(B, C, T, H, W)``."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def needs_int64(*features: Tensor) -> bool:
    """Whether offsets within a sample need 64 bits."""
    return any(extent(x) > INT32 for x in features)


def has_flat_positions(x: Tensor) -> bool:
    """Whether the positions of a sample follow one another at one stride."""
    strides = [stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    sizes = [size for size in x.shape[2:] if size > 1]
    return all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 1))


def kernel_strides(x: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides for a kernel, and :func:`has_flat_positions`, with which the last one leads from position to position."""
    if not has_flat_positions(x):
        return x.stride(), False
    step = next((x.stride(i) for i in (4, 3, 2) if x.shape[i] > 1), 1)
    return (*x.stride()[:4], step), True


def as_ndhwc(x: Tensor) -> Tensor:
    """``x (B, C, T, H, W)`` as a dense panel ``(B, T, H, W, C)``, a copy only where it does not lie so."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def empty_features(x: Tensor, outputs: int) -> Tensor:
    """``(B, O, T, H, W)``, channels-last."""
    b, _, t, h, w = x.shape
    return x.new_empty(b, t, h, w, outputs).permute(0, 4, 1, 2, 3)
