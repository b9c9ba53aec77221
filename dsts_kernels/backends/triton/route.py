"""Features gathered by channel lists into panels, and for a frozen layer the choice of the neuron whose lists they are.

:mod:`dsts_kernels.backends.gpu.lists` says what a list row, a plan and a slot are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import FrozenWeights
from ..gpu import features
from ..gpu.lists import PLAN, Lists, panel_width
from ..packing import tile_channels
from . import launch, tuning
from .boxes import cdiv, next_power
from .common import position_offsets


@triton.jit
def choose_neuron(
    sums,
    scoring,
    b,
    parts,
    size,
    neurons,
    divisor,
    scores,
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
    STORE: tl.constexpr,
):
    """``argmax`` of the relevance scores of sample ``b``, as torch breaks ties and orders NaN; never out of range."""
    n = tl.arange(0, NEURONS)
    total = tl.zeros((NEURONS,), tl.float32)
    for c0 in range(0, size, BC):
        c = c0 + tl.arange(0, BC)
        v = tl.zeros((BC,), tl.float32)
        for part in range(0, parts):
            v += tl.load(sums + (b.to(tl.int64) * parts + part) * size + c, mask=c < size, other=0.0)
        mask = (n < neurons)[:, None] & (c < size)[None, :]
        total += tl.sum(tl.load(scoring + n[:, None] * size + c[None, :], mask=mask, other=0.0) * v[None, :], 1)
    score = total / divisor
    if STORE:
        tl.store(scores + b * neurons + n, score, mask=n < neurons)
    unknown = (score != score) & (n < neurons)
    best = tl.max(tl.where((n < neurons) & (score == score), score, float("-inf")), 0)
    hit = tl.where(tl.sum(unknown.to(tl.int32), 0) > 0, unknown, score == best)
    return tl.minimum(tl.min(tl.where(hit & (n < neurons), n, NEURONS), 0), neurons - 1)


@triton.jit
def gather_columns(
    x,
    order,
    gate,
    panel,
    b,
    row,
    blocks_1,
    blocks_2,
    count,
    second,
    known,
    size,
    positions,
    h_size,
    w_size,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    pitch,
    SCALED: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """One block of positions of sample ``b``, gathered by its lists into K blocks of a panel, zeros behind each list.

    Axis 0 of the grid is the samples' blocks of positions, axis 1 shares the K blocks out. ``SCALED`` multiplies by
    the gate, or by 1 minus it for the second operator. A sample whose neuron is not ``known`` becomes NaN.
    """
    p = tl.program_id(0) % tl.cdiv(positions, BP) * BP + tl.arange(0, BP)
    place = position_offsets(p, h_size, w_size, stride_t, stride_h, stride_w, FLAT, WIDE)
    start = x + b.to(tl.int64) * stride_b
    out = panel + (b.to(tl.int64) * positions + p)[:, None] * pitch
    # The same block of either list in turn: both are sorted, so they read the same lines.
    for block in range(tl.program_id(1), tl.maximum(blocks_1, blocks_2), tl.num_programs(1)):
        for side in tl.static_range(2):
            blocks = blocks_1 if side == 0 else blocks_2
            if block < blocks:
                k = block * BK + tl.arange(0, BK)
                place_in_row = row.to(tl.int64) * size + k
                column = block * BK + tl.arange(0, BK)
                if side == 0:
                    listed = k < count
                else:
                    listed = k < size - second
                    place_in_row += second
                    column += blocks_1 * BK
                c = tl.load(order + place_in_row, mask=listed, other=0)
                if WIDE:
                    c = c.to(tl.int64)
                mask = (p < positions)[:, None] & listed[None, :]
                v = tl.load(start + (place[:, None] + (c * stride_c)[None, :]), mask=mask, other=0.0)
                if SCALED:
                    g = tl.load(gate + b.to(tl.int64) * size + c, mask=listed, other=0.0).to(tl.float32)
                    g = g if side == 0 else 1.0 - g
                    v = v.to(tl.float32) * g[None, :]
                v = tl.where(known, v, float("nan")).to(panel.dtype.element_ty)
                tl.store(out + column[None, :], v, mask=(p < positions)[:, None])


@triton.jit(do_not_specialize=["parts", "flag_count"])
def route_and_gather_kernel(
    x,
    sums,
    scoring,
    channels,
    starts,
    panel,
    plan,
    neuron,
    scores,
    flags,
    parts,
    taps,
    neurons,
    divisor,
    size,
    positions,
    h_size,
    w_size,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    pitch,
    flag_count,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """A frozen layer's first launch: choose each sample's neuron, gather its channels, and plan the convolution.

    Every program works its sample's choice out for itself, alike; one writes it down. ``flags`` are zeroed for the
    convolution that follows.
    """
    along = tl.cdiv(positions, BP)
    b = tl.program_id(0) // along
    batch = tl.num_programs(0) // along
    one = (tl.program_id(0) % along == 0) & (tl.program_id(1) == 0)
    chosen = choose_neuron(sums, scoring, b, parts, size * taps, neurons, divisor, scores, NEURONS, BC, True)
    n = tl.arange(0, NEURONS)
    split_all = tl.load(starts + n + 1, mask=n < neurons, other=0) - tl.load(starts + n, mask=n < neurons, other=0)
    split_all = split_all.to(tl.int32)
    blocks_all = 9 * tl.cdiv(split_all, BK) + 3 * tl.cdiv(size - split_all, BK)
    split = tl.sum(tl.where(n == chosen, split_all, 0), 0)
    blocks_1 = tl.cdiv(split, BK)
    blocks_2 = tl.cdiv(size - split, BK)
    if one:
        tl.store(neuron + b, chosen.to(tl.int64))
        tl.store(plan + b * 6, tl.sum(tl.where(n < chosen, blocks_all, 0), 0))
        tl.store(plan + b * 6 + 1, blocks_1)
        tl.store(plan + b * 6 + 2, blocks_2)
        tl.store(plan + b * 6 + 3, split)
        tl.store(plan + b * 6 + 4, split)
        tl.store(plan + b * 6 + 5, chosen)
        for i in range(b * 256, flag_count, batch * 256):
            place = i + tl.arange(0, 256)
            tl.store(flags + place, tl.zeros((256,), tl.int32), mask=place < flag_count)
    gather_columns(
        x, channels, x, panel, b, chosen, blocks_1, blocks_2, split, split, True, size, positions, h_size, w_size,
        stride_b, stride_c, stride_t, stride_h, stride_w, pitch, False, FLAT, WIDE, BP, BK,
    )  # fmt: skip


@triton.jit
def pack_kernel(
    x,
    order,
    gate,
    neuron,
    slots,
    plans,
    panel,
    neurons,
    size,
    positions,
    h_size,
    w_size,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    pitch,
    BY_SLOT: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Training's gather: gated features by the list row of the sample, or with ``BY_SLOT`` of its slot."""
    b = tl.program_id(0) // tl.cdiv(positions, BP)
    row = b
    if BY_SLOT:
        row = tl.maximum(tl.load(slots + b), 0)
    plan = plans + row * 6
    chosen = tl.load(neuron + b)
    known = (chosen >= 0) & (chosen < neurons)
    gather_columns(
        x, order, gate, panel, b, row, tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3), tl.load(plan + 4),
        known, size, positions, h_size, w_size, stride_b, stride_c, stride_t, stride_h, stride_w, pitch,
        True, FLAT, WIDE, BP, BK,
    )  # fmt: skip


