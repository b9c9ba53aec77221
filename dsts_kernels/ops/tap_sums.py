"""Sums of every channel over all positions that a scoring kernel's tap meets: what relevance scores need of x.

A ``1x1x1`` kernel has one tap, which meets every position. A zero-padded ``1x3x3`` kernel has nine; tap
``(i, j)`` misses the last row for ``i = 0`` and the first for ``i = 2``, and columns likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import accumulate_dtype
from ..backends.eager import valid_positions
from . import _checks
from ._library import Derivative, define


def _tap_sums_fake(x, taps, backend=None):
    return x.new_empty(x.shape[0], x.shape[1], taps, dtype=accumulate_dtype(x.dtype))


def _keep(ctx, inputs, output):
    x = inputs[0]
    ctx.shape, ctx.dtype = x.shape, x.dtype


def spread_over_positions(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of features of ``shape`` by that of their tap sums, ``grad (B, C, taps)``.

    A position's is the sum over the taps that meet it; broadcasting writes no full tensor.
    """
    b, c, _, h, w = shape
    if grad.shape[2] == 1:
        dx = grad[:, :, :, None, None]
    else:
        rows = valid_positions(h, grad.device, grad.dtype).t()  # (H, 3)
        columns = valid_positions(w, grad.device, grad.dtype)  # (3, W)
        dx = (rows @ grad.reshape(b, c, 3, 3) @ columns)[:, :, None]
    return dx.to(dtype).expand(shape)


def _gradients(ctx, grad):
    return spread_over_positions(grad, ctx.shape, ctx.dtype), None, None


tap_sums_op = define(
    "tap_sums(Tensor x, int taps, str? backend=None) -> Tensor",
    None,
    _tap_sums_fake,
    strided=("x",),
    derivative=Derivative(_keep, _gradients),
)


def tap_sums(x: Tensor, taps: int, *, backend: str | None = None) -> Tensor:
    """``x (B, C, T, H, W)`` to ``(B, C, taps)``, ``taps`` 1 or 9, in float32 (float64 for float64 input)."""
    x = _checks.features("x", x)
    if taps not in (1, 9):
        raise ValueError(f"taps: got {taps!r}, wanted 1 or 9")
    return tap_sums_op(x, taps, backend)
