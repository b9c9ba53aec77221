"""Gradients of features and gates on Hopper, in Gluon: what :mod:`..data_gradient` does where gates train.

Dealt out as :mod:`.conv`: a CTA on every multiprocessor, tiles of ``BM`` positions by ``BN`` channels in turn, a
producer warp that brings boxes of the gradient, shifted back by each tap, and boxes of filters.

A tile needs the data gradients of both operators apart. One accumulator of 128x256 serves both in turn, which asks a
quarter less of L2 than two of 128x128: the spatial operator's goes to the CTA's piece of ``parked`` (128 KiB in L2, in
float32, so nothing is rounded), the temporal one's stays in registers, and the end of the tile reads the former again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...gpu import features
from ...gpu.lists import Lists
from .. import launch
from ..common import Size, Strides, box_start, boxes_of, plan_field
from ..conv import k_block
from . import plan as plans
from .api import barrier
from .conv import place_of
from .epilogue import part_of, places_of
from .ring import box_of, bring, multiply, open_ring


@gluon.jit
def blocks_of(plan, b, outputs, BK: gl.constexpr):
    """K blocks of a tap for sample ``b``; none for a neuron out of range."""
    return gl.where(plan_field(plan, b, "filters") < 0, 0, gl.cdiv(outputs, BK))


@gluon.jit
def produce(
    grad,  # descriptor of [1, *BOX, BK] of [B, T, H, W, O]
    filters,  # descriptor of [1, BN, BK] of [slots * 12, C, O]
    plan,  # [B, PLAN] int32
    grad_ring,  # [STAGES, 1, *BOX, BK] shared
    filter_ring,  # [STAGES, 1, BN, BK] shared
    ready,  # [STAGES] barriers
    free,  # [STAGES] barriers
    tiles,
    size,
    channels,
    outputs,
    BOX: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: every step's two boxes, the spatial operator's first."""
    BYTES: gl.constexpr = (BOX.t * BOX.h * BOX.w + BN) * BK * 2  # of a stage, in half types
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, box, c0 = place_of(tile, size, channels, BOX, BN)
        t0, h0, w0 = box_start(box, size, BOX)
        first = plan_field(plan, b, "filters") * 12
        blocks = blocks_of(plan, b, outputs, BK)
        for k in range(0, 12 * blocks):
            is_spatial, block, tap, _, shift = k_block(k, blocks, (1, 3, 3), 3, -1)
            dt, dh, dw = shift
            corner = [b, t0 + dt, h0 + dh, w0 + dw, block * BK]
            place = [first + gl.where(is_spatial, tap, 9 + tap), c0, block * BK]
            bring(grad, corner, filters, place, grad_ring, filter_ring, ready, free, step, BYTES, STAGES)
            step += 1


@gluon.jit
def park(acc, place, BM: gl.constexpr, BN: gl.constexpr):
    """Stores ``acc [BM, BN]`` at ``place``, as soon as everybody is done with what lay there; all see it after."""
    m = gl.arange(0, BM, gl.SliceLayout(1, acc.type.layout))
    n = gl.arange(0, BN, gl.SliceLayout(0, acc.type.layout))
    barrier()
    gl.store(place + (m * BN)[:, None] + n[None, :], acc)
    barrier()


@gluon.jit
def ask(
    parked,  # [BM, BN] float32 from the part's first column on
    b,
    start,
    c0,
    x,  # [B, C, T, H, W]
    size,
    stride,
    channels,
    INDEX_64: gl.constexpr,
    BOX: gl.constexpr,
    BN: gl.constexpr,
    PART: gl.constexpr,
    rows: gl.constexpr,
):
    """What the end of a part needs from memory, in layout ``rows``: sums that lie parked, and features, zero outside.

    Asked for one part ahead where channels lie side by side, as a trip to memory takes about as long as a part.
    """
    m = gl.arange(0, BOX.t * BOX.h * BOX.w, gl.SliceLayout(1, rows))
    n = gl.arange(0, PART, gl.SliceLayout(0, rows))
    spatial = gl.load(parked + (m * BN)[:, None] + n[None, :])
    _, _, inside, offsets = places_of(b, start, c0 + n, size, stride, INDEX_64, BOX, rows)
    return spatial, gl.load(x + offsets, mask=inside[:, None] & (c0 + n < channels)[None, :], other=0.0)


