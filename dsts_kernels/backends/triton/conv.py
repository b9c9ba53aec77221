"""Grouped implicit convolution: every sample of a panel with its own filters, in one launch.

A tile is a box of positions by ``BN`` outputs. Its reduction runs over K blocks: for each block of ``BK`` panel columns
the taps of the operator that reads them, first those of the first operator, then those of the second, in one pipelined
loop. :mod:`.schedule` deals the tiles and shares out what is left; a tile that several programs compute is added up in
memory by the last of them, in order.

Filters come in four forms (``FORM``), each read as it lies:
  packed   ``(blocks * O, BK)``: K blocks of one neuron behind one another, made by freezing
  listed   ``(slots * taps, C, O)``: rows picked by a channel list, for gated training
  transposed  the same with the rows in order: a mixing kernel's data gradient
  stored   ``(slots * taps, O, C)``: a mixing kernel as it is stored
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features
from ..gpu.kernels import PLAIN, Epilogue
from . import launch, tuning
from .boxes import Box, best_box, cdiv, next_power
from .common import box_start, load_box, tap_shift
from .epilogue import add_boxes, add_parts, finish, part_of, write_sums
from .schedule import block_counts, shared_tile, shared_work, shares


@triton.jit
def load_filters(
    filters,
    order,
    plan,
    b,
    base,
    i,
    block,
    tap,
    in_first,
    o0,
    rows,
    outputs,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_1: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``[BK, BN]``: one K block of one tap for ``BN`` outputs. ``rows`` is the length of the reduction's channels."""
    o = o0 + tl.arange(0, BN)
    k = block * BK + tl.arange(0, BK)
    matrix = base * TAPS + tl.where(in_first, tap, TAPS_1 + tap)
    start = filters
    if not TMA:
        start += matrix.to(tl.int64) * rows * outputs
    if FORM == "packed":
        row = (base + i) * outputs
        if TMA:
            found = filters.load([row + o0, 0]).T
        else:
            cells = o[None, :] * BK + tl.arange(0, BK)[:, None]
            found = tl.load(filters + row.to(tl.int64) * BK + cells, mask=(o < outputs)[None, :], other=0.0)
    elif FORM == "stored":
        if TMA:
            found = filters.load([matrix, o0, block * BK]).reshape(BN, BK).T
        else:
            mask = (o < outputs)[None, :] & (k < rows)[:, None]
            found = tl.load(start + o[None, :] * rows + k[:, None], mask=mask, other=0.0)
    elif FORM == "transposed":
        if TMA:
            found = filters.load([matrix, block * BK, o0]).reshape(BK, BN)
        else:
            mask = (k < rows)[:, None] & (o < outputs)[None, :]
            found = tl.load(start + k[:, None] * outputs + o[None, :], mask=mask, other=0.0)
    else:
        second = tl.load(plan + b * 6 + 4)
        row = tl.load(plan + b * 6 + 5)
        listed = k < tl.where(in_first, tl.load(plan + b * 6 + 3), rows - second)
        place = row.to(tl.int64) * rows + tl.where(in_first, 0, second) + k
        channel = tl.load(order + place, mask=listed, other=0)
        cells = channel.to(tl.int64)[:, None] * outputs + o[None, :]
        found = tl.load(start + cells, mask=listed[:, None] & (o < outputs)[None, :], other=0.0)
    return found