def gather_grid(batch: int, positions: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Every sample's blocks of positions, and shares of a list's K blocks: about four programs a multiprocessor."""
    along = batch * cdiv(positions, tuning.GATHER_POSITIONS)
    return along, max(1, min(blocks, cdiv(4 * launch.chip(device)[1], along)))


def gather_panel(
    x: Tensor, gate: Tensor, neuron: Tensor, neurons: int, slots: Tensor | None, lists: Lists, width: int
) -> Tensor:
    """``(B, T, H, W, width)``: gated features gathered by each sample's own list row, or by that of its slot."""
    b, c, t, h, w = x.shape
    panel = x.new_empty(b, t, h, w, width)
    block_k = tile_channels(x.dtype)
    strides, is_flat = features.kernel_strides(x)
    pack_kernel[gather_grid(b, t * h * w, cdiv(c, block_k), x.device)](
        x,
        lists.order,
        gate,
        neuron,
        neuron if slots is None else slots,
        lists.plans,
        panel,
        neurons,
        c,
        t * h * w,
        h,
        w,
        *strides,
        width,
        BY_SLOT=slots is not None,
        FLAT=is_flat,
        WIDE=features.needs_int64(x),
        BP=tuning.GATHER_POSITIONS,
        BK=block_k,
    )
    return panel


def route_and_gather(
    x: Tensor, sums: Tensor, w: FrozenWeights, divisor: int, neuron: Tensor, scores: Tensor, arrival_counters: Tensor
) -> tuple[Tensor, Tensor]:
    """A frozen layer's panel and plan; fills ``neuron`` and ``scores``, zeroes ``arrival_counters``.

    ``sums (B, parts, C * taps)`` are the tap sums of ``x`` in parts that are added up here.
    """
    b, c, t, h, width = x.shape
    block_k, lanes = tile_channels(x.dtype), next_power(scores.shape[1])
    panel = x.new_empty(b, t, h, width, panel_width(c, x.dtype, False))
    plan = torch.empty((b, PLAN), dtype=torch.int32, device=x.device)
    strides, is_flat = features.kernel_strides(x)
    route_and_gather_kernel[gather_grid(b, t * h * width, cdiv(c, block_k), x.device)](
        x,
        sums,
        w.scoring,
        w.channels,
        w.starts,
        panel,
        plan,
        neuron,
        scores,
        arrival_counters,
        sums.shape[1],
        w.scoring.shape[2],
        scores.shape[1],
        float(divisor),
        c,
        t * h * width,
        h,
        width,
        *strides,
        panel.shape[-1],
        arrival_counters.numel(),
        FLAT=is_flat,
        WIDE=features.needs_int64(x),
        NEURONS=lanes,
        BC=max(16, min(256, 4096 // lanes)),
        BP=tuning.GATHER_POSITIONS,
        BK=block_k,
        num_warps=8,
    )
    return panel, plan