@gluon.jit
def end_part(
    spatial,  # [BM, PART] float32 in layout rows: the data gradient of the spatial operator
    temporal,  # [BM, PART] float32: that of the temporal one
    v,  # [BM, PART] features in layout rows, zero outside
    b,
    box,
    boxes,
    start,
    c0,
    has_filters,
    gate,  # [B, C]
    dx,  # [B, C, T, H, W], or None
    dgate,  # [B, boxes, C] float32
    size,
    stride,
    channels,
    INDEX_64: gl.constexpr,
    BOX: gl.constexpr,
    rows: gl.constexpr,
):
    """Both gradients of channels ``c0`` and on of one box of positions. Without filters both are NaN."""
    temporal = gl.convert_layout(temporal, rows)
    c = c0 + gl.arange(0, temporal.shape[1], gl.SliceLayout(0, rows))
    known = c < channels
    products = gl.where(has_filters, gl.sum(v.to(gl.float32) * (spatial - temporal), 0), float("nan"))
    gl.store(dgate + (b * boxes + box).to(gl.int64) * channels + c, products, mask=known)
    if dx is not None:
        g = gl.load(gate + b.to(gl.int64) * channels + c, mask=known, other=0.0).to(gl.float32)
        g = gl.where(has_filters, g, float("nan"))[None, :]
        d = gl.where(g == 0.0, 0.0, g * spatial) + gl.where(g == 1.0, 0.0, (1.0 - g) * temporal)
        _, _, inside, offsets = places_of(b, start, c, size, stride, INDEX_64, BOX, rows)
        gl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside[:, None] & known[None, :])


