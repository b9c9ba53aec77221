"""Filter gradients on Hopper, in Gluon: what :mod:`..weight_gradient` does, grouped by neuron, for half types.

A tile is ``BM`` listed channels by ``BN`` outputs of one tap of one slot; its reduction runs over all the slot's
samples, ``BK`` positions a step. Both operands are boxes of positions by channels, the left one shifted by the tap:
``wgmma`` reads them across, so that nothing is turned. How many tiles a slot has, its lists say, on the device: every
CTA counts them and takes its own in turn, through all slots, so CTAs end within a tile of one another.
"""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...gpu import grids
from ...gpu.lists import Groups, Lists
from .. import launch
from ..common import Size, boxes_of, plan_field, tap_shift
from . import plan as plans
from .epilogue import part_of
from .ring import box_of, bring, multiply, open_ring


@gluon.jit
def rows_of(plan, slot, k_channels, BM: gl.constexpr):
    """Blocks of ``BM`` channels in the spatial and in the temporal list of a slot; without lists (``None``) all."""
    if plan is None:
        spatial = gl.cdiv(k_channels, BM)
        temporal = 0
    else:
        spatial = gl.cdiv(plan_field(plan, slot, "spatial_channels"), BM)
        temporal = gl.cdiv(k_channels - plan_field(plan, slot, "temporal_start"), BM)
    return spatial, temporal


