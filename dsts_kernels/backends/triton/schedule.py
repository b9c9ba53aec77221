"""Who computes what: tiles dealt in whole waves, and the iterations of the rest shared out evenly (stream-K).

Samples differ in how many K blocks their tiles have, since their neurons' lists differ. Each of ``programs``
persistent programs takes one tile of every wave; what the waves leave over is cut into one contiguous range of
iterations a program, the shorter the longer its waves were. Everything is worked out from ``plan`` on the device,
alike in every program, so nothing depends on timing. (Stream-K: Osama et al., PPoPP 2023; the weights are ours.)
:data:`dsts_kernels.backends.gpu.lists.PLAN` says what a plan holds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_counts(plan, b, mask, width, UNIFORM: tl.constexpr, BK: tl.constexpr):
    """K blocks of the first and the second operator for samples ``b``; ``UNIFORM`` has one operator on all columns."""
    if UNIFORM:
        first = tl.where(mask, tl.cdiv(width, BK), 0)
        second = tl.zeros_like(first)
    else:
        first = tl.load(plan + b * 6 + 1, mask=mask, other=0)
        second = tl.load(plan + b * 6 + 2, mask=mask, other=0)
    return first, second


@triton.jit
def shared_work(
    plan,
    batch,
    per_sample,
    dealt,
    width,
    UNIFORM: tl.constexpr,
    TAPS_1: tl.constexpr,
    TAPS_2: tl.constexpr,
    BATCH: tl.constexpr,
    BK: tl.constexpr,
):
    """By sample, ``[BATCH]`` each: iterations a tile, first shared tile, shared iterations and their running sum."""
    samples = tl.arange(0, BATCH)
    counts_1, counts_2 = block_counts(plan, samples, samples < batch, width, UNIFORM, BK)
    lengths = counts_1 * TAPS_1 + counts_2 * TAPS_2
    first = tl.maximum(samples * per_sample, dealt)
    left = tl.where(samples < batch, tl.maximum((samples + 1) * per_sample - first, 0), 0)
    return lengths, first, left * lengths, tl.cumsum(left * lengths, 0)


@triton.jit
def shares(
    plan,
    batch,
    per_sample,
    waves,
    programs,
    width,
    UNIFORM: tl.constexpr,
    TAPS_1: tl.constexpr,
    TAPS_2: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BK: tl.constexpr,
):
    """Where every program's range of shared iterations starts and stops: two ``[PROGRAMS]``.

    Without whole waves no program gets fewer than ``LEAST`` iterations: a short range costs more to add up than it
    saves.
    """
    _, _, work, _ = shared_work(plan, batch, per_sample, waves * programs, width, UNIFORM, TAPS_1, TAPS_2, BATCH, BK)
    shared = tl.sum(work, 0).to(tl.int64)
    q = tl.arange(0, PROGRAMS)
    weight = tl.where(q < programs, 1, 0).to(tl.int64)
    if waves == 0:
        most = tl.minimum(tl.maximum(shared // LEAST, 1), programs)
        weight = tl.where(q < most, 1, 0).to(tl.int64)
    elif not UNIFORM:
        dealt = tl.zeros((PROGRAMS,), tl.int64)
        for wave in range(0, waves):
            own_1, own_2 = block_counts(plan, (q + wave * programs) // per_sample, q < programs, width, UNIFORM, BK)
            dealt += own_1 * TAPS_1 + own_2 * TAPS_2
        mean = (tl.sum(dealt, 0) + shared) // programs + 1
        weight = tl.where(q < programs, tl.maximum(mean - dealt, 0), 0)
    until = tl.cumsum(weight, 0)
    total = tl.sum(weight, 0)
    return (shared * (until - weight) // total).to(tl.int32), (shared * until // total).to(tl.int32)


@triton.jit
def shared_tile(iteration, lengths, first, work, ends, batch, BATCH: tl.constexpr):
    """The tile that a shared iteration belongs to, and the iteration that tile starts with."""
    s = tl.minimum(tl.sum((ends <= iteration).to(tl.int32), 0), batch - 1)
    here = tl.arange(0, BATCH) == s
    length = tl.maximum(tl.sum(tl.where(here, lengths, 0), 0), 1)
    start = tl.sum(tl.where(here, ends - work, 0), 0)
    index = (iteration - start) // length
    return tl.sum(tl.where(here, first, 0), 0) + index, start + index * length
