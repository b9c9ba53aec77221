"""Features gathered by channel lists into panels: training's gather, and what routing fused with it has in common.

:mod:`dsts_kernels.backends.gpu.lists` says what a list, a plan and a slot are; :mod:`.route` is a frozen layer's
gather, which chooses the neuron first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features, grids, switches
from ..gpu.grids import cdiv
from ..gpu.lists import Lists
from ..packing import tile_channels
from . import launch
from .common import (
    Size,
    kernel_strides,
    plan_field,
    position_offsets,
)


@triton.jit
def gather_columns(
    x,  # [B, C, T, H, W]
    order,  # [lists, C] int32
    gate,  # [B, C], or None
    panel,  # [B, T, H, W, width]
    b,
    row,
    spatial_blocks,
    temporal_blocks,
    spatial_channels,
    temporal_start,
    known,
    channels,
    positions,
    size,
    stride,
    width,
    FLAT_POSITIONS: tl.constexpr,
    INDEX_64: tl.constexpr,
    FLAT_STORE: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """One block of positions of sample ``b``, gathered by its lists into K blocks of a panel, zeros behind each list.

    Axis 0 of the grid is the samples' blocks of positions, axis 1 splits the K blocks. ``gate`` multiplies what the
    spatial operator reads, 1 minus it what the temporal one reads. A sample whose neuron is not ``known`` becomes NaN.

    Triton gives loads and stores of one shape one layout, with 16 bytes a lane for the stores: lanes of a load are then
    8 listed channels apart, and each reads a sector of its own. ``FLAT_STORE`` stores the tile as a vector, so that
    lanes of a load read neighbours of the list.
    """
    first = tl.program_id(0) % tl.cdiv(positions, BP) * BP
    p = first + tl.arange(0, BP)
    offsets = position_offsets(p, size, stride, FLAT_POSITIONS, INDEX_64)
    start = x + b.to(tl.int64) * stride.b
    if FLAT_STORE:
        cell = tl.arange(0, BP * BK)
        stored = first + cell // BK
        out = panel + ((b.to(tl.int64) * positions + stored) * width + cell % BK)
    else:
        out = panel + ((b.to(tl.int64) * positions + p)[:, None] * width + tl.arange(0, BK)[None, :])
    # The same block of either list in turn: both are sorted, so they read the same lines.
    for block in range(tl.program_id(1), tl.maximum(spatial_blocks, temporal_blocks), tl.num_programs(1)):
        for is_temporal in tl.static_range(2):
            blocks = temporal_blocks if is_temporal else spatial_blocks
            if block < blocks:
                k = block * BK + tl.arange(0, BK)
                place = row.to(tl.int64) * channels + k
                column = block * BK
                if is_temporal:
                    listed = k < channels - temporal_start
                    place += temporal_start
                    column += spatial_blocks * BK
                else:
                    listed = k < spatial_channels
                c = tl.load(order + place, mask=listed, other=0)
                if INDEX_64:
                    c = c.to(tl.int64)
                mask = (p < positions)[:, None] & listed[None, :]
                v = tl.load(start + (offsets[:, None] + (c * stride.c)[None, :]), mask=mask, other=0.0)
                if gate is not None:
                    g = tl.load(gate + b.to(tl.int64) * channels + c, mask=listed, other=0.0).to(tl.float32)
                    g = 1.0 - g if is_temporal else g
                    v = v.to(tl.float32) * g[None, :]
                v = tl.where(known, v, float("nan")).to(panel.dtype.element_ty)
                if FLAT_STORE:
                    tl.store(out + column, tl.reshape(v, (BP * BK,)), mask=stored < positions)
                else:
                    tl.store(out + column, v, mask=(p < positions)[:, None])


@triton.jit
def gather_panel_kernel(
    x,  # [B, C, T, H, W]
    order,  # [lists, C] int32
    gate,  # [B, C]
    neuron,  # [B] int64
    slots,  # [B] int32, whose lists these are, or None: each sample has its own
    plans,  # [lists, PLAN] int32
    panel,  # [B, T, H, W, width]
    neurons,
    channels,
    positions,
    size,
    stride,
    width,
    FLAT_POSITIONS: tl.constexpr,
    INDEX_64: tl.constexpr,
    FLAT_STORE: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Training's gather: gated features by the list of the sample, or of its slot."""
    b = tl.program_id(0) // tl.cdiv(positions, BP)
    row = b
    if slots is not None:
        row = tl.maximum(tl.load(slots + b), 0)
    chosen = tl.load(neuron + b)
    known = (chosen >= 0) & (chosen < neurons)
    gather_columns(
        x, order, gate, panel, b, row,
        plan_field(plans, row, "spatial_blocks"), plan_field(plans, row, "temporal_blocks"),
        plan_field(plans, row, "spatial_channels"), plan_field(plans, row, "temporal_start"), known, channels,
        positions, size, stride, width, FLAT_POSITIONS, INDEX_64, FLAT_STORE, BP, BK,
    )  # fmt: skip


def gather_grid(shape: torch.Size, block_k: int, processors: int) -> grids.GatherGrid:
    """Of features ``(B, C, T, H, W)``."""
    return grids.gather_grid(shape[0], math.prod(shape[2:]), cdiv(shape[1], block_k), processors)


@launch.remembered
def gather_launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    neurons: int,
    width: int,
    block_k: int,
    index_64: bool,
    flat: bool,
    processors: int,
) -> launch.Launch:
    stride, is_flat = kernel_strides(shape, strides)
    return launch.Launch(
        gather_grid(shape, block_k, processors),
        (neurons, shape[1], math.prod(shape[2:]), Size(*shape[2:]), stride, width),
        FLAT_POSITIONS=is_flat, INDEX_64=index_64, FLAT_STORE=flat, BP=grids.GATHER_POSITIONS, BK=block_k,
    )  # fmt: skip


def gather_panel(
    x: Tensor,  # (B, C, T, H, W)
    gate: Tensor,  # (B, C)
    neuron: Tensor,  # (B,) int64
    neurons: int,
    slots: Tensor | None,  # (B,) int32
    lists: Lists,
    width: int,
) -> Tensor:
    """``(B, T, H, W, width)``: gated features gathered by each sample's own list, or by that of its slot."""
    b, _, *size = x.shape
    panel = x.new_empty(b, *size, width)
    one = gather_launch(
        x.shape, x.stride(), neurons, width, tile_channels(x.dtype), features.needs_int64(x),
        switches.current().flat_gather, launch.chip(x.device)[1],
    )  # fmt: skip
    launch.start(gather_panel_kernel, one, (x, lists.order, gate, neuron, slots, lists.plans, panel))
    return panel
