"""Features as kernels take them: how far apart their elements lie, channels last, and new ones."""

from __future__ import annotations

import contextlib
import functools
import itertools

import torch
from torch import Tensor

from .grids import INT32

SPATIAL = (1, 3, 3)  # the kernel of a spatial operator


HERE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the device of ``x``, on its current stream."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():  # asking costs less than entering
        return HERE
    return torch.cuda.device(x.device)


# Every launch asks these, and few kinds of features come: answers are kept by sizes and strides.
@functools.lru_cache(maxsize=1024)
def _extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(sizes[1:], strides[1:], strict=True))


def needs_int64(*features: Tensor) -> bool:
    """Whether offsets within a sample of ``(B, C, T, H, W)`` need 64 bits."""
    return any(_extent(x.shape, x.stride()) > INT32 for x in features)


@functools.lru_cache(maxsize=1024)
def strides_for_kernels(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """:func:`kernel_strides` by sizes and strides."""
    longer = [(size, stride) for size, stride in zip(sizes[2:], strides[2:], strict=True) if size > 1]
    if any(before[1] != after[0] * after[1] for before, after in itertools.pairwise(longer)):
        return strides, False
    step = longer[-1][1] if longer else 1
    return (*strides[:4], step), True


def kernel_strides(x: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides of ``x (B, C, T, H, W)`` for a kernel, and whether its positions follow one another at one stride.

    Where they do, the last one leads from position to position.
    """
    return strides_for_kernels(x.shape, x.stride())


def as_ndhwc(x: Tensor) -> Tensor:
    """``x (B, C, T, H, W)`` as a dense panel ``(B, T, H, W, C)``, a copy only where it does not lie so."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def empty_features(x: Tensor, outputs: int) -> Tensor:
    """``(B, O, T, H, W)``, channels-last."""
    b, _, t, h, w = x.shape
    return x.new_empty(b, t, h, w, outputs).permute(0, 4, 1, 2, 3)
