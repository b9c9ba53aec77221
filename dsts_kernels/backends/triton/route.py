"""Routing on the device: who chose which neuron, which channels its gates list, and features gathered by those lists.

A *list row* is one order of the channels, ``order[row]``: those that only the first operator reads, those that both read,
those that only the second reads. The first operator's list is a prefix of it, the second one's a suffix. A *plan*
(:data:`.schedule.PLAN`) says how long they are. A *slot* numbers the neurons that a batch chose, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import position_offsets


@triton.jit
def choose_neuron(
    sums, scoring, b, parts, size, neurons, divisor, scores, NEURONS: tl.constexpr, BC: tl.constexpr, STORE: tl.constexpr
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

    Axis 0 of the grid is blocks of positions, axis 1 shares the K blocks out. ``SCALED`` multiplies by the gate, or by 1
    minus it for the second operator. A sample whose neuron is not ``known`` becomes NaN.
    """
    p = tl.program_id(0) * BP + tl.arange(0, BP)
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
def route_and_pack_kernel(
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
    b = tl.program_id(2)
    one = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
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
        for i in range(b * 256, flag_count, tl.num_programs(2) * 256):
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
    rows,
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
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Training's gather: gated features by list row ``rows[6*b]``, whose plan is ``plans[row]``."""
    b = tl.program_id(2)
    row = tl.load(rows + b * 6)
    plan = plans + row * 6
    chosen = tl.load(neuron + b)
    known = (chosen >= 0) & (chosen < neurons)
    gather_columns(
        x, order, gate, panel, b, row, tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3), tl.load(plan + 4), known,
        size, positions, h_size, w_size, stride_b, stride_c, stride_t, stride_h, stride_w, pitch, True, FLAT, WIDE, BP, BK,
    )  # fmt: skip


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

    ``slots (B,)`` the slot of each sample's neuron, ``neuron_of (S,)`` and ``slot_of (N,)`` either way, -1 where there is
    none; ``members (B,)`` the samples sorted by neuron, a slot's being ``groups[s]``: first, how many.
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
    tl.store(slots + b, slot)
    tl.store(members + before + rank, b)
    if (mine >= 0) & (mine < neurons):
        tl.store(groups + slot * 2, before)
        tl.store(groups + slot * 2 + 1, same)
    if b == 0:
        count = tl.sum(used, 0)
        tl.store(neuron_of + slot_all, n, mask=used > 0)
        tl.store(neuron_of + n, -1, mask=(n >= count) & (n < slot_count))
        tl.store(slot_of + n, tl.where(used > 0, slot_all, -1), mask=n < neurons)


@triton.jit
def read_by(gate, groups, members, row, c, size, UNION: tl.constexpr):
    """Whether only the first, and whether only the second operator reads channels ``c``: by one sample or by a slot's."""
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

    With ``UNION`` also ``listed (S, C)`` int8: 1 where the first operator reads a channel, plus 2 where the second does. The
    plan of a slot without a neuron is empty: a sample whose neuron is out of range may still read it.
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
