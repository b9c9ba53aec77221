"""How a tile of a convolution ends: parts added up, bias, ReLU, skip, the store, and tap sums of what was stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import box_positions, inside


@triton.jit
def tap_sums_of(v, h, w, h_size, w_size, TAPS: tl.constexpr):
    """``[TAPS, BN]``: sums of ``v [rows, BN]`` over the positions that each tap of a scoring kernel meets.

    A 1x1x1 kernel has one tap; the nine of a 1x3x3 kernel come in 16 rows, the rest zero.
    """
    if TAPS == 1:
        found = tl.sum(v, 0)[None, :]
    else:
        row = tl.arange(0, 16)[:, None]
        found = tl.zeros((16, v.shape[1]), tl.float32)
        for tap in tl.static_range(9):
            met = ((tap // 3 != 0) | (h != h_size - 1)) & ((tap // 3 != 2) | (h != 0))
            met &= ((tap % 3 != 0) | (w != w_size - 1)) & ((tap % 3 != 2) | (w != 0))
            found = tl.where(row == tap, tl.sum(tl.where(met[:, None], v, 0.0), 0)[None, :], found)
    return found


@triton.jit
def part_of(acc, part: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Columns ``part * BN // PARTS`` and on of a tile ``[BM, BN]``; ``PARTS`` is 1, 2 or 4."""
    if PARTS == 1:
        found = acc
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        half = left if part < PARTS // 2 else right
        found = part_of(half, part % (PARTS // 2), PARTS // 2, BM, BN // 2)
    return found


@triton.jit
def finish(
    v,
    m,
    o,
    b,
    t0,
    h0,
    w0,
    bias,
    skip,
    out,
    t_size,
    h_size,
    w_size,
    outputs,
    stride_b,
    stride_o,
    stride_t,
    stride_h,
    stride_w,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SUM_TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Writes outputs ``o`` of positions ``m`` of a box; returns the tap sums of what it wrote."""
    t, h, w = box_positions(m, t0, h0, w0, BH, BW)
    if HAS_BIAS:
        v += tl.load(bias + o, mask=o < outputs, other=0.0)[None, :]
    if RELU:
        v = tl.where(v < 0, 0.0, v)  # keeps NaN, as torch does
    valid = inside(t, h, w, t_size, h_size, w_size)[:, None]
    mask = valid & (o < outputs)[None, :]
    if WIDE:
        place = t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
        column = o.to(tl.int64) * stride_o
    else:
        place = t * stride_t + h * stride_h + w * stride_w
        column = o * stride_o
    offsets = place[:, None] + column[None, :]
    start = b.to(tl.int64) * stride_b
    if HAS_SKIP:
        v += tl.load(skip + start + offsets, mask=mask, other=0.0).to(tl.float32)
    y = v.to(out.dtype.element_ty)
    tl.store(out + start + offsets, y, mask=mask)
    if SUM_TAPS == 0:
        found = 0.0
    else:
        found = tap_sums_of(tl.where(valid, y.to(tl.float32), 0.0), h, w, h_size, w_size, SUM_TAPS)
    return found


@triton.jit
def add_parts(partial, rows, starts, used, tile_start, SIZE: tl.constexpr, PROGRAMS: tl.constexpr, BN: tl.constexpr):
    """``[rows, BN]`` of a tile that several programs computed: the sum of their parts, in order."""
    q = tl.arange(0, PROGRAMS)
    cell = rows[:, None] * BN + tl.arange(0, BN)[None, :]
    v = tl.zeros((rows.shape[0], BN), tl.float32)
    first = tl.min(tl.where(used, q, PROGRAMS), 0)
    last = tl.max(tl.where(used, q, -1), 0)
    for p in range(first, last + 1):
        here = (q == p) & used
        if tl.sum(here.to(tl.int32), 0) > 0:
            slot = 2 * p + tl.sum(tl.where(here & (starts > tile_start), 1, 0), 0)
            v += tl.load(partial + slot.to(tl.int64) * SIZE + cell, cache_modifier=".cg")
    return v


@triton.jit
def write_sums(found, part_sums, b, box, boxes, o, outputs, TAPS: tl.constexpr):
    """Keeps the tap sums of one box, until the last of its sample's boxes comes."""
    tap = tl.arange(0, found.shape[0])[:, None]
    start = part_sums + (b * boxes + box).to(tl.int64) * outputs * TAPS
    tl.store(start + o[None, :] * TAPS + tap, found, mask=(o < outputs)[None, :] & (tap < TAPS))


@triton.jit
def add_boxes(
    part_sums, sums, counters, b, boxes, o0, outputs, TAPS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr
):
    """The last of a sample's boxes to come here adds up the tap sums of all of them, in order."""
    tl.debug_barrier()
    before = tl.atomic_add(counters + b * tl.cdiv(outputs, BN) + o0 // BN, 1, sem="acq_rel")
    if before == boxes - 1:
        tl.debug_barrier()
        o = o0 + tl.arange(0, BN)
        tap = tl.arange(0, ROWS)[:, None]
        cell = o[None, :] * TAPS + tap
        mask = (o < outputs)[None, :] & (tap < TAPS)
        start = part_sums + (b * boxes).to(tl.int64) * outputs * TAPS
        whole = tl.zeros((ROWS, BN), tl.float32)
        for i in range(0, boxes):
            piece = start + tl.cast(i, tl.int64) * outputs * TAPS
            whole += tl.load(piece + cell, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(sums + b.to(tl.int64) * outputs * TAPS + cell, whole, mask=mask)
