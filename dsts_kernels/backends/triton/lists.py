"""Who chose which neuron, and which channels each gate lists: integers only, worked out on the device.

:mod:`dsts_kernels.backends.gpu.lists` says what a list, a plan and a slot are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.grids import next_power
from ..gpu.lists import PLAN as PLAN_INTS
from ..gpu.lists import READ_BY_SPATIAL, READ_BY_TEMPORAL, Groups, Lists
from . import launch, tuning
from .common import PLAN, plan_at

BY_SPATIAL, BY_TEMPORAL = tl.constexpr(READ_BY_SPATIAL), tl.constexpr(READ_BY_TEMPORAL)


@triton.jit(do_not_specialize=["batch", "slot_count"])
def group_samples_kernel(
    neuron,  # [B] int64
    slots,  # [B] int32: the slot of each sample's neuron, -1 where that is out of range
    neuron_of,  # [S] int32, -1 where no neuron has the slot
    slot_of,  # [N] int32, -1 where nobody chose the neuron
    groups,  # [S, 2] int32: first member of a slot, how many
    members,  # [B] int32: samples sorted by neuron
    batch,
    neurons,
    slot_count,
    NEURONS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Samples by neuron: a program a sample, which looks at ``SAMPLES`` others at a time."""
    b = tl.program_id(0)
    chosen = tl.load(neuron + b)
    n = tl.arange(0, NEURONS)
    used = tl.zeros((NEURONS,), tl.int32)
    before = 0
    same = 0
    rank = 0
    for b0 in range(0, batch, SAMPLES):
        other = b0 + tl.arange(0, SAMPLES)
        theirs = tl.load(neuron + other, mask=other < batch, other=-1)
        used = tl.maximum(used, tl.max((theirs[:, None] == n[None, :]).to(tl.int32), 0))
        before += tl.sum(((theirs < chosen) & (other < batch)).to(tl.int32), 0)
        same += tl.sum(((theirs == chosen) & (other < batch)).to(tl.int32), 0)
        rank += tl.sum(((theirs == chosen) & (other < b)).to(tl.int32), 0)
    used = tl.where(n < neurons, used, 0)
    slot_all = tl.cumsum(used, 0) - used
    slot = tl.sum(tl.where(n == chosen, slot_all, 0), 0)
    known = (chosen >= 0) & (chosen < neurons)
    tl.store(slots + b, tl.where(known, slot, -1))
    tl.store(members + before + rank, b)
    if known:
        tl.store(groups + slot * 2, before)
        tl.store(groups + slot * 2 + 1, same)
    if b == 0:
        count = tl.sum(used, 0)
        tl.store(neuron_of + slot_all, n, mask=used > 0)
        tl.store(neuron_of + n, -1, mask=(n >= count) & (n < slot_count))
        tl.store(slot_of + n, tl.where(used > 0, slot_all, -1), mask=n < neurons)


@triton.jit
def readers_of(
    gate,  # [B, C]
    groups,  # [S, 2]
    members,  # [B]
    row,
    c,
    channels,
    UNION: tl.constexpr,
):
    """Which of channels ``c`` only the spatial operator reads, only the temporal one, both: of a sample or a slot."""
    inside = c < channels
    if UNION:
        only_spatial = inside
        only_temporal = inside
        start = tl.load(groups + row * 2)
        for i in range(0, tl.load(groups + row * 2 + 1)):
            b = tl.load(members + start + i).to(tl.int64)
            g = tl.load(gate + b * channels + c, mask=inside, other=0.0).to(tl.float32)
            only_spatial &= g == 1.0
            only_temporal &= g == 0.0
    else:
        g = tl.load(gate + row.to(tl.int64) * channels + c, mask=inside, other=0.0).to(tl.float32)
        only_spatial = inside & (g == 1.0)
        only_temporal = inside & (g == 0.0)
    return only_spatial, only_temporal, inside & ~only_spatial & ~only_temporal


