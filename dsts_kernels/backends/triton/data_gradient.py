"""Data gradient of the gated convolution, both operators in one kernel, with the gates' gradient as its epilogue.

``dx = gate*dxs + (1 - gate)*dxt`` and ``dgate = <x, dxs - dxt>``, where ``dxs`` and ``dxt`` are the operators' own
data gradients. Where gates train, both are needed of every channel. Where they are frozen (``LISTED``) a tile's
columns come in the order of the sample's lists, and most tiles need one operator only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features
from ..gpu.lists import Groups
from ..packing import tile_channels
from . import launch, tuning
from .boxes import best_box, cdiv
from .common import box_positions, box_start, inside, load_box, tap_shift
from .epilogue import part_of
from .filters import pack_filters
from .lists import list_channels


@triton.jit
def load_rows(
    filters, matrix, c, c0, known, o0, channels, outputs,
    LISTED: tl.constexpr, TMA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``[BK, BN]``: one tap's filters of a block of outputs, for channels ``c``."""
    if TMA and not LISTED:
        found = filters.load([matrix, c0, o0]).reshape(BN, BK).T
    else:
        o = o0 + tl.arange(0, BK)
        start = filters + matrix.to(tl.int64) * channels * outputs
        cells = c.to(tl.int64)[None, :] * outputs + o[:, None]
        found = tl.load(start + cells, mask=(o < outputs)[:, None] & known[None, :], other=0.0)
    return found