@gluon.jit
def consume(
    plan,  # [B, PLAN] int32
    gate,  # [B, C]
    x,  # [B, C, T, H, W] with the strides of dx
    dx,  # [B, C, T, H, W], or None
    dgate,  # [B, boxes, C] float32
    parked,  # [programs, BM, BN] float32
    grad_ring,
    filter_ring,
    ready,
    free,
    tiles,
    size,
    stride,
    channels,
    outputs,
    INDEX_64: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    BOX: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The consumers: the spatial operator's products, parked, the temporal one's, and the end of each tile."""
    BM: gl.constexpr = BOX.t * BOX.h * BOX.w
    PARTS: gl.constexpr = BN // PART
    if CHANNELS_LAST:  # 8 channels a lane
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [WARPS, 1], [1, 0])
    else:  # a lane a position
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS // 2, 2], [0, 1])
    boxes = boxes_of(size, BOX)
    own = parked + gl.program_id(0) * (BM * BN)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, box, c0 = place_of(tile, size, channels, BOX, BN)
        blocks = blocks_of(plan, b, outputs, BK)
        acc, step = multiply(grad_ring, filter_ring, ready, free, step, 9 * blocks, BM, BN, BK, STAGES, WARPS)
        park(acc, own, BM, BN)
        acc, step = multiply(grad_ring, filter_ring, ready, free, step, 3 * blocks, BM, BN, BK, STAGES, WARPS)
        start = box_start(box, size, BOX)
        has_filters = plan_field(plan, b, "filters") >= 0
        spatial, v = ask(own, b, start, c0, x, size, stride, channels, INDEX_64, BOX, BN, PART, rows)
        for part in gl.static_range(PARTS):
            here_spatial, here_v = spatial, v
            if part + 1 < PARTS:
                behind = own + (part + 1) * PART
                c = c0 + (part + 1) * PART
                if CHANNELS_LAST:  # one part ahead; elsewhere that would spill in Triton 3.6
                    spatial, v = ask(behind, b, start, c, x, size, stride, channels, INDEX_64, BOX, BN, PART, rows)
            end_part(
                here_spatial, part_of(acc, part, PARTS, BM, BN), here_v, b, box, boxes, start, c0 + part * PART,
                has_filters, gate, dx, dgate, size, stride, channels, INDEX_64, BOX, rows,
            )  # fmt: skip
            if part + 1 < PARTS:
                if not CHANNELS_LAST:
                    spatial, v = ask(behind, b, start, c, x, size, stride, channels, INDEX_64, BOX, BN, PART, rows)


@gluon.jit(do_not_specialize=["tiles"])  # or every batch would be compiled anew
def data_gradient_gluon_kernel(
    grad,  # descriptor of [1, *BOX, BK] of [B, T, H, W, O]
    filters,  # descriptor of [1, BN, BK] of [slots * 12, C, O]
    plan,  # [B, PLAN] int32
    gate,  # [B, C]
    x,  # [B, C, T, H, W] with the strides of dx
    dx,  # [B, C, T, H, W], or None where only gates train
    dgate,  # [B, boxes, C] float32, added up over boxes afterwards
    parked,  # [programs, BM, BN] float32
    size,
    stride,
    tiles,
    channels,
    outputs,
    INDEX_64: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    BOX: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """One persistent launch; see the top of this file."""
    grad_ring, filter_ring, ready, free = open_ring(grad, filters, STAGES)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    plan, gate, x, dx, dgate, parked, grad_ring, filter_ring, ready, free, tiles, size, stride,
                    channels, outputs, INDEX_64, CHANNELS_LAST, BOX, BN, BK, PART, STAGES, WARPS,
                ),
            ),
            (
                produce,
                (
                    grad, filters, plan, grad_ring, filter_ring, ready, free, tiles, size, channels, outputs,
                    BOX, BN, BK, STAGES,
                ),
            ),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


@launch.remembered
def gradient_launch(
    shape: torch.Size, strides: tuple[int, ...], outputs: int, grid: plans.WaveGrid, index_64: bool
) -> launch.Launch:
    b, c, *size = shape
    tile, channels_last = grid.tile, strides[1] == 1
    return launch.Launch(
        (grid.ctas,),
        (Size(*size), Strides(*strides), b * grid.tiles.per_sample, c, outputs),
        INDEX_64=index_64,
        CHANNELS_LAST=channels_last,
        BOX=grid.box,
        BN=tile.n,
        BK=tile.k,
        PART=min(plans.GRADIENT_PART if channels_last else plans.GRADIENT_PART // 2, tile.n),  # whole ones would spill
        STAGES=tile.stages,
        WARPS=plans.CONSUMER_WARPS,
        PRODUCER_WARPS=plans.PRODUCER_WARPS,
        PRODUCER_REGISTERS=plans.PRODUCER_REGISTERS,
        num_warps=plans.CONSUMER_WARPS,
    )


def data_gradient(
    grad_ndhwc: Tensor,  # (B, T, H, W, O), half
    x: Tensor,  # (B, C, T, H, W) with the strides of dx
    gate: Tensor,  # (B, C)
    lists: Lists,  # of samples
    filters: Tensor,  # (S * 12, C, O)
    dx: Tensor | None,  # (B, C, T, H, W)
    dgate: Tensor,  # (B, boxes, C) float32
    grid: plans.WaveGrid,
) -> None:
    """:func:`data_gradient_gluon_kernel` into ``dx`` and ``dgate``."""
    tile, outputs = grid.tile, grad_ndhwc.shape[-1]
    parked = torch.empty((grid.ctas, tile.m, tile.n), dtype=torch.float32, device=x.device)
    one = gradient_launch(x.shape, x.stride(), outputs, grid, features.needs_int64(x))
    tensors = (
        box_of(grad_ndhwc, (1, *grid.box, tile.k)), box_of(filters, (1, tile.n, tile.k)),
        lists.plans, gate, x, dx, dgate, parked,
    )  # fmt: skip
    launch.start(data_gradient_gluon_kernel, one, tensors)
