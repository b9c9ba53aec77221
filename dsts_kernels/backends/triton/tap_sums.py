"""Tap sums: every channel summed over the positions that each tap of a scoring kernel meets, in float32.

A program sums a range of positions of a block of channels, so that a small batch still fills the chip; the ranges'
sums are added up by who reads them, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features
from . import launch
from .boxes import cdiv
from .common import position_offsets
from .epilogue import tap_sums_of


@triton.jit
def tap_sums_kernel(
    x,
    sums,
    size,
    t_size,
    h_size,
    w_size,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    TAPS: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """``sums (B, parts, C, TAPS)`` of ``x (B, C, T, H, W)``; axis 1 of the grid is the parts."""
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    b = tl.program_id(0)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    positions = t_size * h_size * w_size
    steps = tl.cdiv(tl.cdiv(positions, BP), parts)
    start = x + b.to(tl.int64) * stride_b
    column = c * stride_c
    if WIDE:
        column = c.to(tl.int64) * stride_c
    # One tap is added up position by position and summed once; nine are summed as they come.
    alone = tl.zeros((BP, BC), tl.float32)
    total = tl.zeros((16 if TAPS == 9 else 1, BC), tl.float32)
    for step in range(0, steps):
        p = (part * steps + step) * BP + tl.arange(0, BP)
        place = position_offsets(p, h_size, w_size, stride_t, stride_h, stride_w, FLAT, WIDE)
        mask = (p < positions)[:, None] & (c < size)[None, :]
        v = tl.load(start + (place[:, None] + column[None, :]), mask=mask, other=0.0).to(tl.float32)
        if TAPS == 1:
            alone += v
        else:
            total += tap_sums_of(v, p // w_size % h_size, p % w_size, h_size, w_size, TAPS)
    if TAPS == 1:
        total = tl.sum(alone, 0)[None, :]
    tap = tl.arange(0, total.shape[0])[:, None]
    out = sums + (b.to(tl.int64) * parts + part) * size * TAPS
    tl.store(out + c[None, :] * TAPS + tap, total, mask=(c < size)[None, :] & (tap < TAPS))


def partial_tap_sums(x: Tensor, taps: int) -> Tensor:
    """``(B, parts, C, taps)`` float32: enough parts that a small batch fills the chip."""
    b, c, t, h, w = x.shape
    bp, bc = (64, 64) if taps == 1 else (64, 32)
    steps, blocks = cdiv(t * h * w, bp), cdiv(c, bc)
    parts = max(1, min(steps, cdiv(4 * launch.chip(x.device)[1], max(1, b * blocks))))
    sums = x.new_empty((b, parts, c, taps), dtype=torch.float32)
    if sums.numel():
        with features.on_device(x):
            strides, is_flat = features.kernel_strides(x)
            tap_sums_kernel[b, parts, blocks](
                x, sums, c, t, h, w, *strides, TAPS=taps, FLAT=is_flat, WIDE=features.needs_int64(x), BP=bp, BC=bc,
                num_warps=4 if taps == 1 else 8,
            )  # fmt: skip
    return sums
