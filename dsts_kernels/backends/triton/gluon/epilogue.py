"""How a tile of the Gluon convolution ends: bias, ReLU, skip, the store and tap sums, as in :mod:`..epilogue`.

A part of the accumulator goes through shared memory once, in float32, into a layout in which a warp holds whole rows of
memory. All that follows is done there: 16 bytes a lane travel where channels lie side by side, and sums over positions
need a third of the shuffles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .api import barrier


@gluon.jit
def part_of(acc, part: gl.constexpr, PARTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Columns ``part * BN // PARTS`` and on of a tile ``[BM, BN]``; ``PARTS`` is a power of two."""
    if PARTS == 1:
        columns = acc
    else:
        left, right = gl.split(gl.permute(gl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        half = left if part < PARTS // 2 else right
        columns = part_of(half, part % (PARTS // 2), PARTS // 2, BM, BN // 2)
    return columns


@gluon.jit
def taps_of(stored, h, w, size, tap: gl.constexpr, TAPS: gl.constexpr):
    """What tap ``tap`` of a scoring kernel of ``TAPS`` meets of ``stored [positions, outputs]``; zero elsewhere."""
    if TAPS == 1:
        met = stored
    else:
        keep = ((tap // 3 != 0) | (h != size.h - 1)) & ((tap // 3 != 2) | (h != 0))
        keep &= ((tap % 3 != 0) | (w != size.w - 1)) & ((tap % 3 != 2) | (w != 0))
        met = gl.where(keep[:, None], stored, 0.0)
    return met


@gluon.jit
def places_of(b, start, o, size, stride, INDEX_64: gl.constexpr, BOX: gl.constexpr, rows: gl.constexpr):
    """Of the positions of a box at ``start``, in layout ``rows``: rows and columns of a frame, which are in the
    features, and where ``[positions, columns o]`` of sample ``b`` lie."""
    t0, h0, w0 = start
    m = gl.arange(0, BOX.t * BOX.h * BOX.w, gl.SliceLayout(1, rows))
    t = t0 + m // (BOX.h * BOX.w)
    h = h0 + m // BOX.w % BOX.h
    w = w0 + m % BOX.w
    inside = (t < size.t) & (h < size.h) & (w < size.w)
    if INDEX_64:
        position = t.to(gl.int64) * stride.t + h.to(gl.int64) * stride.h + w.to(gl.int64) * stride.w
        column = o.to(gl.int64) * stride.c
    else:
        position = t * stride.t + h * stride.h + w * stride.w
        column = o * stride.c
    return h, w, inside, b.to(gl.int64) * stride.b + (position[:, None] + column[None, :])


@gluon.jit
def end_part(
    v,  # [BM, PART] float32
    b,
    box,
    boxes,
    start,
    o0,
    bias,  # [O] of the sample's neuron, or None
    skip,  # [B, O, T, H, W] with the strides of out, or None
    out,  # [B, O, T, H, W]
    box_sums,  # [B, boxes, O, SUM_TAPS] float32, or None
    size,
    stride,
    outputs,
    RELU: gl.constexpr,
    SUM_TAPS: gl.constexpr,
    INDEX_64: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    BOX: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Ends outputs ``o0`` and on of one box of positions, which starts at ``start``."""
    PART: gl.constexpr = v.shape[1]
    # 8 outputs a lane; a warp has the part's outputs of some positions. Nine taps of features that lie channels-first,
    # which no module asks for, are summed so too: in the other layout they spill.
    if CHANNELS_LAST or SUM_TAPS == 9:
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [WARPS, 1], [1, 0])
    else:  # a lane a position
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS // 2, 2], [0, 1])
    v = gl.convert_layout(v, rows)
    o = o0 + gl.arange(0, PART, gl.SliceLayout(0, rows))
    h, w, inside, offsets = places_of(b, start, o, size, stride, INDEX_64, BOX, rows)
    mask = inside[:, None] & (o < outputs)[None, :]
    if bias is not None:
        v += gl.load(bias + o, mask=o < outputs, other=0.0)[None, :]
    if RELU:
        v = gl.where(v < 0, 0.0, v)  # keeps NaN, as torch does
    if skip is not None:
        v += gl.load(skip + offsets, mask=mask, other=0.0).to(gl.float32)
    y = v.to(out.dtype.element_ty)
    gl.store(out + offsets, y, mask=mask)
    if SUM_TAPS != 0:
        stored = gl.where(inside[:, None], y.to(gl.float32), 0.0)
        cell = box_sums + (b * boxes + box).to(gl.int64) * outputs * SUM_TAPS + o * SUM_TAPS
        for tap in gl.static_range(SUM_TAPS):
            met = taps_of(stored, h, w, size, tap, SUM_TAPS)
            gl.store(cell + tap, gl.sum(met, 0), mask=o < outputs)


@gluon.jit
def add_boxes(
    box_sums,  # [B, boxes, O, TAPS] float32
    sums,  # [B, O, TAPS] float32
    arrival_counters,  # [B, tiles across outputs]
    b,
    boxes,
    o0,
    outputs,
    TAPS: gl.constexpr,
    CELLS: gl.constexpr,
    AT_ONCE: gl.constexpr,
    BN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The last of a sample's boxes to come here adds up the tap sums of all of them, in order.

    ``CELLS``, a power of two, holds a tile's ``BN * TAPS``; so many of ``AT_ONCE`` boxes are asked for at a time.
    """
    barrier()
    before = gl.atomic_add(arrival_counters + b * gl.cdiv(outputs, BN) + o0 // BN, 1, sem="acq_rel")
    if before == boxes - 1:
        barrier()
        layout: gl.constexpr = gl.BlockedLayout([AT_ONCE, 1], [1, 32], [1, WARPS], [1, 0])
        cell = gl.arange(0, CELLS, gl.SliceLayout(0, layout))
        i = gl.arange(0, AT_ONCE, gl.SliceLayout(1, layout))
        mine = cell < gl.minimum(outputs - o0, BN) * TAPS
        whole = gl.zeros([CELLS], gl.float32, gl.SliceLayout(0, layout))
        for first in range(0, boxes, AT_ONCE):
            box = (b * boxes + first + i).to(gl.int64) * outputs * TAPS + o0 * TAPS
            there = (first + i < boxes)[:, None] & mine[None, :]
            part = gl.load(box_sums + box[:, None] + cell[None, :], mask=there, other=0.0, cache_modifier=".cg")
            whole += gl.sum(part, 0)
        gl.store(sums + (b.to(gl.int64) * outputs + o0) * TAPS + cell, whole, mask=mine)
