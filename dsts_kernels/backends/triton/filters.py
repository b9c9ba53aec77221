"""Filters between the layout parameters have, ``(N, O, C, taps)``, and those that kernels read, by slot and tap.

Only neurons that the batch chose are laid out. On the way back, gradients of all others, and of channels that no list
holds, are written as zeros in the same pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.lists import Groups
from . import tuning
from .boxes import cdiv


@triton.jit
def pack_filters_kernel(
    weight,
    filters,
    neuron_of,
    outputs,
    channels,
    first_tap,
    all_taps,
    TAPS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BO: tl.constexpr,
    BF: tl.constexpr,
):
    """``filters (slots, all_taps, C, O)``, or without ``BY_CHANNEL`` ``(slots, all_taps, O, C)``, from tap
    ``first_tap``.

    A tile is ``BO`` outputs by ``BF`` elements of channels and taps as they lie: read along the one, written along the
    other, so both ways are whole lines.
    """
    slot = tl.program_id(1)
    n = tl.load(neuron_of + slot)
    if n >= 0:
        tiles = tl.cdiv(channels * TAPS, BF)
        o = tl.program_id(0) // tiles * BO + tl.arange(0, BO)
        f = tl.program_id(0) % tiles * BF + tl.arange(0, BF)
        mask = (o < outputs)[:, None] & (f < channels * TAPS)[None, :]
        source = weight + n.to(tl.int64) * outputs * channels * TAPS
        v = tl.load(source + (o.to(tl.int64) * channels * TAPS)[:, None] + f[None, :], mask=mask, other=0.0)
        c = f // TAPS
        matrix = (slot * all_taps + first_tap + f % TAPS).to(tl.int64) * outputs * channels
        if BY_CHANNEL:
            place = (matrix + c.to(tl.int64) * outputs)[None, :] + o[:, None]
        else:
            place = (matrix + c)[None, :] + (o.to(tl.int64) * channels)[:, None]
        tl.store(filters + place, v.to(filters.dtype.element_ty), mask=mask)


@triton.jit
def unpack_filters_kernel(
    filters,
    weight,
    slot_of,
    listed,
    outputs,
    channels,
    first_tap,
    all_taps,
    bit,
    TAPS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    BO: tl.constexpr,
    BF: tl.constexpr,
):
    """The way back for gradients, into ``weight (N, O, C, TAPS)``, all of which is written."""
    n = tl.program_id(1)
    slot = tl.load(slot_of + n)
    tiles = tl.cdiv(channels * TAPS, BF)
    o = tl.program_id(0) // tiles * BO + tl.arange(0, BO)
    f = tl.program_id(0) % tiles * BF + tl.arange(0, BF)
    mask = (o < outputs)[:, None] & (f < channels * TAPS)[None, :]
    c = f // TAPS
    read = mask & (slot >= 0)
    if HAS_LISTS:
        known = (c < channels) & (slot >= 0)
        bits = tl.load(listed + slot.to(tl.int64) * channels + c, mask=known, other=0).to(tl.int32)
        read &= ((bits & bit) != 0)[None, :]
    matrix = (slot * all_taps + first_tap + f % TAPS).to(tl.int64) * outputs * channels
    if BY_CHANNEL:
        place = (matrix + c.to(tl.int64) * outputs)[None, :] + o[:, None]
    else:
        place = (matrix + c)[None, :] + (o.to(tl.int64) * channels)[:, None]
    v = tl.load(filters + place, mask=read, other=0.0)
    target = weight + n.to(tl.int64) * outputs * channels * TAPS
    tl.store(target + (o.to(tl.int64) * channels * TAPS)[:, None] + f[None, :], v, mask=mask)


def pack_filters(weights: list[Tensor], neuron_of: Tensor, dtype: torch.dtype, by_channel: bool) -> Tensor:
    """Filters of the chosen neurons, ``(slots * taps, C, O)`` or ``(slots * taps, O, C)``, every kernel's taps."""
    outputs, channels = weights[0].shape[1:3]
    taps = [weight[0, 0, 0].numel() for weight in weights]
    shape = (channels, outputs) if by_channel else (outputs, channels)
    filters = torch.empty((neuron_of.shape[0] * sum(taps), *shape), dtype=dtype, device=neuron_of.device)
    first = 0
    for weight, count in zip(weights, taps, strict=True):
        grid = (cdiv(outputs, tuning.FILTER_TILE) * cdiv(channels * count, tuning.FILTER_TILE), neuron_of.shape[0])
        pack_filters_kernel[grid](
            weight.contiguous(), filters, neuron_of, outputs, channels, first, sum(taps),
            TAPS=count, BY_CHANNEL=by_channel, BO=tuning.FILTER_TILE, BF=tuning.FILTER_TILE,
        )  # fmt: skip
        first += count
    return filters


def unpack_filters(
    filters: Tensor,
    like: Tensor,
    groups: Groups,
    listed: Tensor | None,
    bit: int,
    first: int,
    taps: int,
    by_channel: bool,
) -> Tensor:
    """Gradients ``filters`` of the chosen neurons, as a gradient of ``like (N, O, C, *kernel)``."""
    neurons, outputs, channels = like.shape[:3]
    weight = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    own = like[0, 0, 0].numel()
    grid = (cdiv(outputs, tuning.FILTER_TILE) * cdiv(channels * own, tuning.FILTER_TILE), neurons)
    unpack_filters_kernel[grid](
        filters, weight, groups.slot_of, filters if listed is None else listed, outputs, channels, first, taps, bit,
        TAPS=own, BY_CHANNEL=by_channel, HAS_LISTS=listed is not None, BO=tuning.FILTER_TILE, BF=tuning.FILTER_TILE,
    )  # fmt: skip
    return weight
