"""A frozen layer's packed convolution on Hopper, in Gluon: what :mod:`..conv` does for filters in the form ``packed``.

Each multiprocessor has one CTA, which takes tiles in turn: boxes of ``BM`` positions by ``BN`` outputs. One warp, the
producer, brings K blocks into a ring of ``STAGES``: a step is one TMA box of the panel, shifted by the step's tap and
zero outside the features, and one of filters. Eight warps, the consumers, multiply them with ``wgmma``, both operands
from shared memory, and end each tile, while the producer is already at the next one's blocks.

Stages and barriers: :mod:`.ring`. A sample without filters (its plan begins below 0) has no steps, and its output is
NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...gpu import features, grids
from ...gpu.kernels import ConvEpilogue
from .. import launch
from ..common import Size, Strides, box_start, boxes_of, plan_field
from ..conv import k_block
from . import plan as plans
from .epilogue import add_boxes, end_part, part_of
from .ring import box_of, bring, multiply, open_ring


@gluon.jit
def place_of(tile, size, outputs, BOX: gl.constexpr, BN: gl.constexpr):
    """Sample, box and first output of tile ``tile``: columns of tiles follow one another, then boxes, then samples."""
    across = gl.cdiv(outputs, BN)
    per_sample = boxes_of(size, BOX) * across
    within = tile % per_sample
    return tile // per_sample, within // across, within % across * BN


@gluon.jit
def steps_of(plan, b, KERNEL: gl.constexpr, TEMPORAL_TAPS: gl.constexpr):
    """K blocks of a tile of sample ``b``, each once for every tap that reads it."""
    spatial = plan_field(plan, b, "spatial_blocks") * (KERNEL[0] * KERNEL[1] * KERNEL[2])
    steps = spatial + plan_field(plan, b, "temporal_blocks") * TEMPORAL_TAPS
    return gl.where(plan_field(plan, b, "filters") < 0, 0, steps)


@gluon.jit
def produce(
    panel,  # descriptor of [1, *BOX, BK] of [B, T, H, W, width]
    filters,  # descriptor of [BN, BK] of [blocks * O, BK]
    plan,  # [B, PLAN] int32
    panel_ring,  # [STAGES, 1, *BOX, BK] shared
    filter_ring,  # [STAGES, BN, BK] shared
    ready,  # [STAGES] barriers
    free,  # [STAGES] barriers
    tiles,
    size,
    outputs,
    KERNEL: gl.constexpr,
    TEMPORAL_TAPS: gl.constexpr,
    BOX: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer: every step's two boxes, as soon as its stage is free."""
    BYTES: gl.constexpr = (BOX.t * BOX.h * BOX.w + BN) * BK * 2  # of a stage, in half types
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, box, o0 = place_of(tile, size, outputs, BOX, BN)
        t0, h0, w0 = box_start(box, size, BOX)
        first = plan_field(plan, b, "filters")
        spatial_blocks = plan_field(plan, b, "spatial_blocks")
        for k in range(0, steps_of(plan, b, KERNEL, TEMPORAL_TAPS)):
            _, _, _, block, shift = k_block(k, spatial_blocks, KERNEL, TEMPORAL_TAPS, 1)
            dt, dh, dw = shift
            corner = [b, t0 + dt, h0 + dh, w0 + dw, block * BK]
            row = [(first + k) * outputs + o0, 0]
            bring(panel, corner, filters, row, panel_ring, filter_ring, ready, free, step, BYTES, STAGES)
            step += 1


