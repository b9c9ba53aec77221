"""Filters between the layout parameters have, ``(N, O, C, taps)``, and those that kernels read, by slot and tap.

Only neurons that the batch chose are laid out, and where gates are given only channels that one of their samples
reads: half of all where gates are hard. On the way back, gradients of all others, and of channels that no list
holds, are written as zeros in the same pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.lists import READ_BY_SPATIAL, READ_BY_TEMPORAL, Groups
from . import launch, tuning
from .lists import BY_SPATIAL, BY_TEMPORAL, readers_of


@triton.jit
def tap_offsets(slot, o, f, outputs, channels, first_tap, all_taps, TAPS: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """``[BO, BF]``: where outputs ``o`` of elements ``f`` (channels times taps) lie by slot and tap."""
    c = f // TAPS
    matrix = (slot * all_taps + first_tap + f % TAPS).to(tl.int64) * outputs * channels
    if BY_CHANNEL:
        offsets = (matrix + c.to(tl.int64) * outputs)[None, :] + o[:, None]
    else:
        offsets = (matrix + c)[None, :] + (o.to(tl.int64) * channels)[:, None]
    return offsets


@triton.jit
def pack_filters_kernel(
    weight,  # [N, O, C, TAPS]
    filters,  # [S, all_taps, C, O], or without BY_CHANNEL [S, all_taps, O, C]; written from tap first_tap on
    neuron_of,  # [S] int32
    gate,  # [B, C], or None: every channel is laid out; else those that a sample of the slot reads
    groups,  # [S, 2] int32
    members,  # [B] int32
    outputs,
    channels,
    first_tap,
    all_taps,
    reader,
    TAPS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BO: tl.constexpr,
    BF: tl.constexpr,
):
    """A tile is ``BO`` outputs by ``BF`` elements of channels and taps as they lie: read along the one, written along
    the other, so both ways are whole lines. ``reader`` is the bit of the operator, whose readers count."""
    slot = tl.program_id(1)
    n = tl.load(neuron_of + slot)
    if n >= 0:
        tiles = tl.cdiv(channels * TAPS, BF)
        o = tl.program_id(0) // tiles * BO + tl.arange(0, BO)
        f = tl.program_id(0) % tiles * BF + tl.arange(0, BF)
        mask = (o < outputs)[:, None] & (f < channels * TAPS)[None, :]
        if gate is not None:
            only_spatial, only_temporal, both = readers_of(gate, groups, members, slot, f // TAPS, channels, True)
            mask &= (both | ((reader == BY_SPATIAL) & only_spatial) | ((reader == BY_TEMPORAL) & only_temporal))[
                None, :
            ]
        source = weight + n.to(tl.int64) * outputs * channels * TAPS
        v = tl.load(source + (o.to(tl.int64) * channels * TAPS)[:, None] + f[None, :], mask=mask, other=0.0)
        offsets = tap_offsets(slot, o, f, outputs, channels, first_tap, all_taps, TAPS, BY_CHANNEL)
        tl.store(filters + offsets, v.to(filters.dtype.element_ty), mask=mask)


@triton.jit
def unpack_filters_kernel(
    filters,  # [S, all_taps, C, O], or without BY_CHANNEL [S, all_taps, O, C]; read from tap first_tap on
    weight,  # [N, O, C, TAPS]
    slot_of,  # [N] int32
    listed,  # [S, C] int8, or None: every channel is
    outputs,
    channels,
    first_tap,
    all_taps,
    reader,
    TAPS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BO: tl.constexpr,
    BF: tl.constexpr,
):
    """The way back for gradients. ``reader`` is the bit of the operator in ``listed``; all of ``weight`` is written."""
    n = tl.program_id(1)
    slot = tl.load(slot_of + n)
    tiles = tl.cdiv(channels * TAPS, BF)
    o = tl.program_id(0) // tiles * BO + tl.arange(0, BO)
    f = tl.program_id(0) % tiles * BF + tl.arange(0, BF)
    mask = (o < outputs)[:, None] & (f < channels * TAPS)[None, :]
    read = mask & (slot >= 0)
    if listed is not None:
        c = f // TAPS
        known = (c < channels) & (slot >= 0)
        readers = tl.load(listed + slot.to(tl.int64) * channels + c, mask=known, other=0).to(tl.int32)
        read &= ((readers & reader) != 0)[None, :]
    offsets = tap_offsets(slot, o, f, outputs, channels, first_tap, all_taps, TAPS, BY_CHANNEL)
    v = tl.load(filters + offsets, mask=read, other=0.0)
    target = weight + n.to(tl.int64) * outputs * channels * TAPS
    tl.store(target + (o.to(tl.int64) * channels * TAPS)[:, None] + f[None, :], v, mask=mask)


@launch.remembered
def filters_launch(
    outputs: int, channels: int, taps: int, matrices: int, numbers: tuple[int, ...], by_channel: bool
) -> launch.Launch:
    """Of ``matrices`` neurons' filters of one kernel; ``numbers`` are where its taps begin, of how many, and others."""
    return launch.Launch(
        (tuning.filter_tiles(outputs, channels, taps), matrices), (outputs, channels, *numbers),
        TAPS=taps, BY_CHANNEL=by_channel, BO=tuning.FILTER_TILE, BF=tuning.FILTER_TILE,
    )  # fmt: skip


def pack_filters(
    weights: list[Tensor],  # (N, O, C, *kernel) each
    neuron_of: Tensor,  # (S,) int32
    dtype: torch.dtype,
    by_channel: bool,
    read: tuple[Tensor, Groups] | None = None,
) -> Tensor:
    """Filters of the chosen neurons, ``(S * taps, C, O)`` or ``(S * taps, O, C)``, every kernel's taps.

    With ``read``, gates ``(B, C)`` of samples by groups, those of a spatial and a temporal operator, of channels that
    a sample of the neuron reads by it; others are not written.
    """
    outputs, channels = weights[0].shape[1:3]
    taps = [weight.shape[3:].numel() for weight in weights]
    slots, shape = neuron_of.shape[0], (channels, outputs) if by_channel else (outputs, channels)
    filters = torch.empty((slots * sum(taps), *shape), dtype=dtype, device=neuron_of.device)
    gate, groups, members = (None,) * 3 if read is None else (read[0], read[1].groups, read[1].members)
    first_tap = 0
    for weight, count, reader in zip(weights, taps, (READ_BY_SPATIAL, READ_BY_TEMPORAL), strict=False):
        one = filters_launch(outputs, channels, count, slots, (first_tap, sum(taps), reader), by_channel)
        launch.start(pack_filters_kernel, one, (weight.contiguous(), filters, neuron_of, gate, groups, members))
        first_tap += count
    return filters


def unpack_filters(
    filters: Tensor,  # (S * taps, C, O) or (S * taps, O, C)
    like: Tensor,  # (N, O, C, *kernel)
    groups: Groups,
    listed: Tensor | None,  # (S, C) int8
    reader: int,
    first_tap: int,
    all_taps: int,
    by_channel: bool,
) -> Tensor:
    """Gradients ``filters`` of the chosen neurons, as a gradient of ``like``."""
    neurons, outputs, channels = like.shape[:3]
    weight = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    count = like.shape[3:].numel()
    one = filters_launch(outputs, channels, count, neurons, (first_tap, all_taps, reader), by_channel)
    launch.start(unpack_filters_kernel, one, (filters, weight, groups.slot_of, listed))
    return weight
