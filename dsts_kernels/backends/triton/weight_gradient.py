"""Filter gradients, grouped by neuron: one tile of one tap of one slot a program, over all the slot's samples in order.

The reduction runs over positions, a box at a time. Rows of the result come from ``left``, shifted by the tap, columns
from ``right``. For the gated convolution ``left`` is its panel, gathered by the lists of the slot, so that only listed
channels are computed, and ``right`` the gradient; for a mixing kernel (``UNIFORM``) ``left`` is the gradient, shifted
the other way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features
from ..gpu.lists import Groups, Lists
from ..packing import tile_channels
from . import launch, tuning
from .boxes import best_box, cdiv
from .common import box_start, load_box, tap_shift


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    order,
    plans,
    neuron_of,
    groups,
    members,
    out,
    t_size,
    h_size,
    w_size,
    left_width,
    right_width,
    rows,
    KT_1: tl.constexpr,
    KH_1: tl.constexpr,
    KW_1: tl.constexpr,
    TAPS_2: tl.constexpr,
    SIGN: tl.constexpr,
    UNIFORM: tl.constexpr,
    BY_NEURON: tl.constexpr,
    TMA_LEFT: tl.constexpr,
    TMA_RIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``out (slots, taps, rows, right_width)``, or with ``BY_NEURON`` ``(N, ...)``; listed rows of it are written."""
    TAPS_1: tl.constexpr = KT_1 * KH_1 * KW_1
    slot = tl.program_id(2)
    tap = tl.program_id(1)
    n = tl.load(neuron_of + slot)
    columns = tl.cdiv(right_width, BN)
    j = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    o0 = tl.program_id(0) % columns * BN
    column = tl.program_id(0) // columns * BM
    dt, dh, dw = tap_shift(tap, KT_1, KH_1, KW_1, SIGN)
    count = rows
    list_start = 0
    if not UNIFORM:
        plan = plans + slot * 6
        in_first = tap < TAPS_1
        dt = tl.where(in_first, dt, SIGN * (tap - TAPS_1 - 1))
        dh = tl.where(in_first, dh, 0)
        dw = tl.where(in_first, dw, 0)
        if n >= 0:
            list_start = tl.where(in_first, 0, tl.load(plan + 4))
            count = tl.where(in_first, tl.load(plan + 3), rows - list_start)
            column += tl.where(in_first, 0, tl.load(plan + 1) * BK)
    if (n >= 0) & (tl.program_id(0) // columns * BM < count):
        acc = tl.zeros((BM, BN), tl.float32)
        boxes = tl.cdiv(t_size, BT) * tl.cdiv(h_size, BH) * tl.cdiv(w_size, BW)
        start = tl.load(groups + slot * 2)
        for i in range(0, tl.load(groups + slot * 2 + 1)):
            b = tl.load(members + start + i)
            for box in range(0, boxes):
                t0, h0, w0 = box_start(box, t_size, h_size, w_size, BT, BH, BW)
                p = load_box(
                    left, b, t0 + dt, h0 + dh, w0 + dw, column, t_size, h_size, w_size, left_width,
                    TMA_LEFT, WIDE, BT, BH, BW, BM,
                )  # fmt: skip
                q = load_box(
                    right, b, t0, h0, w0, o0, t_size, h_size, w_size, right_width, TMA_RIGHT, WIDE, BT, BH, BW, BN
                )
                acc = tl.dot(p.T, q, acc, input_precision=PRECISION)
        o = o0 + tl.arange(0, BN)
        mask = (j < count)[:, None] & (o < right_width)[None, :]
        r = j
        if not UNIFORM:
            r = tl.load(order + slot.to(tl.int64) * rows + list_start + j, mask=j < count, other=0)
        index = n if BY_NEURON else slot
        target = out + (index * (TAPS_1 + TAPS_2) + tap).to(tl.int64) * rows * right_width
        cells = r.to(tl.int64)[:, None] * right_width + o[None, :]
        tl.store(target + cells, acc.to(out.dtype.element_ty), mask=mask)


def weight_gradient(
    left: Tensor,
    right: Tensor,
    lists: Lists | None,
    groups: Groups,
    rows: int,
    kernel: tuple[int, int, int],
    second: bool,
    sign: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`.weight_gradient.weight_gradient_kernel` by slot, or into ``out`` by neuron."""
    size = tuple(left.shape[1:4])
    width = right.shape[-1]
    architecture = launch.chip(left.device)[0]
    tile = tuning.choose_tile("weight_gradient", architecture, tuning.kind_of(left.dtype), size, width, left.shape[0])
    box = best_box(tile.k, *size)
    by_neuron = out is not None
    out = torch.empty(shape, dtype=dtype, device=left.device) if out is None else out
    taps = kernel[0] * kernel[1] * kernel[2] + (3 if second else 0)
    lefts, tma_left = launch.boxed(left, box, tile.m, tile.tma, left=True)
    rights, tma_right = launch.boxed(right, box, tile.n, tile.tma, left=False)
    weight_gradient_kernel[cdiv(rows, tile.m) * cdiv(width, tile.n), taps, groups.neuron_of.shape[0]](
        lefts,
        rights,
        groups.members if lists is None else lists.order,
        groups.members if lists is None else lists.plans,
        groups.neuron_of,
        groups.groups,
        groups.members,
        out,
        *size,
        left.shape[-1],
        width,
        rows,
        KT_1=kernel[0],
        KH_1=kernel[1],
        KW_1=kernel[2],
        TAPS_2=3 if second else 0,
        SIGN=sign,
        UNIFORM=lists is None,
        BY_NEURON=by_neuron,
        TMA_LEFT=tma_left,
        TMA_RIGHT=tma_right,
        WIDE=left[0].numel() > features.INT32 or right[0].numel() > features.INT32,
        PRECISION=launch.precision(left.dtype),
        BT=box.t,
        BH=box.h,
        BW=box.w,
        BM=tile.m,
        BN=tile.n,
        BK=tile_channels(left.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