@triton.jit
def data_gradient_kernel(
    grad,
    filters,
    order,
    plan,
    gate,
    x,
    dx,
    dgate,
    t_size,
    h_size,
    w_size,
    channels,
    outputs,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    LISTED: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_GATE: tl.constexpr,
    TMA_GRAD: tl.constexpr,
    TMA_FILTERS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``grad (B, T, H, W, O)``, ``filters (slots, 12, C, O)``; ``x`` and ``dx`` have the same strides.

    ``dgate (B, boxes, C)`` float32 is added up over boxes afterwards. A tile a program.
    """
    BM: tl.constexpr = BT * BH * BW
    PARTS: tl.constexpr = 2 if BN >= 128 else 1
    boxes = tl.cdiv(t_size, BT) * tl.cdiv(h_size, BH) * tl.cdiv(w_size, BW)
    columns = tl.cdiv(channels, BN)
    b = tl.program_id(0) // (boxes * columns)
    box = tl.program_id(0) // columns % boxes
    c0 = tl.program_id(0) % columns * BN
    t0, h0, w0 = box_start(box, t_size, h_size, w_size, BT, BH, BW)
    own_slot = tl.load(plan + b * 6)
    slot = tl.maximum(own_slot, 0)
    blocks = tl.cdiv(outputs, BK)
    steps_1 = 9 * blocks
    steps_2 = 3 * blocks
    place = c0 + tl.arange(0, BN)
    known = place < channels
    c = place
    row = order + b.to(tl.int64) * channels
    if LISTED:
        steps_1 = tl.where(c0 < tl.load(plan + b * 6 + 3), steps_1, 0)
        steps_2 = tl.where(c0 + BN > tl.load(plan + b * 6 + 4), steps_2, 0)
        c = tl.load(row + place, mask=known, other=0)

    by_1 = tl.zeros((BM, BN), tl.float32)
    for i in range(0, steps_1):
        dt, dh, dw = tap_shift(i % 9, 1, 3, 3, -1)
        o0 = i // 9 * BK
        a = load_box(
            grad, b, t0 + dt, h0 + dh, w0 + dw, o0, t_size, h_size, w_size, outputs, TMA_GRAD, WIDE, BT, BH, BW, BK
        )
        f = load_rows(filters, slot * 12 + i % 9, c, c0, known, o0, channels, outputs, LISTED, TMA_FILTERS, BN, BK)
        by_1 = tl.dot(a, f, by_1, input_precision=PRECISION)
    by_2 = tl.zeros((BM, BN), tl.float32)
    for i in range(0, steps_2):
        o0 = i // 3 * BK
        a = load_box(
            grad, b, t0 + 1 - i % 3, h0, w0, o0, t_size, h_size, w_size, outputs, TMA_GRAD, WIDE, BT, BH, BW, BK
        )
        f = load_rows(filters, slot * 12 + 9 + i % 3, c, c0, known, o0, channels, outputs, LISTED, TMA_FILTERS, BN, BK)
        by_2 = tl.dot(a, f, by_2, input_precision=PRECISION)

    t, h, w = box_positions(tl.arange(0, BM), t0, h0, w0, BH, BW)
    valid = inside(t, h, w, t_size, h_size, w_size)
    if WIDE:
        position = t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    else:
        position = t * stride_t + h * stride_h + w * stride_w
    for part in tl.static_range(PARTS):
        own = c0 + part * (BN // PARTS) + tl.arange(0, BN // PARTS)
        listed = own < channels
        if LISTED:
            own = tl.load(row + own, mask=listed, other=0)
        part_1 = part_of(by_1, part, PARTS, BM, BN)
        part_2 = part_of(by_2, part, PARTS, BM, BN)
        mask = valid[:, None] & listed[None, :]
        if WIDE:
            offsets = position[:, None] + (own.to(tl.int64) * stride_c)[None, :]
        else:
            offsets = position[:, None] + (own * stride_c)[None, :]
        if NEED_GATE:
            v = tl.load(x + b.to(tl.int64) * stride_b + offsets, mask=mask, other=0.0).to(tl.float32)
            found = tl.where(own_slot < 0, float("nan"), tl.sum(v * (part_1 - part_2), 0))
            tl.store(dgate + (b * boxes + box).to(tl.int64) * channels + own, found, mask=listed)
        if NEED_X:
            g = tl.load(gate + b.to(tl.int64) * channels + own, mask=listed, other=0.0).to(tl.float32)
            g = tl.where(own_slot < 0, float("nan"), g)[None, :]  # a neuron out of range shows as NaN
            v = tl.where(g == 0.0, 0.0, g * part_1) + tl.where(g == 1.0, 0.0, (1.0 - g) * part_2)
            tl.store(dx + b.to(tl.int64) * stride_b + offsets, v.to(dx.dtype.element_ty), mask=mask)


def data_gradient(
    grad_ndhwc: Tensor,
    x: Tensor,
    gate: Tensor,
    groups: Groups,
    spatial: Tensor,
    temporal: Tensor,
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    b, c, *size = x.shape
    outputs = spatial.shape[1]
    lists = list_channels(gate, groups, False, tile_channels(x.dtype))
    filters = pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
    tile = tuning.choose_tile("data_gradient", launch.chip(x.device)[0], tuning.kind_of(x.dtype), tuple(size), c, b)
    box = best_box(tile.m, *size)
    dx = torch.empty_like(x) if need_x else None
    if dx is not None and dx.stride() != x.stride() and need_gate:  # one set of strides serves both
        x = torch.empty_like(dx).copy_(x)
    like = x if dx is None else dx
    boxes = box.tiles(*size)
    parts = x.new_empty((b, boxes, c) if need_gate else (1,), dtype=torch.float32)
    g, tma_grad = launch.boxed(grad_ndhwc, box, tile.k, tile.tma, left=True)
    f, tma_filters = launch.described(filters, [1, tile.n, tile.k], tile.tma and need_gate)
    data_gradient_kernel[(b * boxes * cdiv(c, tile.n),)](
        g,
        f,
        lists.order,
        lists.plans,
        gate,
        x,
        like,
        parts,
        *size,
        c,
        outputs,
        *like.stride(),
        LISTED=not need_gate,
        NEED_X=need_x,
        NEED_GATE=need_gate,
        TMA_GRAD=tma_grad,
        TMA_FILTERS=tma_filters,
        WIDE=features.needs_int64(like) or grad_ndhwc[0].numel() > features.INT32,
        PRECISION=launch.precision(x.dtype),
        BT=box.t,
        BH=box.h,
        BW=box.w,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dx, parts.sum(1).to(gate.dtype) if need_gate else None
