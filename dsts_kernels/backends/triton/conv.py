"""Grouped implicit convolution: every sample of a panel with its own filters, in one launch.

A tile is a box of positions by ``BN`` outputs. Its reduction runs over K blocks: for each block of ``BK`` panel columns
the taps of the operator that reads them, first those of the spatial operator, then those of the temporal one, in one
pipelined loop. :mod:`.schedule` deals the tiles and cuts up what is left; a tile that several programs compute is added
up in memory by the last of them, in order. The kernel is a long function: a tile ends in one of two ways, and both
need what the loop before them worked out.

Filters come in four forms (``FORM``), each read as it lies:
  packed   ``(blocks * O, BK)``: K blocks of one neuron behind one another, made by freezing
  listed   ``(slots * taps, C, O)``: rows picked by a channel list, for gated training
  transposed  the same with the rows in order: a mixing kernel's data gradient
  stored   ``(slots * taps, O, C)``: a mixing kernel as it is stored
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features, grids, switches
from ..gpu.kernels import PLAIN, ConvEpilogue
from . import launch, load, tuning
from .common import (
    Size,
    Strides,
    box_start,
    boxes_of,
    load_box,
    plan_field,
    tap_shift,
)
from .epilogue import add_boxes, epilogue, fixup, part_of, write_sums
from .gluon import plan as gluon
from .schedule import block_counts, dealt_waves, iteration_ranges, shared_iterations, tile_of
from .tuning import ConvGrid


@triton.jit
def k_block(i, spatial_blocks, KERNEL: tl.constexpr, TEMPORAL_TAPS: tl.constexpr, SIGN: tl.constexpr):
    """Of iteration ``i``: whether the spatial operator has it, K block, tap, block of the panel, the tap's shift."""
    SPATIAL_TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    is_spatial = i < spatial_blocks * SPATIAL_TAPS
    if TEMPORAL_TAPS == 0:
        block = i // SPATIAL_TAPS
        tap = i % SPATIAL_TAPS
        panel_block = block
        dt, dh, dw = tap_shift(tap, KERNEL, SIGN)
    else:
        j = i - spatial_blocks * SPATIAL_TAPS
        block = tl.where(is_spatial, i // SPATIAL_TAPS, j // 3)
        tap = tl.where(is_spatial, i % SPATIAL_TAPS, j % 3)
        panel_block = tl.where(is_spatial, block, spatial_blocks + block)
        dt, dh, dw = tap_shift(tap, KERNEL, SIGN)
        dt = tl.where(is_spatial, dt, SIGN * (tap - 1))
        dh = tl.where(is_spatial, dh, 0)
        dw = tl.where(is_spatial, dw, 0)
    return is_spatial, block, tap, panel_block, (dt, dh, dw)


@triton.jit
def load_filters(
    filters,  # in the form FORM, or a descriptor of [BN, BK] or [BK, BN] of it
    order,  # [lists, k_channels], or None
    plan,  # [B, PLAN]
    b,
    base,
    i,
    block,
    tap,
    is_spatial,
    o0,
    k_channels,
    outputs,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    SPATIAL_TAPS: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``[BK, BN]``: one K block of one tap for ``BN`` outputs. ``base`` is a sample's first K block, or its slot."""
    o = o0 + tl.arange(0, BN)
    k = block * BK + tl.arange(0, BK)
    matrix = base * (SPATIAL_TAPS + TEMPORAL_TAPS) + tl.where(is_spatial, tap, SPATIAL_TAPS + tap)
    start = filters
    if not TMA:
        start += matrix.to(tl.int64) * k_channels * outputs
    if FORM == "packed":
        row = (base + i) * outputs
        if TMA:
            f = filters.load([row + o0, 0]).T
        else:
            cells = o[None, :] * BK + tl.arange(0, BK)[:, None]
            f = tl.load(filters + row.to(tl.int64) * BK + cells, mask=(o < outputs)[None, :], other=0.0)
    elif FORM == "stored":
        if TMA:
            f = filters.load([matrix, o0, block * BK]).reshape(BN, BK).T
        else:
            mask = (o < outputs)[None, :] & (k < k_channels)[:, None]
            f = tl.load(start + o[None, :] * k_channels + k[:, None], mask=mask, other=0.0)
    elif FORM == "transposed":
        if TMA:
            f = filters.load([matrix, block * BK, o0]).reshape(BK, BN)
        else:
            mask = (k < k_channels)[:, None] & (o < outputs)[None, :]
            f = tl.load(start + k[:, None] * outputs + o[None, :], mask=mask, other=0.0)
    else:
        temporal_start = plan_field(plan, b, "temporal_start")
        row = plan_field(plan, b, "row")
        listed = k < tl.where(is_spatial, plan_field(plan, b, "spatial_channels"), k_channels - temporal_start)
        place = row.to(tl.int64) * k_channels + tl.where(is_spatial, 0, temporal_start) + k
        channel = tl.load(order + place, mask=listed, other=0)
        cells = channel.to(tl.int64)[:, None] * outputs + o[None, :]
        f = tl.load(start + cells, mask=listed[:, None] & (o < outputs)[None, :], other=0.0)
    return f


@triton.jit(do_not_specialize=["batch", "slots", "waves"])  # or every batch would be compiled anew
def conv_kernel(
    panel,  # [B, T, H, W, width], or its descriptor
    filters,  # in the form FORM, or its descriptor
    order,  # [lists, k_channels] int32 of listed filters, else None
    plan,  # [B, PLAN] int32, or UNIFORM: [B], whose filters each sample has
    bias,  # [rows of plans, O] float32, or None
    skip,  # [B, O, T, H, W] with the strides of out, or None
    out,  # [B, O, T, H, W]
    box_sums,  # [B, boxes, O, SUM_TAPS] float32, or None
    sums,  # [B, O, SUM_TAPS] float32, or None
    workspace,  # [2 * programs, BM, BN] float32
    arrival_counters,  # [programs], then [B, tiles across outputs] int32: zeros, and zeros again when it ends
    size,
    stride,
    batch,
    width,
    k_channels,
    slots,
    outputs,
    waves,
    FORM: tl.constexpr,
    TMA_PANEL: tl.constexpr,
    TMA_FILTERS: tl.constexpr,
    UNIFORM: tl.constexpr,
    KERNEL: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    SIGN: tl.constexpr,
    RELU: tl.constexpr,
    SUM_TAPS: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MIN_K_BLOCKS: tl.constexpr,
    IDLE_PERCENT: tl.constexpr,
    BOX: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One persistent launch; see the top of this file. ``KERNEL`` is the spatial operator's; the temporal one is 3x1x1
    (``TEMPORAL_TAPS`` 3) or absent (0). ``UNIFORM`` samples have one operator on all columns."""
    SPATIAL_TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    BM: tl.constexpr = BOX.t * BOX.h * BOX.w
    FIXUP_ROWS: tl.constexpr = 16 if BM >= 16 else BM  # of a tile that is added up, at a time
    PARTS: tl.constexpr = BN // 64 if BN > 64 else 1  # whose epilogues follow one another, for registers' sake
    TAP_ROWS: tl.constexpr = 16 if SUM_TAPS == 9 else 1
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    boxes = boxes_of(size, BOX)
    across = tl.cdiv(outputs, BN)
    per_sample = boxes * across

    # Its tile of every whole wave, then the tiles its range reaches into. Which they are is worked out anew for each:
    # kept, the vectors would take registers from the loop.
    whole_waves = dealt_waves(
        plan, batch, per_sample, waves, programs, width,
        UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, PROGRAMS, IDLE_PERCENT, BK,
    )  # fmt: skip
    starts, stops = iteration_ranges(
        plan, batch, per_sample, whole_waves, programs, width,
        UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, PROGRAMS, MIN_K_BLOCKS, BK,
    )  # fmt: skip
    lengths, first, iterations, until = shared_iterations(
        plan, batch, per_sample, waves * programs, width, UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, BK
    )
    begin = tl.sum(tl.where(tl.arange(0, PROGRAMS) == pid, starts, 0), 0)
    stop = tl.sum(tl.where(tl.arange(0, PROGRAMS) == pid, stops, 0), 0)
    tile_first, _ = tile_of(begin, lengths, first, iterations, until, batch, BATCH)
    tile_last, _ = tile_of(stop - 1, lengths, first, iterations, until, batch, BATCH)
    if UNIFORM:
        waves = whole_waves
    dealt = tl.minimum(whole_waves, tl.cdiv(batch * per_sample - pid, programs))  # a last wave may end before it
    work_tiles = dealt + tl.where(stop > begin, tile_last - tile_first + 1, 0)
    for work_tile in range(0, work_tiles):
        whole = work_tile < waves
        if not UNIFORM:  # to hold one number less: tiles are shared after `waves`, or not at all
            whole |= begin >= stop
        lengths, first, iterations, until = shared_iterations(
            plan, batch, per_sample, waves * programs, width, UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, BK
        )
        tile, tile_start = tile_of(begin, lengths, first, iterations, until, batch, BATCH)
        tile = tl.where(whole, pid + work_tile * programs, tile)
        b = tile // per_sample
        spatial_blocks, temporal_blocks = block_counts(plan, b, True, width, UNIFORM, BK)
        length = spatial_blocks * SPATIAL_TAPS + temporal_blocks * TEMPORAL_TAPS
        k0 = tl.where(whole, 0, begin - tile_start)
        k1 = tl.where(whole, length, tl.minimum(stop - tile_start, length))
        tile %= per_sample
        box = tile // across
        o0 = tile % across * BN
        t0, h0, w0 = box_start(box, size, BOX)
        if UNIFORM:
            index = tl.load(plan + b)
            chosen = (index >= 0) & (index < slots)
            base = tl.where(chosen, index, 0).to(tl.int32)
        else:
            base = tl.maximum(plan_field(plan, b, "filters"), 0)  # without a slot the panel is NaN

        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, k1 - k0):  # from 0: elsewhere Triton loses track of alignment
            i = k0 + step
            is_spatial, block, tap, panel_block, shift = k_block(i, spatial_blocks, KERNEL, TEMPORAL_TAPS, SIGN)
            dt, dh, dw = shift
            a = load_box(
                panel, b, (t0 + dt, h0 + dh, w0 + dw), panel_block * BK, size, width, TMA_PANEL, INDEX_64, BOX, BK
            )
            f = load_filters(
                filters, order, plan, b, base, i, block, tap, is_spatial, o0, k_channels, outputs,
                FORM, TMA_FILTERS, SPATIAL_TAPS, TEMPORAL_TAPS, BN, BK,
            )  # fmt: skip
            acc = tl.dot(a, f, acc, input_precision=PRECISION)
        if UNIFORM:
            acc = tl.where(chosen, acc, float("nan"))

        bias_row = bias
        if bias is not None:
            if UNIFORM:
                bias_row += base * outputs
            else:
                bias_row += plan_field(plan, b, "row") * outputs
        if k1 - k0 == length:
            m = tl.arange(0, BM)
            for part in tl.static_range(PARTS):
                o_part = o0 + part * (BN // PARTS) + tl.arange(0, BN // PARTS)
                tile_sums = epilogue(
                    part_of(acc, part, PARTS, BM, BN), m, o_part, b, (t0, h0, w0), bias_row, skip, out,
                    size, outputs, stride, RELU, SUM_TAPS, INDEX_64, BOX,
                )  # fmt: skip
                if SUM_TAPS != 0:
                    write_sums(tile_sums, box_sums, b, box, boxes, o_part, outputs, SUM_TAPS)
            if SUM_TAPS != 0:
                add_boxes(box_sums, sums, arrival_counters + programs, b, boxes, o0, outputs, SUM_TAPS, TAP_ROWS, BN)
        else:
            # Every part goes to memory; the last program to bring one adds them up. Nobody waits.
            slot = 2 * pid + tl.where(k0 > 0, 1, 0)
            cell = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.store(workspace + slot.to(tl.int64) * BM * BN + cell, acc)
            q = tl.arange(0, PROGRAMS)
            starts, stops = iteration_ranges(
                plan, batch, per_sample, waves, programs, width,
                UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, PROGRAMS, MIN_K_BLOCKS, BK,
            )  # fmt: skip
            used = (starts < stops) & (stops > tile_start) & (starts < tile_start + length)
            tl.debug_barrier()
            counter = arrival_counters + tl.max(tl.where(used, q, -1), 0)
            before = tl.atomic_add(counter, 1, sem="acq_rel")
            if before == tl.sum(used.to(tl.int32), 0) - 1:
                tl.debug_barrier()
                tl.store(counter, 0)
                tile_sums = tl.zeros((TAP_ROWS, BN), tl.float32)
                for rows in range(0, BM // FIXUP_ROWS):
                    m = rows * FIXUP_ROWS + tl.arange(0, FIXUP_ROWS)
                    o = o0 + tl.arange(0, BN)
                    v = fixup(workspace, m, starts, used, tile_start, BM * BN, PROGRAMS, BN)
                    row_sums = epilogue(
                        v, m, o, b, (t0, h0, w0), bias_row, skip, out,
                        size, outputs, stride, RELU, SUM_TAPS, INDEX_64, BOX,
                    )  # fmt: skip
                    if SUM_TAPS != 0:
                        tile_sums += row_sums
                if SUM_TAPS != 0:
                    write_sums(tile_sums, box_sums, b, box, boxes, o0 + tl.arange(0, BN), outputs, SUM_TAPS)
                    add_boxes(
                        box_sums, sums, arrival_counters + programs, b, boxes, o0, outputs, SUM_TAPS, TAP_ROWS, BN
                    )
        begin = tl.where(whole, begin, tile_start + length)


def conv_grid(
    x: Tensor, outputs: int, width: int, taps: int, sum_taps: int, packed: bool = False
) -> ConvGrid | gluon.WaveGrid:
    """``x (B, C, T, H, W)`` gives batch, size, dtype and device; ``width`` is the most columns a reduction has.

    A :class:`.gluon.plan.WaveGrid` says that the kernel for Hopper runs: its switch is on, and its waves are full.
    """
    chip, kind = launch.chip(x.device), tuning.kind_of(x.dtype)
    if (
        packed
        and switches.current().gluon_conv
        and not tuning.is_forced("conv")
        and launch.gluon_runs(x.device, x.dtype)
    ):
        k_blocks = grids.cdiv(width, tuning.block_k(kind)) * taps
        if (grid := gluon.wave_grid(chip[1], x.shape[0], tuple(x.shape[2:]), outputs, k_blocks)) is not None:
            return grid
    return tuning.conv_grid(*chip, kind, x.shape[0], tuple(x.shape[2:]), outputs, width, taps, sum_taps)


@launch.remembered
def conv_launch(
    shape: torch.Size,  # of the output
    strides: tuple[int, ...],
    grid: ConvGrid,
    numbers: tuple[int, int, int],  # columns of the panel, channels of the reduction, sets of taps
    form: str,
    tma: tuple[bool, bool],  # of panel and filters
    kernel: tuple[int, int, int],
    with_temporal: bool,
    sign: int,
    relu: bool,
    sum_taps: int,
    index_64: bool,
    precision: str,
    min_k_blocks: int,
    idle_percent: int,
) -> launch.Launch:
    tile, ctas = grid.tile, grid.persistent.num_ctas
    return launch.Launch(
        (ctas,),
        (Size(*shape[2:]), Strides(*strides), shape[0], *numbers, shape[1], grid.persistent.waves),
        FORM=form,
        TMA_PANEL=tma[0],
        TMA_FILTERS=tma[1],
        UNIFORM=form in ("stored", "transposed"),
        KERNEL=kernel,
        TEMPORAL_TAPS=3 if with_temporal else 0,
        SIGN=sign,
        RELU=relu,
        SUM_TAPS=sum_taps,
        INDEX_64=index_64,
        PRECISION=precision,
        BATCH=grids.next_power(shape[0]),
        PROGRAMS=grids.next_power(ctas),
        MIN_K_BLOCKS=min_k_blocks,
        IDLE_PERCENT=idle_percent,
        BOX=grid.box,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def conv(
    panel: Tensor,  # (B, T, H, W, width)
    filters: Tensor,  # see the top of this file
    form: str,
    plan: Tensor,  # (B, PLAN) int32, or of a mixing kernel (B,): whose filters
    out: Tensor,  # (B, O, T, H, W)
    grid: ConvGrid | gluon.WaveGrid,
    *,
    kernel: tuple[int, int, int] = features.SPATIAL,
    with_temporal: bool = True,
    sign: int = 1,
    order: Tensor | None = None,  # (lists, k_channels) int32
    k_channels: int = 0,
    slots: int = 0,
    epilogue: ConvEpilogue = PLAIN,
) -> None:
    """:func:`.conv.conv_kernel` on a panel into ``out``, or :func:`.gluon.conv.conv_gluon_kernel`, as its grid says."""
    if isinstance(grid, gluon.WaveGrid):
        return load("gluon.conv").conv_packed(panel, filters, plan, out, grid, epilogue)
    tile, box, ctas = grid.tile, grid.box, grid.persistent.num_ctas
    x, tma_panel = launch.boxed(panel, box, tile.k, tile.tma, left=True)
    shape = {"packed": (tile.n, tile.k), "stored": (1, tile.n, tile.k), "transposed": (1, tile.k, tile.n)}.get(form)
    f, tma_filters = launch.described(filters, shape, tile.tma) if shape else (filters, False)
    sums, box_sums = epilogue.sums, None
    if sums is not None:
        boxes = box.tiles(*out.shape[2:])
        box_sums = panel.new_empty((out.shape[0], boxes, out.shape[1], sums.shape[2]), dtype=torch.float32)
    counters = epilogue.arrival_counters
    if counters is None:
        counters = launch.zeroed(grid.arrival_counters, panel.device)
    workspace = panel.new_empty((2 * ctas, tile.m, tile.n), dtype=torch.float32)
    one = conv_launch(
        out.shape, out.stride(), grid, (panel.shape[-1], k_channels, slots), form, (tma_panel, tma_filters), kernel,
        with_temporal, sign, epilogue.relu, 0 if sums is None else sums.shape[2],
        features.needs_int64(out, panel), launch.precision(panel.dtype), grids.MIN_K_BLOCKS, grids.idle_percent(),
    )  # fmt: skip
    tensors = x, f, order, plan, epilogue.bias, epilogue.skip, out, box_sums, sums, workspace, counters
    launch.start(conv_kernel, one, tensors)