@triton.jit
def list_channels_kernel(
    gate,  # [B, C]
    slots,  # [B] int32
    neuron_of,  # [S] int32
    groups,  # [S, 2] int32
    members,  # [B] int32
    order,  # [rows, C] int32
    plans,  # [rows, PLAN] int32
    listed,  # [S, C] int8, or None: a row is a sample; else it is a slot and all its samples
    channels,
    BK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gates to lists: a program each, ``CHANNELS`` at a time.

    ``listed`` says who reads a channel. The plan of a slot without a neuron is empty: a sample whose neuron is out of
    range may still read it.
    """
    UNION: tl.constexpr = listed is not None
    row = tl.program_id(0)
    filters = row
    exists = True
    if UNION:
        exists = tl.load(neuron_of + row) >= 0
    else:
        filters = tl.load(slots + row)
    if exists:
        spatial_count = 0
        both_count = 0
        for c0 in range(0, channels, CHANNELS):
            c = c0 + tl.arange(0, CHANNELS)
            only_spatial, only_temporal, both = readers_of(gate, groups, members, row, c, channels, UNION)
            spatial_count += tl.sum(only_spatial.to(tl.int32), 0)
            both_count += tl.sum(both.to(tl.int32), 0)
        spatial_at = 0
        both_at = spatial_count
        temporal_at = spatial_count + both_count
        tl.store(plan_at(plans, row, "filters"), filters)
        tl.store(plan_at(plans, row, "spatial_blocks"), tl.cdiv(temporal_at, BK))
        tl.store(plan_at(plans, row, "temporal_blocks"), tl.cdiv(channels - spatial_count, BK))
        tl.store(plan_at(plans, row, "spatial_channels"), temporal_at)
        tl.store(plan_at(plans, row, "temporal_start"), spatial_count)
        tl.store(plan_at(plans, row, "row"), row)
        list_row = order + row.to(tl.int64) * channels
        for c0 in range(0, channels, CHANNELS):
            c = c0 + tl.arange(0, CHANNELS)
            only_spatial, only_temporal, both = readers_of(gate, groups, members, row, c, channels, UNION)
            spatial_rank = tl.cumsum(only_spatial.to(tl.int32), 0)
            both_rank = tl.cumsum(both.to(tl.int32), 0)
            temporal_rank = tl.cumsum(only_temporal.to(tl.int32), 0)
            place = tl.where(both, both_at + both_rank, temporal_at + temporal_rank)
            place = tl.where(only_spatial, spatial_at + spatial_rank, place) - 1
            tl.store(list_row + place, c, mask=c < channels)
            if UNION:
                readers = tl.where(only_spatial, BY_SPATIAL, BY_SPATIAL + BY_TEMPORAL)
                readers = tl.where(only_temporal, BY_TEMPORAL, readers)
                tl.store(listed + row.to(tl.int64) * channels + c, readers.to(tl.int8), mask=c < channels)
            spatial_at += tl.sum(only_spatial.to(tl.int32), 0)
            both_at += tl.sum(both.to(tl.int32), 0)
            temporal_at += tl.sum(only_temporal.to(tl.int32), 0)
    else:
        for i in tl.static_range(PLAN):
            tl.store(plans + row * PLAN + i, 0)


@launch.remembered
def groups_launch(batch: int, neurons: int, slots: int) -> launch.Launch:
    lanes = next_power(neurons)
    samples = tuning.samples_at_once(batch, lanes)
    return launch.Launch((batch,), (batch, neurons, slots), NEURONS=lanes, SAMPLES=samples)


@launch.remembered
def lists_launch(rows: int, channels: int, block_k: int) -> launch.Launch:
    width = min(tuning.LIST_CHANNELS, next_power(channels))
    return launch.Launch((rows,), (channels,), BK=block_k, CHANNELS=width)


def group_samples(neuron: Tensor, neurons: int) -> Groups:
    """Samples by ``neuron (B,)``."""
    batch = neuron.shape[0]
    count = min(batch, neurons)
    slots, neuron_of, slot_of, found, members = torch.empty(
        2 * batch + neurons + 3 * count, dtype=torch.int32, device=neuron.device
    ).split((batch, count, neurons, 2 * count, batch))
    groups = Groups(slots, neuron_of, slot_of, found.view(count, 2), members)
    launch.start(group_samples_kernel, groups_launch(batch, neurons, count), (neuron, *groups))
    return groups


def list_channels(gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
    """Lists of every sample of ``gate (B, C)``, or with ``union`` of every slot: what any of its samples reads."""
    channels = gate.shape[1]
    count = groups.neuron_of.shape[0] if union else gate.shape[0]
    order = torch.empty((count, channels), dtype=torch.int32, device=gate.device)
    plans = torch.empty((count, PLAN_INTS), dtype=torch.int32, device=gate.device)
    listed = torch.empty((count, channels), dtype=torch.int8, device=gate.device) if union else None
    tensors = gate, groups.slots, groups.neuron_of, groups.groups, groups.members, order, plans, listed
    launch.start(list_channels_kernel, lists_launch(count, channels, block_k), tensors)
    return Lists(order, plans, listed)
