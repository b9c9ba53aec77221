"""Data gradient of the gated convolution, both operators in one kernel, with the gates' gradient as its epilogue.

``dx = gate*dxs + (1 - gate)*dxt`` and ``dgate = <x, dxs - dxt>``, where ``dxs`` and ``dxt`` are the data gradients of
the spatial and of the temporal operator. Where gates train, both are needed of every channel. Where they are frozen
(no ``dgate``) a tile's columns come in the order of the sample's lists, and most tiles need one operator only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features, grids, switches
from ..gpu.grids import cdiv
from ..gpu.lists import Lists
from . import launch, load, tuning
from .common import (
    Size,
    Strides,
    box_positions,
    box_start,
    boxes_of,
    inside,
    load_box,
    plan_field,
    tap_shift,
)
from .epilogue import part_of
from .gluon import plan as gluon


@triton.jit
def load_taps(
    filters,  # [slots * 12, C, O], or with TMA a descriptor of [1, BN, BK] of it
    matrix,
    c,
    c0,
    known,
    o0,
    channels,
    outputs,
    LISTED: tl.constexpr,
    TMA: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``[BK, BN]``: one tap's filters of a block of outputs, for channels ``c``."""
    if TMA and not LISTED:
        f = filters.load([matrix, c0, o0]).reshape(BN, BK).T
    else:
        o = o0 + tl.arange(0, BK)
        start = filters + matrix.to(tl.int64) * channels * outputs
        cells = c.to(tl.int64)[None, :] * outputs + o[:, None]
        f = tl.load(start + cells, mask=(o < outputs)[:, None] & known[None, :], other=0.0)
    return f


