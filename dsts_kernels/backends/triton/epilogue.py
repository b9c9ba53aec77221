"""How a tile of a convolution ends: the fixup of a shared one, bias, ReLU, skip, the store, and tap sums of it."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import box_positions, inside


@triton.jit
def tap_sums_of(v, h, w, size, TAPS: tl.constexpr):
    """``[TAPS, BN]``: sums of ``v [positions, BN]`` over those that each tap of a scoring kernel meets.

    A 1x1x1 kernel has one tap; the nine of a 1x3x3 kernel come in 16 rows, the rest zero.
    """
    if TAPS == 1:
        sums = tl.sum(v, 0)[None, :]
    else:
        row = tl.arange(0, 16)[:, None]
        sums = tl.zeros((16, v.shape[1]), tl.float32)
        for tap in tl.static_range(9):
            met = ((tap // 3 != 0) | (h != size.h - 1)) & ((tap // 3 != 2) | (h != 0))
            met &= ((tap % 3 != 0) | (w != size.w - 1)) & ((tap % 3 != 2) | (w != 0))
            sums = tl.where(row == tap, tl.sum(tl.where(met[:, None], v, 0.0), 0)[None, :], sums)
    return sums


@triton.jit
def part_of(acc, part: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Columns ``part * BN // PARTS`` and on of a tile ``[BM, BN]``; ``PARTS`` is 1, 2 or 4."""
    if PARTS == 1:
        columns = acc
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        half = left if part < PARTS // 2 else right
        columns = part_of(half, part % (PARTS // 2), PARTS // 2, BM, BN // 2)
    return columns


@triton.jit
def epilogue(
    v,
    m,
    o,
    b,
    start,
    bias,  # [O] of the sample's neuron, or None
    skip,  # [B, O, T, H, W] with the strides of out, or None
    out,  # [B, O, T, H, W]
    size,
    outputs,
    stride,
    RELU: tl.constexpr,
    SUM_TAPS: tl.constexpr,
    INDEX_64: tl.constexpr,
    BOX: tl.constexpr,
):
    """Writes outputs ``o`` of positions ``m`` of the box at ``start``; returns the tap sums of what it wrote."""
    t, h, w = box_positions(m, start, BOX)
    if bias is not None:
        v += tl.load(bias + o, mask=o < outputs, other=0.0)[None, :]
    if RELU:
        v = tl.where(v < 0, 0.0, v)  # keeps NaN, as torch does
    valid = inside(t, h, w, size)[:, None]
    mask = valid & (o < outputs)[None, :]
    if INDEX_64:
        position = t.to(tl.int64) * stride.t + h.to(tl.int64) * stride.h + w.to(tl.int64) * stride.w
        column = o.to(tl.int64) * stride.c
    else:
        position = t * stride.t + h * stride.h + w * stride.w
        column = o * stride.c
    offsets = position[:, None] + column[None, :]
    sample = b.to(tl.int64) * stride.b
    if skip is not None:
        v += tl.load(skip + sample + offsets, mask=mask, other=0.0).to(tl.float32)
    y = v.to(out.dtype.element_ty)
    tl.store(out + sample + offsets, y, mask=mask)
    if SUM_TAPS == 0:
        sums = 0.0
    else:
        sums = tap_sums_of(tl.where(valid, y.to(tl.float32), 0.0), h, w, size, SUM_TAPS)
    return sums


@triton.jit
def fixup(
    workspace,  # [2 * programs, BM, BN] float32
    m,
    starts,
    used,
    tile_start,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BN: tl.constexpr,
):
    """``[m, BN]`` of a tile that several programs computed: the sum of their parts, in order.

    ``used [PROGRAMS]`` says which, and ``starts [PROGRAMS]`` where their ranges start. A program keeps up to two parts:
    first that of a tile it began at the front, then that of a tile within which its range starts.
    """
    q = tl.arange(0, PROGRAMS)
    cell = m[:, None] * BN + tl.arange(0, BN)[None, :]
    v = tl.zeros((m.shape[0], BN), tl.float32)
    first = tl.min(tl.where(used, q, PROGRAMS), 0)
    last = tl.max(tl.where(used, q, -1), 0)
    for p in range(first, last + 1):
        here = (q == p) & used
        if tl.sum(here.to(tl.int32), 0) > 0:
            slot = 2 * p + tl.sum(tl.where(here & (starts > tile_start), 1, 0), 0)
            v += tl.load(workspace + slot.to(tl.int64) * SIZE + cell, cache_modifier=".cg")
    return v


@triton.jit
def write_sums(
    sums,
    box_sums,  # [B, boxes, O, TAPS] float32
    b,
    box,
    boxes,
    o,
    outputs,
    TAPS: tl.constexpr,
):
    """Keeps the tap sums of one box, until the last of its sample's boxes comes."""
    tap = tl.arange(0, sums.shape[0])[:, None]
    start = box_sums + (b * boxes + box).to(tl.int64) * outputs * TAPS
    tl.store(start + o[None, :] * TAPS + tap, sums, mask=(o < outputs)[None, :] & (tap < TAPS))


@triton.jit
def add_boxes(
    box_sums,  # [B, boxes, O, TAPS] float32
    sums,  # [B, O, TAPS] float32
    arrival_counters,  # [B, tiles across outputs]
    b,
    boxes,
    o0,
    outputs,
    TAPS: tl.constexpr,
    TAP_ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    """The last of a sample's boxes to come here adds up the tap sums of all of them, in order, and leaves a zero."""
    tl.debug_barrier()
    counter = arrival_counters + b * tl.cdiv(outputs, BN) + o0 // BN
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == boxes - 1:
        tl.debug_barrier()
        tl.store(counter, 0)
        o = o0 + tl.arange(0, BN)
        tap = tl.arange(0, TAP_ROWS)[:, None]
        cell = o[None, :] * TAPS + tap
        mask = (o < outputs)[None, :] & (tap < TAPS)
        start = box_sums + (b * boxes).to(tl.int64) * outputs * TAPS
        whole = tl.zeros((TAP_ROWS, BN), tl.float32)
        for i in range(0, boxes):
            piece = start + tl.cast(i, tl.int64) * outputs * TAPS
            whole += tl.load(piece + cell, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(sums + b.to(tl.int64) * outputs * TAPS + cell, whole, mask=mask)