@gluon.jit
def slot_of(
    tile, plan, neuron_of, slots, k_channels, across,
    SPATIAL_TAPS: gl.constexpr, TEMPORAL_TAPS: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Slot of tile ``tile``, its number there, and the tiles of all slots. A slot that no neuron has has none."""
    slot = 0
    first = 0
    until = 0
    for s in range(0, slots):
        spatial, temporal = rows_of(plan, s, k_channels, BM)
        count = (spatial * SPATIAL_TAPS + temporal * TEMPORAL_TAPS) * across
        count = gl.where(gl.load(neuron_of + s) < 0, 0, count)
        here = (tile >= until) & (tile < until + count)
        slot = gl.where(here, s, slot)
        first = gl.where(here, until, first)
        until += count
    return slot, tile - first, until


@gluon.jit
def place_of(
    within, plan, slot, k_channels, across,
    SPATIAL_TAPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Tap, block of channels and first output of a slot's tile ``within``: outputs follow one another, then channels,
    then taps, those of the spatial operator first."""
    spatial, temporal = rows_of(plan, slot, k_channels, BM)
    spatial_tiles = spatial * SPATIAL_TAPS * across
    is_spatial = within < spatial_tiles
    of_operator = gl.where(is_spatial, within, within - spatial_tiles)
    rows = gl.where(is_spatial, spatial, temporal)
    tap = of_operator // (rows * across) + gl.where(is_spatial, 0, SPATIAL_TAPS)
    return tap, of_operator // across % rows, of_operator % across * BN


@gluon.jit
def produce(
    left,  # descriptor of [1, *BOX, BM] of [B, T, H, W, left_width]
    right,  # descriptor of [1, *BOX, BN] of [B, T, H, W, right_width]
    plan,  # [S, PLAN] int32, or None
    neuron_of,  # [S] int32
    groups,  # [S, 2] int32
    members,  # [B] int32
    left_ring,  # [STAGES, 1, *BOX, BM] shared
    right_ring,  # [STAGES, 1, *BOX, BN] shared
    ready,  # [STAGES] barriers
    free,  # [STAGES] barriers
    slots,
    size,
    k_channels,
    across,
    KERNEL: gl.constexpr,
    TEMPORAL_TAPS: gl.constexpr,
    SIGN: gl.constexpr,
    BOX: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    PANEL_BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: boxes of all samples of a tile's slot, one after the other."""
    SPATIAL_TAPS: gl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    BYTES: gl.constexpr = (BM + BN) * BOX.t * BOX.h * BOX.w * 2  # of a stage, in half types
    _, _, tiles = slot_of(0, plan, neuron_of, slots, k_channels, across, SPATIAL_TAPS, TEMPORAL_TAPS, BM)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, within, _ = slot_of(tile, plan, neuron_of, slots, k_channels, across, SPATIAL_TAPS, TEMPORAL_TAPS, BM)
        tap, row, o0 = place_of(within, plan, slot, k_channels, across, SPATIAL_TAPS, BM, BN)
        dt, dh, dw = tap_shift(tap, KERNEL, SIGN)
        column = row * BM
        if plan is not None:
            is_spatial = tap < SPATIAL_TAPS
            dt = gl.where(is_spatial, dt, SIGN * (tap - SPATIAL_TAPS - 1))
            dh = gl.where(is_spatial, dh, 0)
            dw = gl.where(is_spatial, dw, 0)
            column += gl.where(is_spatial, 0, plan_field(plan, slot, "spatial_blocks") * PANEL_BK)
        start = gl.load(groups + slot * 2)
        for i in range(0, gl.load(groups + slot * 2 + 1)):
            b = gl.load(members + start + i)
            # Three loops, because one over boxes would divide in every step, for longer than its product takes.
            for t0 in range(0, size.t, BOX.t):
                for h0 in range(0, size.h, BOX.h):
                    for w0 in range(0, size.w, BOX.w):
                        corner = [b, t0 + dt, h0 + dh, w0 + dw, column]
                        place = [b, t0, h0, w0, o0]
                        bring(left, corner, right, place, left_ring, right_ring, ready, free, step, BYTES, STAGES)
                        step += 1


@gluon.jit
def end_part(
    v,  # [BM, PART] float32
    j0,
    o0,
    order,  # [k_channels] int32 from the operator's list on, or None: all channels in order
    count,
    target,  # [k_channels, right_width] of the tile's tap
    right_width,
    WARPS: gl.constexpr,
):
    """Stores rows ``j0`` and on of a list of ``count`` channels where these channels' filters lie."""
    BM: gl.constexpr = v.shape[0]
    PART: gl.constexpr = v.shape[1]
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [WARPS, 1], [1, 0])  # 8 outputs a lane
    v = gl.convert_layout(v, rows)
    j = j0 + gl.arange(0, BM, gl.SliceLayout(1, rows))
    o = o0 + gl.arange(0, PART, gl.SliceLayout(0, rows))
    channel = j
    if order is not None:
        channel = gl.load(order + j, mask=j < count, other=0)
    cells = (channel.to(gl.int64) * right_width)[:, None] + o[None, :]
    gl.store(target + cells, v.to(target.dtype.element_ty), mask=(j < count)[:, None] & (o < right_width)[None, :])


@gluon.jit
def consume(
    order,  # [S, k_channels] int32, or None
    plan,  # [S, PLAN] int32, or None
    neuron_of,  # [S] int32
    groups,  # [S, 2] int32
    out,  # [S, taps, k_channels, right_width], or BY_NEURON [N, ...]
    left_ring,
    right_ring,
    ready,
    free,
    slots,
    size,
    right_width,
    k_channels,
    across,
    KERNEL: gl.constexpr,
    TEMPORAL_TAPS: gl.constexpr,
    BY_NEURON: gl.constexpr,
    BOX: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The consumers: a tile's products, then its rows, :data:`PART` outputs at a time."""
    SPATIAL_TAPS: gl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    BK: gl.constexpr = BOX.t * BOX.h * BOX.w
    PARTS: gl.constexpr = BN // PART
    _, _, tiles = slot_of(0, plan, neuron_of, slots, k_channels, across, SPATIAL_TAPS, TEMPORAL_TAPS, BM)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, within, _ = slot_of(tile, plan, neuron_of, slots, k_channels, across, SPATIAL_TAPS, TEMPORAL_TAPS, BM)
        tap, row, o0 = place_of(within, plan, slot, k_channels, across, SPATIAL_TAPS, BM, BN)
        steps = gl.load(groups + slot * 2 + 1) * boxes_of(size, BOX)
        acc, step = multiply(left_ring, right_ring, ready, free, step, steps, BM, BN, BK, STAGES, WARPS, True)
        count = k_channels
        listed = order
        if plan is not None:
            list_start = gl.where(tap < SPATIAL_TAPS, 0, plan_field(plan, slot, "temporal_start"))
            count = gl.where(tap < SPATIAL_TAPS, plan_field(plan, slot, "spatial_channels"), k_channels - list_start)
            listed += slot.to(gl.int64) * k_channels + list_start
        index = slot
        if BY_NEURON:
            index = gl.load(neuron_of + slot)
        target = out + (index * (SPATIAL_TAPS + TEMPORAL_TAPS) + tap).to(gl.int64) * k_channels * right_width
        for part in gl.static_range(PARTS):
            v = part_of(acc, part, PARTS, BM, BN)
            end_part(v, row * BM, o0 + part * PART, listed, count, target, right_width, WARPS)


@gluon.jit
def weight_gradient_gluon_kernel(
    left,  # descriptor of [1, *BOX, BM] of [B, T, H, W, left_width]
    right,  # descriptor of [1, *BOX, BN] of [B, T, H, W, right_width]
    order,  # [S, k_channels] int32, or None
    plan,  # [S, PLAN] int32, or None: all channels in order
    neuron_of,  # [S] int32
    groups,  # [S, 2] int32
    members,  # [B] int32
    out,  # [S, taps, k_channels, right_width], or BY_NEURON [N, ...]
    size,
    slots,
    right_width,
    k_channels,
    KERNEL: gl.constexpr,
    TEMPORAL_TAPS: gl.constexpr,
    SIGN: gl.constexpr,
    BY_NEURON: gl.constexpr,
    BOX: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    PANEL_BK: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """One persistent launch; see the top of this file. Only listed rows of ``out`` are written."""
    left_ring, right_ring, ready, free = open_ring(left, right, STAGES)
    across = gl.cdiv(right_width, BN)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    order, plan, neuron_of, groups, out, left_ring, right_ring, ready, free, slots, size, right_width,
                    k_channels, across, KERNEL, TEMPORAL_TAPS, BY_NEURON, BOX, BM, BN, PART, STAGES, WARPS,
                ),
            ),
            (
                produce,
                (
                    left, right, plan, neuron_of, groups, members, left_ring, right_ring, ready, free, slots, size,
                    k_channels, across, KERNEL, TEMPORAL_TAPS, SIGN, BOX, BM, BN, PANEL_BK, STAGES,
                ),
            ),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


@launch.remembered
def gradient_launch(
    size: tuple[int, int, int],
    numbers: tuple[int, int, int],  # slots, columns of the right operand, channels of the result
    kernel: tuple[int, int, int],
    temporal_taps: int,
    sign: int,
    by_neuron: bool,
    tile: plans.WaveTile,
    processors: int,
) -> launch.Launch:
    slots, width, k_channels = numbers
    taps = math.prod(kernel) + temporal_taps
    most = slots * taps * grids.cdiv(k_channels, tile.m) * grids.cdiv(width, tile.n)
    return launch.Launch(
        (min(processors, most),),
        (Size(*size), *numbers),
        KERNEL=kernel,
        TEMPORAL_TAPS=temporal_taps,
        SIGN=sign,
        BY_NEURON=by_neuron,
        BOX=grids.best_box(tile.k, *size),
        BM=tile.m,
        BN=tile.n,
        PANEL_BK=plans.HALF_K,
        PART=min(plans.PART, tile.n),
        STAGES=tile.stages,
        WARPS=plans.CONSUMER_WARPS,
        PRODUCER_WARPS=plans.PRODUCER_WARPS,
        PRODUCER_REGISTERS=plans.PRODUCER_REGISTERS,
        num_warps=plans.CONSUMER_WARPS,
    )


def weight_gradient(
    left: Tensor,  # (B, T, H, W, left_width), half
    right: Tensor,  # (B, T, H, W, right_width)
    lists: Lists | None,
    groups: Groups,
    k_channels: int,
    kernel: tuple[int, int, int],
    with_temporal: bool,
    sign: int,
    out: Tensor,
    by_neuron: bool,
    tile: plans.WaveTile,
) -> None:
    """:func:`weight_gradient_gluon_kernel` into ``out``, by slot or by neuron."""
    size = tuple(left.shape[1:4])
    numbers = groups.neuron_of.shape[0], right.shape[-1], k_channels
    processors = launch.chip(left.device)[1]
    one = gradient_launch(size, numbers, kernel, 3 if with_temporal else 0, sign, by_neuron, tile, processors)
    box = one.constants["BOX"]
    order, plan = (None, None) if lists is None else (lists.order, lists.plans)
    tensors = (
        box_of(left, (1, *box, tile.m)), box_of(right, (1, *box, tile.n)), order, plan, groups.neuron_of,
        groups.groups, groups.members, out,
    )  # fmt: skip
    launch.start(weight_gradient_gluon_kernel, one, tensors)