@triton.jit
def write_gradients(
    spatial,  # [BM, columns] of dxs, like the next of dxt
    temporal,
    position,
    valid,
    channel,
    listed,
    b,
    box,
    boxes,
    has_slot,
    gate,  # [B, C]
    x,  # [B, C, T, H, W]
    dx,  # [B, C, T, H, W], or None
    dgate,  # [B, boxes, C] float32, or None
    channels,
    stride,
    INDEX_64: tl.constexpr,
):
    """The epilogue of some channels of a tile. A neuron out of range (not ``has_slot``) shows as NaN."""
    mask = valid[:, None] & listed[None, :]
    if INDEX_64:
        offsets = position[:, None] + (channel.to(tl.int64) * stride.c)[None, :]
    else:
        offsets = position[:, None] + (channel * stride.c)[None, :]
    if dgate is not None:
        v = tl.load(x + b.to(tl.int64) * stride.b + offsets, mask=mask, other=0.0).to(tl.float32)
        products = tl.where(has_slot, tl.sum(v * (spatial - temporal), 0), float("nan"))
        tl.store(dgate + (b * boxes + box).to(tl.int64) * channels + channel, products, mask=listed)
    if dx is not None:
        g = tl.load(gate + b.to(tl.int64) * channels + channel, mask=listed, other=0.0).to(tl.float32)
        g = tl.where(has_slot, g, float("nan"))[None, :]
        v = tl.where(g == 0.0, 0.0, g * spatial) + tl.where(g == 1.0, 0.0, (1.0 - g) * temporal)
        tl.store(dx + b.to(tl.int64) * stride.b + offsets, v.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def data_gradient_kernel(
    grad,  # [B, T, H, W, O], or its descriptor
    filters,  # [slots * 12, C, O], or its descriptor
    order,  # [B, C] int32
    plans,  # [B, PLAN] int32
    gate,  # [B, C]
    x,  # [B, C, T, H, W] with the strides of dx
    dx,  # [B, C, T, H, W], or None where only gates train
    dgate,  # [B, boxes, C] float32, added up over boxes by gate_sums_kernel, or None where gates are frozen
    size,
    stride,
    channels,
    outputs,
    TMA_GRAD: tl.constexpr,
    TMA_FILTERS: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of positions by ``BN`` channels a program."""
    LISTED: tl.constexpr = dgate is None
    BM: tl.constexpr = BOX.t * BOX.h * BOX.w
    PARTS: tl.constexpr = 2 if BN >= 128 else 1
    boxes = boxes_of(size, BOX)
    across = tl.cdiv(channels, BN)
    b = tl.program_id(0) // (boxes * across)
    box = tl.program_id(0) // across % boxes
    c0 = tl.program_id(0) % across * BN
    start = box_start(box, size, BOX)
    t0, h0, w0 = start
    filters_slot = plan_field(plans, b, "filters")
    slot = tl.maximum(filters_slot, 0)
    blocks = tl.cdiv(outputs, BK)
    spatial_steps = 9 * blocks
    temporal_steps = 3 * blocks
    place = c0 + tl.arange(0, BN)
    known = place < channels
    c = place
    row = order + b.to(tl.int64) * channels
    if LISTED:
        spatial_steps = tl.where(c0 < plan_field(plans, b, "spatial_channels"), spatial_steps, 0)
        temporal_steps = tl.where(c0 + BN > plan_field(plans, b, "temporal_start"), temporal_steps, 0)
        c = tl.load(row + place, mask=known, other=0)

    spatial = tl.zeros((BM, BN), tl.float32)
    for i in range(0, spatial_steps):
        dt, dh, dw = tap_shift(i % 9, (1, 3, 3), -1)
        o0 = i // 9 * BK
        a = load_box(grad, b, (t0 + dt, h0 + dh, w0 + dw), o0, size, outputs, TMA_GRAD, INDEX_64, BOX, BK)
        f = load_taps(filters, slot * 12 + i % 9, c, c0, known, o0, channels, outputs, LISTED, TMA_FILTERS, BN, BK)
        spatial = tl.dot(a, f, spatial, input_precision=PRECISION)
    temporal = tl.zeros((BM, BN), tl.float32)
    for i in range(0, temporal_steps):
        o0 = i // 3 * BK
        a = load_box(grad, b, (t0 + 1 - i % 3, h0, w0), o0, size, outputs, TMA_GRAD, INDEX_64, BOX, BK)
        f = load_taps(filters, slot * 12 + 9 + i % 3, c, c0, known, o0, channels, outputs, LISTED, TMA_FILTERS, BN, BK)
        temporal = tl.dot(a, f, temporal, input_precision=PRECISION)

    t, h, w = box_positions(tl.arange(0, BM), start, BOX)
    valid = inside(t, h, w, size)
    if INDEX_64:
        position = t.to(tl.int64) * stride.t + h.to(tl.int64) * stride.h + w.to(tl.int64) * stride.w
    else:
        position = t * stride.t + h * stride.h + w * stride.w
    for part in tl.static_range(PARTS):
        channel = c0 + part * (BN // PARTS) + tl.arange(0, BN // PARTS)
        listed = channel < channels
        if LISTED:
            channel = tl.load(row + channel, mask=listed, other=0)
        write_gradients(
            part_of(spatial, part, PARTS, BM, BN), part_of(temporal, part, PARTS, BM, BN), position, valid,
            channel, listed, b, box, boxes, filters_slot >= 0, gate, x, dx, dgate, channels, stride, INDEX_64,
        )  # fmt: skip


@triton.jit(do_not_specialize=["boxes"])
def gate_sums_kernel(
    parts,  # [B, boxes, C] float32
    dgate,  # [B, C]
    boxes,
    channels,
    BLOCK: tl.constexpr,
):
    """Gradients of gates, added up over the boxes of positions in order."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for box in range(0, boxes):
        total += tl.load(parts + (b * boxes + box) * channels + c, mask=c < channels, other=0.0)
    tl.store(dgate + b * channels + c, total.to(dgate.dtype.element_ty), mask=c < channels)


@launch.remembered
def sums_launch(batch: int, boxes: int, channels: int) -> launch.Launch:
    block = tuning.gate_channels(channels)
    return launch.Launch((batch, cdiv(channels, block)), (boxes, channels), BLOCK=block)


def gate_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """``parts (B, boxes, C)`` added up: ``(B, C)`` in ``dtype``."""
    b, boxes, c = parts.shape
    dgate = torch.empty((b, c), dtype=dtype, device=parts.device)
    launch.start(gate_sums_kernel, sums_launch(b, boxes, c), (parts, dgate))
    return dgate


@launch.remembered
def gradient_launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    outputs: int,
    tile: tuning.Tile,
    box: grids.Box,
    tma: tuple[bool, bool],  # of the gradient and of filters
    index_64: bool,
    precision: str,
) -> launch.Launch:
    b, c, *size = shape
    return launch.Launch(
        (b * box.tiles(*size) * cdiv(c, tile.n),),
        (Size(*size), Strides(*strides), c, outputs),
        TMA_GRAD=tma[0],
        TMA_FILTERS=tma[1],
        INDEX_64=index_64,
        PRECISION=precision,
        BOX=box,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def wave_grid(x: Tensor, grad_ndhwc: Tensor, filters: Tensor) -> gluon.WaveGrid | None:
    """The grid of :mod:`.gluon.data_gradient`, where it runs: its switch is on, and its waves are full."""
    if (
        not switches.current().gluon_data_gradient
        or tuning.is_forced("data_gradient")
        or not launch.gluon_runs(x.device, x.dtype)
        or not (launch.aligned(grad_ndhwc) and launch.aligned(filters))
    ):
        return None
    k_blocks = 12 * cdiv(grad_ndhwc.shape[-1], gluon.HALF_K)
    return gluon.wave_grid(launch.chip(x.device)[1], x.shape[0], tuple(x.shape[2:]), x.shape[1], k_blocks)


def data_gradient(
    grad_ndhwc: Tensor,  # (B, T, H, W, O)
    x: Tensor,  # (B, C, T, H, W)
    gate: Tensor,  # (B, C)
    lists: Lists,  # of samples
    filters: Tensor,  # (S * 12, C, O), rows perhaps padded
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``gate``, each ``None`` where it is not needed."""
    b, c, *size = x.shape
    outputs = grad_ndhwc.shape[-1]
    if filters.shape[-1] != outputs:  # from a forward pass of the cuda backend, which pads rows
        filters = filters[..., :outputs].contiguous()
    waves = wave_grid(x, grad_ndhwc, filters) if need_gate else None
    tile = tuning.choose_tile("data_gradient", launch.chip(x.device)[0], tuning.kind_of(x.dtype), tuple(size), c)
    box = waves.box if waves else grids.best_box(tile.m, *size)
    dx = torch.empty_like(x) if need_x else None
    if dx is not None and dx.stride() != x.stride() and need_gate:  # one set of strides serves both
        x = torch.empty_like(dx).copy_(x)
    like = x if dx is None else dx
    parts = x.new_empty((b, box.tiles(*size), c), dtype=torch.float32) if need_gate else None
    if waves:
        load("gluon.data_gradient").data_gradient(grad_ndhwc, x, gate, lists, filters, dx, parts, waves)
        return dx, gate_sums(parts, gate.dtype)
    g, tma_grad = launch.boxed(grad_ndhwc, box, tile.k, tile.tma, left=True)
    f, tma_filters = launch.described(filters, (1, tile.n, tile.k), tile.tma and need_gate)
    one = gradient_launch(
        x.shape, like.stride(), outputs, tile, box, (tma_grad, tma_filters),
        features.needs_int64(like, grad_ndhwc), launch.precision(x.dtype),
    )  # fmt: skip
    launch.start(data_gradient_kernel, one, (g, f, lists.order, lists.plans, gate, x, dx, parts))
    return dx, None if parts is None else gate_sums(parts, gate.dtype)
