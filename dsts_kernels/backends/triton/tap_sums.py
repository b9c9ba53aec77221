"""Tap sums: every channel summed over the positions that each tap of a scoring kernel meets, in float32.

A program sums a range of positions of a block of channels, so that a small batch still fills the chip; the ranges'
sums are added up by who reads them, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features, grids
from ..gpu.grids import cdiv
from . import launch, tuning
from .common import Size, kernel_strides, position_offsets
from .epilogue import tap_sums_of


@triton.jit
def tap_sums_kernel(
    x,  # [B, C, T, H, W]
    sums,  # [B, parts, C, TAPS] float32
    channels,
    size,
    stride,
    TAPS: tl.constexpr,
    FLAT_POSITIONS: tl.constexpr,
    INDEX_64: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Axis 1 of the grid is the parts."""
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    b = tl.program_id(0)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    positions = size.t * size.h * size.w
    steps = tl.cdiv(tl.cdiv(positions, BP), parts)
    start = x + b.to(tl.int64) * stride.b
    column = c * stride.c
    if INDEX_64:
        column = c.to(tl.int64) * stride.c
    # One tap is added up position by position and summed once; nine are summed as they come.
    by_position = tl.zeros((BP, BC), tl.float32)
    total = tl.zeros((16 if TAPS == 9 else 1, BC), tl.float32)
    for step in range(0, steps):
        p = (part * steps + step) * BP + tl.arange(0, BP)
        offsets = position_offsets(p, size, stride, FLAT_POSITIONS, INDEX_64)
        mask = (p < positions)[:, None] & (c < channels)[None, :]
        v = tl.load(start + (offsets[:, None] + column[None, :]), mask=mask, other=0.0).to(tl.float32)
        if TAPS == 1:
            by_position += v
        else:
            total += tap_sums_of(v, p // size.w % size.h, p % size.w, size, TAPS)
    if TAPS == 1:
        total = tl.sum(by_position, 0)[None, :]
    tap = tl.arange(0, total.shape[0])[:, None]
    out = sums + (b.to(tl.int64) * parts + part) * channels * TAPS
    tl.store(out + c[None, :] * TAPS + tap, total, mask=(c < channels)[None, :] & (tap < TAPS))


@launch.remembered
def sums_launch(
    shape: torch.Size, strides: tuple[int, ...], parts: int, taps: int, tile: tuning.SumTile, index_64: bool
) -> launch.Launch:
    stride, is_flat = kernel_strides(shape, strides)
    return launch.Launch(
        (shape[0], parts, cdiv(shape[1], tile.channels)), (shape[1], Size(*shape[2:]), stride),
        TAPS=taps, FLAT_POSITIONS=is_flat, INDEX_64=index_64,
        BP=grids.SUM_POSITIONS, BC=tile.channels, num_warps=tile.warps,
    )  # fmt: skip


def partial_tap_sums(x: Tensor, taps: int) -> Tensor:
    """``(B, parts, C, taps)`` float32 of ``x (B, C, T, H, W)``: enough parts that a small batch fills the chip."""
    b, c, *size = x.shape
    tile = tuning.SUMS[taps]
    parts = grids.tap_sum_parts(b, size[0] * size[1] * size[2], c, tile.channels, launch.chip(x.device)[1])
    sums = x.new_empty((b, parts, c, taps), dtype=torch.float32)
    if sums.numel():
        with features.on_device(x):
            one = sums_launch(x.shape, x.stride(), parts, taps, tile, features.needs_int64(x))
            launch.start(tap_sums_kernel, one, (x, sums))
    return sums
