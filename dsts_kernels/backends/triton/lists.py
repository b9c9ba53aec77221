"""Who chose which neuron, and which channels each gate lists: integers only, worked out on the device.

:mod:`dsts_kernels.backends.gpu.lists` says what a list row, a plan and a slot are.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.lists import PLAN, Groups, Lists
from .boxes import next_power


@triton.jit(do_not_specialize=["batch", "slot_count"])
def group_kernel(
    neuron,
    slots,
    neuron_of,
    slot_of,
    groups,
    members,
    batch,
    neurons,
    slot_count,
    NEURONS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Samples by neuron: a program a sample.

    ``slots (B,)`` the slot of each sample's neuron, -1 where that is out of range; ``neuron_of (S,)`` and ``slot_of
    (N,)`` either way, -1 where there is none; ``members (B,)`` the samples sorted by neuron, a slot's being
    ``groups[s]``: first, how many.
    """
    b = tl.program_id(0)
    mine = tl.load(neuron + b)
    n = tl.arange(0, NEURONS)
    used = tl.zeros((NEURONS,), tl.int32)
    before = 0
    same = 0
    rank = 0
    for b0 in range(0, batch, CHUNK):
        other = b0 + tl.arange(0, CHUNK)
        theirs = tl.load(neuron + other, mask=other < batch, other=-1)
        used = tl.maximum(used, tl.max((theirs[:, None] == n[None, :]).to(tl.int32), 0))
        before += tl.sum(((theirs < mine) & (other < batch)).to(tl.int32), 0)
        same += tl.sum(((theirs == mine) & (other < batch)).to(tl.int32), 0)
        rank += tl.sum(((theirs == mine) & (other < b)).to(tl.int32), 0)
    used = tl.where(n < neurons, used, 0)
    slot_all = tl.cumsum(used, 0) - used
    slot = tl.sum(tl.where(n == mine, slot_all, 0), 0)
    known = (mine >= 0) & (mine < neurons)
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
def read_by(gate, groups, members, row, c, size, UNION: tl.constexpr):
    """Which of channels ``c`` only the first operator reads, only the second, or both: for a sample or a whole slot."""
    inside = c < size
    if UNION:
        only_1 = inside
        only_2 = inside
        start = tl.load(groups + row * 2)
        for i in range(0, tl.load(groups + row * 2 + 1)):
            b = tl.load(members + start + i).to(tl.int64)
            g = tl.load(gate + b * size + c, mask=inside, other=0.0).to(tl.float32)
            only_1 &= g == 1.0
            only_2 &= g == 0.0
    else:
        g = tl.load(gate + row.to(tl.int64) * size + c, mask=inside, other=0.0).to(tl.float32)
        only_1 = inside & (g == 1.0)
        only_2 = inside & (g == 0.0)
    return only_1, only_2, inside & ~only_1 & ~only_2


@triton.jit
def list_kernel(
    gate,
    slots,
    neuron_of,
    groups,
    members,
    order,
    plans,
    listed,
    size,
    UNION: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gates to list rows: a program a row, which is a sample, or with ``UNION`` a slot and all its samples.

    With ``UNION`` also ``listed (S, C)`` int8: 1 where the first operator reads a channel, plus 2 where the second
    does. The plan of a slot without a neuron is empty: a sample whose neuron is out of range may still read it.
    """
    row = tl.program_id(0)
    base = row
    exists = True
    if UNION:
        exists = tl.load(neuron_of + row) >= 0
    else:
        base = tl.load(slots + row)
    if exists:
        count_1 = 0
        count_both = 0
        for c0 in range(0, size, CHUNK):
            only_1, only_2, both = read_by(gate, groups, members, row, c0 + tl.arange(0, CHUNK), size, UNION)
            count_1 += tl.sum(only_1.to(tl.int32), 0)
            count_both += tl.sum(both.to(tl.int32), 0)
        at_1 = 0
        at_both = count_1
        at_2 = count_1 + count_both
        plan = plans + row * 6
        tl.store(plan, base)
        tl.store(plan + 1, tl.cdiv(at_2, BK))
        tl.store(plan + 2, tl.cdiv(size - count_1, BK))
        tl.store(plan + 3, at_2)
        tl.store(plan + 4, count_1)
        tl.store(plan + 5, row)
        mine = order + row.to(tl.int64) * size
        for c0 in range(0, size, CHUNK):
            c = c0 + tl.arange(0, CHUNK)
            only_1, only_2, both = read_by(gate, groups, members, row, c, size, UNION)
            rank_1 = tl.cumsum(only_1.to(tl.int32), 0)
            rank_both = tl.cumsum(both.to(tl.int32), 0)
            rank_2 = tl.cumsum(only_2.to(tl.int32), 0)
            place = tl.where(only_1, at_1 + rank_1, tl.where(both, at_both + rank_both, at_2 + rank_2)) - 1
            tl.store(mine + place, c, mask=c < size)
            if UNION:
                bits = tl.where(only_2, 2, tl.where(only_1, 1, 3))
                tl.store(listed + row.to(tl.int64) * size + c, bits.to(tl.int8), mask=c < size)
            at_1 += tl.sum(only_1.to(tl.int32), 0)
            at_both += tl.sum(both.to(tl.int32), 0)
            at_2 += tl.sum(only_2.to(tl.int32), 0)
    else:
        for i in tl.static_range(6):
            tl.store(plans + row * 6 + i, 0)


def group_samples(neuron: Tensor, neurons: int) -> Groups:
    batch = neuron.shape[0]
    count = min(batch, neurons)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=neuron.device)
    groups = Groups(empty(batch), empty(count), empty(neurons), empty(count, 2), empty(batch))
    lanes = next_power(neurons)
    group_kernel[(batch,)](
        neuron, *groups, batch, neurons, count, NEURONS=lanes, CHUNK=max(1, min(next_power(batch), 4096 // lanes))
    )
    return groups


def list_channels(gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
    """Lists of every sample, or with ``union`` of every slot: what any of its samples reads."""
    size = gate.shape[1]
    count = groups.neuron_of.shape[0] if union else gate.shape[0]
    order = torch.empty((count, size), dtype=torch.int32, device=gate.device)
    plans = torch.empty((count, PLAN), dtype=torch.int32, device=gate.device)
    listed = torch.empty((count, size) if union else (1,), dtype=torch.int8, device=gate.device)
    list_kernel[(count,)](
        gate,
        groups.slots,
        groups.neuron_of,
        groups.groups,
        groups.members,
        order,
        plans,
        listed,
        size,
        UNION=union,
        BK=block_k,
        CHUNK=min(1024, next_power(size)),
    )
    return Lists(order, plans, listed)
