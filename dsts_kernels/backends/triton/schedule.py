"""Who computes what: tiles dealt in whole waves, and the iterations of the rest cut into even ranges (stream-K).

Where whole waves alone keep programs busy nearly as long, nothing is shared (:func:`dealt_waves`). Samples differ
in how many K blocks their tiles have, since their neurons' lists differ. Each persistent program takes one tile of
every whole wave; what the waves leave over is cut into one contiguous range of iterations a program, the shorter the
longer its waves were. :func:`dsts_kernels.backends.gpu.grids.dealt_waves` and
:func:`~dsts_kernels.backends.gpu.grids.iteration_ranges` say which; here the same is worked out from the plan on the
device, alike in every program, so nothing depends on timing. (Stream-K: Osama et al., PPoPP 2023; the weights are
ours.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu import grids
from .common import plan_at

ALWAYS_SHARE = tl.constexpr(grids.ALWAYS_SHARE)


@triton.jit
def block_counts(
    plan,  # [B, PLAN]
    b,
    mask,
    width,
    UNIFORM: tl.constexpr,
    BK: tl.constexpr,
):
    """K blocks of the spatial and the temporal operator for samples ``b``; ``UNIFORM`` has one on all columns."""
    if UNIFORM:
        spatial = tl.where(mask, tl.cdiv(width, BK), 0)
        temporal = tl.zeros_like(spatial)
    else:
        spatial = tl.load(plan_at(plan, b, "spatial_blocks"), mask=mask, other=0)
        temporal = tl.load(plan_at(plan, b, "temporal_blocks"), mask=mask, other=0)
    return spatial, temporal


@triton.jit
def shared_iterations(
    plan,  # [B, PLAN]
    batch,
    per_sample,
    whole_tiles,
    width,
    UNIFORM: tl.constexpr,
    SPATIAL_TAPS: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    BATCH: tl.constexpr,
    BK: tl.constexpr,
):
    """Of tiles behind the first ``whole_tiles``, by sample, ``[BATCH]`` each.

    Iterations of a tile, the first of these tiles, their iterations in all, and those of all samples up to this one.
    """
    samples = tl.arange(0, BATCH)
    spatial, temporal = block_counts(plan, samples, samples < batch, width, UNIFORM, BK)
    lengths = spatial * SPATIAL_TAPS + temporal * TEMPORAL_TAPS
    first = tl.maximum(samples * per_sample, whole_tiles)
    tiles = tl.where(samples < batch, tl.maximum((samples + 1) * per_sample - first, 0), 0)
    return lengths, first, tiles * lengths, tl.cumsum(tiles * lengths, 0)


@triton.jit
def wave_iterations(
    plan,  # [B, PLAN]
    tiles,
    per_sample,
    waves,
    programs,
    width,
    UNIFORM: tl.constexpr,
    SPATIAL_TAPS: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BK: tl.constexpr,
):
    """Iterations of every program's tiles of so many waves: ``[PROGRAMS]`` int64."""
    q = tl.arange(0, PROGRAMS)
    whole = tl.zeros((PROGRAMS,), tl.int64)
    for wave in range(0, waves):
        tile = q + wave * programs
        exists = (q < programs) & (tile < tiles)
        spatial, temporal = block_counts(plan, tile // per_sample, exists, width, UNIFORM, BK)
        whole += spatial * SPATIAL_TAPS + temporal * TEMPORAL_TAPS
    return whole


@triton.jit
def dealt_waves(
    plan,  # [B, PLAN]
    batch,
    per_sample,
    waves,
    programs,
    width,
    UNIFORM: tl.constexpr,
    SPATIAL_TAPS: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    IDLE_PERCENT: tl.constexpr,
    BK: tl.constexpr,
):
    """All waves, the last of which may not be full, where programs then end nearly together; else ``waves``."""
    if IDLE_PERCENT != ALWAYS_SHARE:
        tiles = batch * per_sample
        every = tl.cdiv(tiles, programs)
        if UNIFORM:  # all tiles are alike
            waves = tl.where((every * programs - tiles) * 100 <= programs * IDLE_PERCENT, every, waves)
        else:
            whole = wave_iterations(
                plan, tiles, per_sample, every, programs, width, UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, PROGRAMS, BK
            )
            total = tl.sum(whole, 0)
            above = tl.max(whole, 0) * programs - total  # of all programs, were each the busiest
            # Multiplied out: the compiler makes a call of a division by 64 bits, and a stack for it.
            waves = tl.where(above * tiles * 100 <= total * programs * IDLE_PERCENT, every, waves)
    return waves


@triton.jit
def iteration_ranges(
    plan,  # [B, PLAN]
    batch,
    per_sample,
    waves,
    programs,
    width,
    UNIFORM: tl.constexpr,
    SPATIAL_TAPS: tl.constexpr,
    TEMPORAL_TAPS: tl.constexpr,
    BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MIN_K_BLOCKS: tl.constexpr,
    BK: tl.constexpr,
):
    """Where every program's range of shared iterations starts and stops: two ``[PROGRAMS]``.

    Without whole waves no program gets fewer than ``MIN_K_BLOCKS``: a short range costs more to add up than it saves.
    """
    _, _, iterations, _ = shared_iterations(
        plan, batch, per_sample, waves * programs, width, UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, BK
    )
    shared = tl.sum(iterations, 0).to(tl.int64)
    q = tl.arange(0, PROGRAMS)
    weight = tl.where(q < programs, 1, 0).to(tl.int64)
    if waves == 0:
        busy = tl.minimum(tl.maximum(shared // MIN_K_BLOCKS, 1), programs)
        weight = tl.where(q < busy, 1, 0).to(tl.int64)
    elif not UNIFORM:
        whole = wave_iterations(
            plan, batch * per_sample, per_sample, waves, programs, width,
            UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, PROGRAMS, BK,
        )  # fmt: skip
        mean = (tl.sum(whole, 0) + shared) // programs + 1
        weight = tl.where(q < programs, tl.maximum(mean - whole, 0), 0)
    until = tl.cumsum(weight, 0)
    total = tl.sum(weight, 0)
    return (shared * (until - weight) // total).to(tl.int32), (shared * until // total).to(tl.int32)


@triton.jit
def tile_of(
    iteration,
    lengths,  # [BATCH], like the next three, from shared_iterations
    first,
    iterations,
    until,
    batch,
    BATCH: tl.constexpr,
):
    """The tile that a shared iteration belongs to, and the iteration that tile starts with."""
    sample = tl.minimum(tl.sum((until <= iteration).to(tl.int32), 0), batch - 1)
    here = tl.arange(0, BATCH) == sample
    length = tl.maximum(tl.sum(tl.where(here, lengths, 0), 0), 1)
    start = tl.sum(tl.where(here, until - iterations, 0), 0)
    index = (iteration - start) // length
    return tl.sum(tl.where(here, first, 0), 0) + index, start + index * length
