"""Filter gradients, grouped by neuron: one tile of one tap of one slot a program, over all the slot's samples in order.

The reduction runs over positions, a box at a time. Rows of the result come from ``left``, shifted by the tap, columns
from ``right``. For the gated convolution ``left`` is its panel, gathered by the lists of the slot, so that only listed
channels are computed, and ``right`` the gradient; for a mixing kernel (no ``plans``) ``left`` is the gradient, shifted
the other way.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features, grids, switches
from ..gpu.grids import cdiv
from ..gpu.lists import Groups, Lists
from ..packing import tile_channels
from . import launch, load, tuning
from .common import (
    Size,
    box_start,
    boxes_of,
    load_box,
    plan_field,
    tap_shift,
)
from .gluon import plan as gluon


@triton.jit
def weight_gradient_kernel(
    left,  # [B, T, H, W, left_width], or its descriptor
    right,  # [B, T, H, W, right_width], or its descriptor
    order,  # [S, k_channels] int32, or None
    plans,  # [S, PLAN] int32, or None: all channels in order
    neuron_of,  # [S] int32
    groups,  # [S, 2] int32
    members,  # [B] int32
    out,  # [S, taps, k_channels, right_width], or BY_NEURON [N, ...]
    size,
    left_width,
    right_width,
    k_channels,
    KERNEL: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    SIGN: tl.constexpr,
    BY_NEURON: tl.constexpr,
    TMA_LEFT: tl.constexpr,
    TMA_RIGHT: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Only listed rows of ``out`` are written."""
    SPATIAL_TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    slot = tl.program_id(2)
    tap = tl.program_id(1)
    n = tl.load(neuron_of + slot)
    across = tl.cdiv(right_width, BN)
    j = tl.program_id(0) // across * BM + tl.arange(0, BM)
    o0 = tl.program_id(0) % across * BN
    column = tl.program_id(0) // across * BM
    dt, dh, dw = tap_shift(tap, KERNEL, SIGN)
    count = k_channels
    list_start = 0
    if plans is not None:
        is_spatial = tap < SPATIAL_TAPS
        dt = tl.where(is_spatial, dt, SIGN * (tap - SPATIAL_TAPS - 1))
        dh = tl.where(is_spatial, dh, 0)
        dw = tl.where(is_spatial, dw, 0)
        if n >= 0:
            list_start = tl.where(is_spatial, 0, plan_field(plans, slot, "temporal_start"))
            count = tl.where(is_spatial, plan_field(plans, slot, "spatial_channels"), k_channels - list_start)
            column += tl.where(is_spatial, 0, plan_field(plans, slot, "spatial_blocks") * BK)
    if (n >= 0) & (tl.program_id(0) // across * BM < count):
        acc = tl.zeros((BM, BN), tl.float32)
        boxes = boxes_of(size, BOX)
        start = tl.load(groups + slot * 2)
        for i in range(0, tl.load(groups + slot * 2 + 1)):
            b = tl.load(members + start + i)
            for box in range(0, boxes):
                t0, h0, w0 = box_start(box, size, BOX)
                p = load_box(
                    left, b, (t0 + dt, h0 + dh, w0 + dw), column, size, left_width, TMA_LEFT, INDEX_64, BOX, BM
                )
                q = load_box(right, b, (t0, h0, w0), o0, size, right_width, TMA_RIGHT, INDEX_64, BOX, BN)
                acc = tl.dot(p.T, q, acc, input_precision=PRECISION)
        o = o0 + tl.arange(0, BN)
        mask = (j < count)[:, None] & (o < right_width)[None, :]
        channel = j
        if plans is not None:
            channel = tl.load(order + slot.to(tl.int64) * k_channels + list_start + j, mask=j < count, other=0)
        index = n if BY_NEURON else slot
        target = out + (index * (SPATIAL_TAPS + TEMPORAL_TAPS) + tap).to(tl.int64) * k_channels * right_width
        cells = channel.to(tl.int64)[:, None] * right_width + o[None, :]
        tl.store(target + cells, acc.to(out.dtype.element_ty), mask=mask)


@launch.remembered
def gradient_launch(
    size: tuple[int, int, int],
    numbers: tuple[int, int, int],  # columns of the operands, channels of the result
    slots: int,
    kernel: tuple[int, int, int],
    temporal_taps: int,
    sign: int,
    by_neuron: bool,
    tile: tuning.Tile,
    box: grids.Box,
    tma: tuple[bool, bool],
    index_64: bool,
    precision: str,
    block_k: int,
) -> launch.Launch:
    _, width, k_channels = numbers
    return launch.Launch(
        (cdiv(k_channels, tile.m) * cdiv(width, tile.n), math.prod(kernel) + temporal_taps, slots),
        (Size(*size), *numbers),
        KERNEL=kernel,
        TEMPORAL_TAPS=temporal_taps,
        SIGN=sign,
        BY_NEURON=by_neuron,
        TMA_LEFT=tma[0],
        TMA_RIGHT=tma[1],
        INDEX_64=index_64,
        PRECISION=precision,
        BOX=box,
        BM=tile.m,
        BN=tile.n,
        BK=block_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def gluon_tile(left: Tensor, right: Tensor, k_channels: int) -> gluon.WaveTile | None:
    """The tile of :mod:`.gluon.weight_gradient`, where it runs: its switch is on, and a tile fits."""
    if (
        not switches.current().gluon_weight_gradient
        or tuning.is_forced("weight_gradient")
        or not launch.gluon_runs(left.device, left.dtype)
        or not (launch.aligned(left) and launch.aligned(right))
    ):
        return None
    return gluon.weight_tile(k_channels, right.shape[-1], math.prod(left.shape[1:4]))


def weight_gradient(
    left: Tensor,  # (B, T, H, W, left_width)
    right: Tensor,  # (B, T, H, W, right_width)
    lists: Lists | None,
    groups: Groups,
    k_channels: int,
    kernel: tuple[int, int, int],
    with_temporal: bool,
    sign: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`.weight_gradient.weight_gradient_kernel` by slot, or into ``out`` by neuron."""
    size, width = tuple(left.shape[1:4]), right.shape[-1]
    by_neuron = out is not None
    out = torch.empty(shape, dtype=dtype, device=left.device) if out is None else out
    if (wave_tile := gluon_tile(left, right, k_channels)) is not None:
        load("gluon.weight_gradient").weight_gradient(
            left, right, lists, groups, k_channels, kernel, with_temporal, sign, out, by_neuron, wave_tile
        )
        return out
    architecture = launch.chip(left.device)[0]
    tile = tuning.choose_tile("weight_gradient", architecture, tuning.kind_of(left.dtype), size, width)
    box = grids.best_box(tile.k, *size)
    temporal_taps = 3 if with_temporal else 0
    lefts, tma_left = launch.boxed(left, box, tile.m, tile.tma, left=True)
    rights, tma_right = launch.boxed(right, box, tile.n, tile.tma, left=False)
    order, plans = (None, None) if lists is None else (lists.order, lists.plans)
    one = gradient_launch(
        size, (left.shape[-1], width, k_channels), groups.neuron_of.shape[0], kernel, temporal_taps, sign, by_neuron,
        tile, box, (tma_left, tma_right), features.needs_int64(left, right), launch.precision(left.dtype),
        tile_channels(left.dtype),
    )  # fmt: skip
    tensors = lefts, rights, order, plans, groups.neuron_of, groups.groups, groups.members, out
    launch.start(weight_gradient_kernel, one, tensors)
    return out