@triton.jit(do_not_specialize=["batch", "slots", "waves"])  # or every batch would be compiled anew
def conv_kernel(
    x,
    filters,
    order,
    plan,
    bias,
    skip,
    out,
    part_sums,
    sums,
    partial,
    flags,
    batch,
    t_size,
    h_size,
    w_size,
    width,
    rows,
    slots,
    outputs,
    stride_b,
    stride_o,
    stride_t,
    stride_h,
    stride_w,
    waves,
    FORM: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_FILTERS: tl.constexpr,
    UNIFORM: tl.constexpr,
    KT_1: tl.constexpr,
    KH_1: tl.constexpr,
    KW_1: tl.constexpr,
    TAPS_2: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SUM_TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One persistent launch; see the top of this file. The second operator is a 3x1x1 kernel, or absent.

    ``flags`` holds zeros, one for every program and then one for every sample and block of outputs.
    """
    TAPS_1: tl.constexpr = KT_1 * KH_1 * KW_1
    TAPS: tl.constexpr = TAPS_1 + TAPS_2
    BM: tl.constexpr = BT * BH * BW
    ROWS: tl.constexpr = 16 if BM >= 16 else BM  # of a tile that is added up, at a time
    PARTS: tl.constexpr = BN // 64 if BN > 64 else 1  # whose epilogues follow one another, for registers' sake
    SUM_ROWS: tl.constexpr = 16 if SUM_TAPS == 9 else 1
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    boxes = tl.cdiv(t_size, BT) * tl.cdiv(h_size, BH) * tl.cdiv(w_size, BW)
    columns = tl.cdiv(outputs, BN)
    per_sample = boxes * columns

    # Its tile of every whole wave, then the tiles its range reaches into. Which they are is worked out anew for each:
    # kept, the vectors would take registers from the loop.
    starts, stops = shares(
        plan, batch, per_sample, waves, programs, width, UNIFORM, TAPS_1, TAPS_2, BATCH, PROGRAMS, LEAST, BK
    )
    lengths, first, work, ends = shared_work(
        plan, batch, per_sample, waves * programs, width, UNIFORM, TAPS_1, TAPS_2, BATCH, BK
    )
    begin = tl.sum(tl.where(tl.arange(0, PROGRAMS) == pid, starts, 0), 0)
    stop = tl.sum(tl.where(tl.arange(0, PROGRAMS) == pid, stops, 0), 0)
    tile_first, _ = shared_tile(begin, lengths, first, work, ends, batch, BATCH)
    tile_last, _ = shared_tile(stop - 1, lengths, first, work, ends, batch, BATCH)
    items = waves + tl.where(stop > begin, tile_last - tile_first + 1, 0)
    for item in range(0, items):
        whole = item < waves
        lengths, first, work, ends = shared_work(
            plan, batch, per_sample, waves * programs, width, UNIFORM, TAPS_1, TAPS_2, BATCH, BK
        )
        tile, tile_start = shared_tile(begin, lengths, first, work, ends, batch, BATCH)
        tile = tl.where(whole, pid + item * programs, tile)
        b = tile // per_sample
        blocks_1, blocks_2 = block_counts(plan, b, True, width, UNIFORM, BK)
        length = blocks_1 * TAPS_1 + blocks_2 * TAPS_2
        k0 = tl.where(whole, 0, begin - tile_start)
        k1 = tl.where(whole, length, tl.minimum(stop - tile_start, length))
        tile %= per_sample
        box = tile // columns
        o0 = tile % columns * BN
        t0, h0, w0 = box_start(box, t_size, h_size, w_size, BT, BH, BW)
        if UNIFORM:
            index = tl.load(plan + b)
            chosen = (index >= 0) & (index < slots)
            base = tl.where(chosen, index, 0).to(tl.int32)
        else:
            base = tl.maximum(tl.load(plan + b * 6), 0)  # without a slot the panel is NaN

        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, k1 - k0):  # from 0: elsewhere Triton loses track of alignment
            i = k0 + step
            in_first = i < blocks_1 * TAPS_1
            if TAPS_2 == 0:
                block = i // TAPS_1
                tap = i % TAPS_1
                column = block
                dt, dh, dw = tap_shift(tap, KT_1, KH_1, KW_1, SIGN)
            else:
                j = i - blocks_1 * TAPS_1
                block = tl.where(in_first, i // TAPS_1, j // 3)
                tap = tl.where(in_first, i % TAPS_1, j % 3)
                column = tl.where(in_first, block, blocks_1 + block)
                dt, dh, dw = tap_shift(tap, KT_1, KH_1, KW_1, SIGN)
                dt = tl.where(in_first, dt, SIGN * (tap - 1))
                dh = tl.where(in_first, dh, 0)
                dw = tl.where(in_first, dw, 0)
            a = load_box(
                x, b, t0 + dt, h0 + dh, w0 + dw, column * BK, t_size, h_size, w_size, width, TMA_X, WIDE, BT, BH, BW, BK
            )
            f = load_filters(
                filters, order, plan, b, base, i, block, tap, in_first, o0, rows, outputs,
                FORM, TMA_FILTERS, TAPS, TAPS_1, BN, BK,
            )  # fmt: skip
            acc = tl.dot(a, f, acc, input_precision=PRECISION)
        if UNIFORM:
            acc = tl.where(chosen, acc, float("nan"))

        bias_row = bias
        if HAS_BIAS:
            if UNIFORM:
                bias_row += base * outputs
            else:
                bias_row += tl.load(plan + b * 6 + 5) * outputs
        if k1 - k0 == length:
            m = tl.arange(0, BM)
            for part in tl.static_range(PARTS):
                o_part = o0 + part * (BN // PARTS) + tl.arange(0, BN // PARTS)
                found = finish(
                    part_of(acc, part, PARTS, BM, BN), m, o_part, b, t0, h0, w0, bias_row, skip, out,
                    t_size, h_size, w_size, outputs, stride_b, stride_o, stride_t, stride_h, stride_w,
                    HAS_BIAS, RELU, HAS_SKIP, SUM_TAPS, WIDE, BH, BW,
                )  # fmt: skip
                if SUM_TAPS != 0:
                    write_sums(found, part_sums, b, box, boxes, o_part, outputs, SUM_TAPS)
            if SUM_TAPS != 0:
                add_boxes(part_sums, sums, flags + programs, b, boxes, o0, outputs, SUM_TAPS, SUM_ROWS, BN)
        else:
            # Every part goes to memory; the last program to bring one adds them up. Nobody waits.
            slot = 2 * pid + tl.where(k0 > 0, 1, 0)
            cell = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.store(partial + slot.to(tl.int64) * BM * BN + cell, acc)
            q = tl.arange(0, PROGRAMS)
            starts, stops = shares(
                plan, batch, per_sample, waves, programs, width, UNIFORM, TAPS_1, TAPS_2, BATCH, PROGRAMS, LEAST, BK
            )
            used = (starts < stops) & (stops > tile_start) & (starts < tile_start + length)
            tl.debug_barrier()
            before = tl.atomic_add(flags + tl.max(tl.where(used, q, -1), 0), 1, sem="acq_rel")
            if before == tl.sum(used.to(tl.int32), 0) - 1:
                tl.debug_barrier()
                found = tl.zeros((SUM_ROWS, BN), tl.float32)
                for chunk in range(0, BM // ROWS):
                    m = chunk * ROWS + tl.arange(0, ROWS)
                    o = o0 + tl.arange(0, BN)
                    v = add_parts(partial, m, starts, used, tile_start, BM * BN, PROGRAMS, BN)
                    more = finish(
                        v, m, o, b, t0, h0, w0, bias_row, skip, out,
                        t_size, h_size, w_size, outputs, stride_b, stride_o, stride_t, stride_h, stride_w,
                        HAS_BIAS, RELU, HAS_SKIP, SUM_TAPS, WIDE, BH, BW,
                    )  # fmt: skip
                    if SUM_TAPS != 0:
                        found += more
                if SUM_TAPS != 0:
                    write_sums(found, part_sums, b, box, boxes, o0 + tl.arange(0, BN), outputs, SUM_TAPS)
                    add_boxes(part_sums, sums, flags + programs, b, boxes, o0, outputs, SUM_TAPS, SUM_ROWS, BN)
        begin = tl.where(whole, begin, tile_start + length)


class ConvGrid(NamedTuple):
    """A convolution's tile and grid, known before its operands are."""

    tile: tuning.Tile
    box: Box
    programs: int
    waves: int
    arrival_counters: int


def conv_grid(x: Tensor, outputs: int, width: int, taps: int, sum_taps: int) -> ConvGrid:
    """``x`` gives batch, size, dtype and device; ``width`` is the most columns a reduction has, by ``taps``."""
    size = tuple(x.shape[2:])
    architecture, processors = launch.chip(x.device)
    small = sum_taps == 9
    tile = tuning.choose_tile("conv", architecture, tuning.kind_of(x.dtype), size, outputs, x.shape[0], small)
    box = best_box(tile.m, *size)
    tiles = x.shape[0] * box.tiles(*size) * cdiv(outputs, tile.n)
    most = tiles * cdiv(width, tile.k) * taps
    programs = max(1, min(processors * tile.per_sm, cdiv(most, tuning.LEAST_BLOCKS)))
    if most > features.INT32:
        raise ValueError(f"x: got {tuple(x.shape)}, wanted fewer than 2^31 steps of {tile.k} channels in all its tiles")
    counters = programs + x.shape[0] * cdiv(outputs, tile.n)
    return ConvGrid(tile, box, programs, max(0, tiles // programs - 1), counters)


def conv(
    panel: Tensor,
    filters: Tensor,
    form: str,
    plan: Tensor,
    out: Tensor,
    grid: ConvGrid,
    *,
    kernel: tuple[int, int, int] = features.SPATIAL,
    with_temporal: bool = True,
    sign: int = 1,
    order: Tensor | None = None,
    k_channels: int = 0,
    slots: int = 0,
    epilogue: Epilogue = PLAIN,
) -> None:
    """:func:`.conv.conv_kernel` on a panel ``(B, T, H, W, width)`` into ``out (B, O, T, H, W)``."""
    b, outputs, *size = out.shape
    tile, box = grid.tile, grid.box
    x, tma_x = launch.boxed(panel, box, tile.k, tile.tma, left=True)
    shape = {"packed": [tile.n, tile.k], "stored": [1, tile.n, tile.k], "transposed": [1, tile.k, tile.n]}.get(form)
    f, tma_filters = launch.described(filters, shape, tile.tma) if shape else (filters, False)
    sums = epilogue.sums
    sum_taps = 0 if sums is None else sums.shape[2]
    parts = panel.new_empty((b, box.tiles(*size), outputs, sum_taps) if sum_taps else (1,), dtype=torch.float32)
    counters = epilogue.arrival_counters
    if counters is None:
        counters = panel.new_zeros(grid.arrival_counters, dtype=torch.int32)
    partial = panel.new_empty(2 * grid.programs * tile.m * tile.n, dtype=torch.float32)
    conv_kernel[(grid.programs,)](
        x,
        f,
        plan if order is None else order,
        plan,
        partial if epilogue.bias is None else epilogue.bias,
        out if epilogue.skip is None else epilogue.skip,
        out,
        parts,
        parts if sums is None else sums,
        partial,
        counters,
        b,
        *size,
        panel.shape[-1],
        k_channels,
        slots,
        outputs,
        *out.stride(),
        grid.waves,
        FORM=form,
        TMA_X=tma_x,
        TMA_FILTERS=tma_filters,
        UNIFORM=form in ("stored", "transposed"),
        KT_1=kernel[0],
        KH_1=kernel[1],
        KW_1=kernel[2],
        TAPS_2=3 if with_temporal else 0,
        SIGN=sign,
        HAS_BIAS=epilogue.bias is not None,
        RELU=epilogue.relu,
        HAS_SKIP=epilogue.skip is not None,
        SUM_TAPS=sum_taps,
        WIDE=features.needs_int64(out) or panel[0].numel() > features.INT32,
        PRECISION=launch.precision(panel.dtype),
        BATCH=next_power(b),
        PROGRAMS=next_power(grid.programs),
        LEAST=tuning.LEAST_BLOCKS,
        BT=box.t,
        BH=box.h,
        BW=box.w,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
