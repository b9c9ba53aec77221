"""Filters between the layout parameters have, ``(N, O, C, taps)``, and those that kernels read, by slot and tap.

Only neurons that the batch chose are laid out. On the way back, gradients of all others, and of channels that no list
holds, are written as zeros in the same pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    BC: tl.constexpr,
):
    """``filters (slots, all_taps, C, O)``, or without ``BY_CHANNEL`` ``(slots, all_taps, O, C)``, from tap ``first_tap``."""
    slot = tl.program_id(1)
    n = tl.load(neuron_of + slot)
    if n >= 0:
        tiles = tl.cdiv(channels, BC)
        o = tl.program_id(0) // tiles * BO + tl.arange(0, BO)
        c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
        mask = (o < outputs)[:, None] & (c < channels)[None, :]
        source = weight + n.to(tl.int64) * outputs * channels * TAPS
        for tap in tl.static_range(TAPS):
            v = tl.load(source + (o[:, None] * channels + c[None, :]).to(tl.int64) * TAPS + tap, mask=mask, other=0.0)
            out = filters + (slot * all_taps + first_tap + tap).to(tl.int64) * outputs * channels
            if BY_CHANNEL:
                place = c[None, :].to(tl.int64) * outputs + o[:, None]
            else:
                place = o[:, None].to(tl.int64) * channels + c[None, :]
            tl.store(out + place, v.to(filters.dtype.element_ty), mask=mask)


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
    BC: tl.constexpr,
):
    """The way back for gradients, into ``weight (N, O, C, TAPS)``, all of which is written."""
    n = tl.program_id(1)
    slot = tl.load(slot_of + n)
    tiles = tl.cdiv(channels, BC)
    o = tl.program_id(0) // tiles * BO + tl.arange(0, BO)
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    mask = (o < outputs)[:, None] & (c < channels)[None, :]
    read = mask & (slot >= 0)
    if HAS_LISTS:
        bits = tl.load(listed + slot.to(tl.int64) * channels + c, mask=(c < channels) & (slot >= 0), other=0)
        read &= ((bits.to(tl.int32) & bit) != 0)[None, :]
    target = weight + n.to(tl.int64) * outputs * channels * TAPS
    for tap in tl.static_range(TAPS):
        source = filters + (slot * all_taps + first_tap + tap).to(tl.int64) * outputs * channels
        if BY_CHANNEL:
            place = c[None, :].to(tl.int64) * outputs + o[:, None]
        else:
            place = o[:, None].to(tl.int64) * channels + c[None, :]
        v = tl.load(source + place, mask=read, other=0.0)
        tl.store(target + (o[:, None] * channels + c[None, :]).to(tl.int64) * TAPS + tap, v, mask=mask)
