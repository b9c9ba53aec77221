"""What kernels share: sizes and strides as arguments, fields of a plan, boxes of positions, shifted by a tap."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..gpu import features
from ..gpu.lists import Plan

PLAN = tl.constexpr(len(Plan._fields))  # int32 of a plan


class Size(NamedTuple):
    """Frames, rows and columns of features: one argument of a kernel."""

    t: int
    h: int
    w: int


class Strides(NamedTuple):
    """Strides of features ``(B, C, T, H, W)``: one argument of a kernel."""

    b: int
    c: int
    t: int
    h: int
    w: int


def kernel_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[Strides, bool]:
    """Strides of features ``(B, C, T, H, W)``, and whether positions are ``w`` apart: FLAT_POSITIONS."""
    found, is_flat = features.strides_for_kernels(shape, strides)
    return Strides(*found), is_flat


@triton.jit
def plan_at(plans, row, FIELD: tl.constexpr):
    """Where a field of plan ``row`` of ``plans [rows, PLAN]`` lies.

    A test holds the numbers to :class:`..gpu.lists.Plan`. They are no global constexprs, because every launch compares
    each of those that its kernel reads with the value at compilation, in Python (0.7 us each).
    """
    if FIELD == "filters":
        index: tl.constexpr = 0
    elif FIELD == "spatial_blocks":
        index: tl.constexpr = 1
    elif FIELD == "temporal_blocks":
        index: tl.constexpr = 2
    elif FIELD == "spatial_channels":
        index: tl.constexpr = 3
    elif FIELD == "temporal_start":
        index: tl.constexpr = 4
    elif FIELD == "row":
        index: tl.constexpr = 5
    return plans + row * 6 + index


@triton.jit
def plan_field(plans, row, FIELD: tl.constexpr):
    """A field of plan ``row``."""
    return tl.load(plan_at(plans, row, FIELD))


@triton.jit
def box_start(box, size, BOX: tl.constexpr):
    """First frame, row and column of box number ``box`` of features."""
    boxes_h = tl.cdiv(size.h, BOX.h)
    boxes_w = tl.cdiv(size.w, BOX.w)
    return box // (boxes_h * boxes_w) * BOX.t, box // boxes_w % boxes_h * BOX.h, box % boxes_w * BOX.w


@triton.jit
def boxes_of(size, BOX: tl.constexpr):
    """Boxes of a sample."""
    return tl.cdiv(size.t, BOX.t) * tl.cdiv(size.h, BOX.h) * tl.cdiv(size.w, BOX.w)


@triton.jit
def box_positions(m, start, BOX: tl.constexpr):
    """Frame, row and column of positions ``m`` of a box that starts at ``start``."""
    t0, h0, w0 = start
    return t0 + m // (BOX.h * BOX.w), h0 + m // BOX.w % BOX.h, w0 + m % BOX.w


@triton.jit
def position_offsets(p, size, stride, FLAT_POSITIONS: tl.constexpr, INDEX_64: tl.constexpr):
    """Offsets of positions ``p`` of a sample. ``FLAT_POSITIONS`` are ``stride.w`` apart, which lets loads be wide."""
    if INDEX_64:
        p = p.to(tl.int64)
    if FLAT_POSITIONS:
        offsets = p * stride.w
    else:
        offsets = p // (size.h * size.w) * stride.t + p // size.w % size.h * stride.h + p % size.w * stride.w
    return offsets


@triton.jit
def inside(t, h, w, size):
    """Whether positions lie in the features."""
    return (t >= 0) & (t < size.t) & (h >= 0) & (h < size.h) & (w >= 0) & (w < size.w)


@triton.jit
def tap_shift(tap, KERNEL: tl.constexpr, SIGN: tl.constexpr):
    """How far tap ``tap`` of a zero-padded kernel reaches, in frames, rows and columns; ``SIGN`` -1 turns it round."""
    KT: tl.constexpr = KERNEL[0]
    KH: tl.constexpr = KERNEL[1]
    KW: tl.constexpr = KERNEL[2]
    dt = tap // (KH * KW) - KT // 2
    dh = tap // KW % KH - KH // 2
    dw = tap % KW - KW // 2
    return SIGN * dt, SIGN * dh, SIGN * dw


@triton.jit
def load_box(
    panel,  # [B, T, H, W, width], or with TMA a descriptor of that box of it
    b,
    start,
    column,
    size,
    width,
    TMA: tl.constexpr,
    INDEX_64: tl.constexpr,
    BOX: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``[positions of BOX, COLUMNS]`` of a panel, from position ``start`` on: zero wherever the box leaves the sample.

    ``INDEX_64`` counts in 64 bits within a sample.
    """
    t0, h0, w0 = start
    if TMA:
        box = panel.load([b, t0, h0, w0, column]).reshape(BOX.t * BOX.h * BOX.w, COLUMNS)
    else:
        t, h, w = box_positions(tl.arange(0, BOX.t * BOX.h * BOX.w), start, BOX)
        k = column + tl.arange(0, COLUMNS)
        sample = b.to(tl.int64) * size.t * size.h * size.w * width
        row = (t * size.h + h) * size.w + w
        if INDEX_64:
            row = row.to(tl.int64)
        mask = inside(t, h, w, size)[:, None] & (k < width)[None, :]
        box = tl.load(panel + sample + ((row * width)[:, None] + k[None, :]), mask=mask, other=0.0)
    return box
