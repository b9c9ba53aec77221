"""What kernels share: where a tile's positions lie, and loading them shifted by a tap of a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def box_start(tile, t_size, h_size, w_size, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """First frame, row and column of a box."""
    boxes_h = tl.cdiv(h_size, BH)
    boxes_w = tl.cdiv(w_size, BW)
    return tile // (boxes_h * boxes_w) * BT, tile // boxes_w % boxes_h * BH, tile % boxes_w * BW


@triton.jit
def box_positions(m, t0, h0, w0, BH: tl.constexpr, BW: tl.constexpr):
    """Frame, row and column of positions ``m`` of a box."""
    return t0 + m // (BH * BW), h0 + m // BW % BH, w0 + m % BW


@triton.jit
def position_offsets(p, h_size, w_size, stride_t, stride_h, stride_w, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of positions ``p`` of a sample. ``FLAT`` positions are ``stride_w`` apart, which lets loads be wide."""
    if WIDE:
        p = p.to(tl.int64)
    if FLAT:
        place = p * stride_w
    else:
        place = p // (h_size * w_size) * stride_t + p // w_size % h_size * stride_h + p % w_size * stride_w
    return place


@triton.jit
def inside(t, h, w, t_size, h_size, w_size):
    return (t >= 0) & (t < t_size) & (h >= 0) & (h < h_size) & (w >= 0) & (w < w_size)


@triton.jit
def tap_shift(tap, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr):
    """How far tap ``tap`` of a zero-padded kernel reaches, in frames, rows and columns; ``SIGN`` -1 turns it round."""
    dt = tap // (KH * KW) - KT // 2
    dh = tap // KW % KH - KH // 2
    dw = tap % KW - KW // 2
    return SIGN * dt, SIGN * dh, SIGN * dw


@triton.jit
def load_box(
    panel,
    b,
    t0,
    h0,
    w0,
    column,
    t_size,
    h_size,
    w_size,
    width,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``[BT*BH*BW, COLUMNS]`` of a panel ``(B, T, H, W, width)``: zero wherever the box leaves the sample.

    ``panel`` is a tensor descriptor of that box with ``TMA``, else a pointer to a dense panel. ``WIDE`` counts in
    64 bits within a sample.
    """
    if TMA:
        box = panel.load([b, t0, h0, w0, column]).reshape(BT * BH * BW, COLUMNS)
    else:
        t, h, w = box_positions(tl.arange(0, BT * BH * BW), t0, h0, w0, BH, BW)
        k = column + tl.arange(0, COLUMNS)
        start = b.to(tl.int64) * t_size * h_size * w_size * width
        row = (t * h_size + h) * w_size + w
        if WIDE:
            row = row.to(tl.int64)
        mask = inside(t, h, w, t_size, h_size, w_size)[:, None] & (k < width)[None, :]
        box = tl.load(panel + start + ((row * width)[:, None] + k[None, :]), mask=mask, other=0.0)
    return box