@gluon.jit
def consume(
    plan,  # [B, PLAN] int32
    bias,  # [rows of plans, O] float32, or None
    skip,  # [B, O, T, H, W] with the strides of out, or None
    out,  # [B, O, T, H, W]
    box_sums,  # [B, boxes, O, SUM_TAPS] float32, or None
    sums,  # [B, O, SUM_TAPS] float32, or None
    arrival_counters,  # [B, tiles across outputs] int32: zeros
    panel_ring,
    filter_ring,
    ready,
    free,
    tiles,
    size,
    stride,
    outputs,
    KERNEL: gl.constexpr,
    TEMPORAL_TAPS: gl.constexpr,
    RELU: gl.constexpr,
    SUM_TAPS: gl.constexpr,
    INDEX_64: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    CELLS: gl.constexpr,
    AT_ONCE: gl.constexpr,
    BOX: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The consumers: every step's product, then the end of each tile, :data:`PART` outputs at a time."""
    BM: gl.constexpr = BOX.t * BOX.h * BOX.w
    PARTS: gl.constexpr = BN // PART
    boxes = boxes_of(size, BOX)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, box, o0 = place_of(tile, size, outputs, BOX, BN)
        steps = steps_of(plan, b, KERNEL, TEMPORAL_TAPS)
        acc, step = multiply(panel_ring, filter_ring, ready, free, step, steps, BM, BN, BK, STAGES, WARPS)
        if plan_field(plan, b, "filters") < 0:
            acc = gl.full([BM, BN], float("nan"), gl.float32, acc.type.layout)
        row = bias
        if bias is not None:
            row += plan_field(plan, b, "row") * outputs
        for part in gl.static_range(PARTS):
            end_part(
                part_of(acc, part, PARTS, BM, BN), b, box, boxes, box_start(box, size, BOX), o0 + part * PART, row,
                skip, out, box_sums, size, stride, outputs,
                RELU, SUM_TAPS, INDEX_64, CHANNELS_LAST, BOX, WARPS,
            )  # fmt: skip
        if SUM_TAPS != 0:
            add_boxes(box_sums, sums, arrival_counters, b, boxes, o0, outputs, SUM_TAPS, CELLS, AT_ONCE, BN, WARPS)


@gluon.jit(do_not_specialize=["tiles"])  # or every batch would be compiled anew
def conv_gluon_kernel(
    panel,  # descriptor of [1, *BOX, BK] of [B, T, H, W, width]
    filters,  # descriptor of [BN, BK] of [blocks * O, BK]
    plan,  # [B, PLAN] int32
    bias,  # [rows of plans, O] float32, or None
    skip,  # [B, O, T, H, W] with the strides of out, or None
    out,  # [B, O, T, H, W]
    box_sums,  # [B, boxes, O, SUM_TAPS] float32, or None
    sums,  # [B, O, SUM_TAPS] float32, or None
    arrival_counters,  # [B, tiles across outputs] int32: zeros
    size,
    stride,
    tiles,
    outputs,
    KERNEL: gl.constexpr,
    TEMPORAL_TAPS: gl.constexpr,
    RELU: gl.constexpr,
    SUM_TAPS: gl.constexpr,
    INDEX_64: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    CELLS: gl.constexpr,
    AT_ONCE: gl.constexpr,
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
    panel_ring, filter_ring, ready, free = open_ring(panel, filters, STAGES)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    plan, bias, skip, out, box_sums, sums, arrival_counters, panel_ring, filter_ring, ready, free,
                    tiles, size, stride, outputs, KERNEL, TEMPORAL_TAPS, RELU, SUM_TAPS, INDEX_64, CHANNELS_LAST,
                    CELLS, AT_ONCE, BOX, BN, BK, PART, STAGES, WARPS,
                ),
            ),
            (
                produce,
                (
                    panel, filters, plan, panel_ring, filter_ring, ready, free, tiles, size, outputs,
                    KERNEL, TEMPORAL_TAPS, BOX, BN, BK, STAGES,
                ),
            ),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


@launch.remembered
def conv_launch(
    shape: torch.Size,  # of the output
    strides: tuple[int, ...],
    grid: plans.WaveGrid,
    relu: bool,
    sum_taps: int,
    index_64: bool,
) -> launch.Launch:
    tile, channels_last = grid.tile, strides[1] == 1
    return launch.Launch(
        (grid.ctas,),
        (Size(*shape[2:]), Strides(*strides), shape[0] * grid.tiles.per_sample, shape[1]),
        KERNEL=features.SPATIAL,
        TEMPORAL_TAPS=3,
        RELU=relu,
        SUM_TAPS=sum_taps,
        INDEX_64=index_64,
        CHANNELS_LAST=channels_last,
        CELLS=grids.next_power(tile.n * max(1, sum_taps)),
        AT_ONCE=16 if sum_taps <= 1 else 4,
        BOX=grid.box,
        BN=tile.n,
        BK=tile.k,
        PART=min(plans.PART if channels_last else plans.PART // 2, tile.n),  # whole ones would spill there
        STAGES=tile.stages,
        WARPS=plans.CONSUMER_WARPS,
        PRODUCER_WARPS=plans.PRODUCER_WARPS,
        PRODUCER_REGISTERS=plans.PRODUCER_REGISTERS,
        num_warps=plans.CONSUMER_WARPS,
    )


def conv_packed(
    panel: Tensor,  # (B, T, H, W, width), half
    filters: Tensor,  # (blocks * O, K)
    plan: Tensor,  # (B, PLAN) int32
    out: Tensor,  # (B, O, T, H, W)
    grid: plans.WaveGrid,
    epilogue: ConvEpilogue,
) -> None:
    """:func:`conv_gluon_kernel` on a panel into ``out``."""
    tile, sums = grid.tile, epilogue.sums
    taps = 0 if sums is None else sums.shape[2]
    counters, box_sums = epilogue.arrival_counters, None
    if taps:
        box_sums = panel.new_empty((out.shape[0], grid.tiles.along, out.shape[1], taps), dtype=torch.float32)
    if counters is None:
        counters = panel.new_zeros(grid.arrival_counters, dtype=torch.int32)
    one = conv_launch(out.shape, out.stride(), grid, epilogue.relu, taps, features.needs_int64(out))
    tensors = (
        box_of(panel, (1, *grid.box, tile.k)), box_of(filters, (tile.n, tile.k)), plan, epilogue.bias, epilogue.skip,
        out, box_sums, sums, counters,
    )  # fmt: skip
    launch.start(conv_gluon_kernel, one, tensors)
