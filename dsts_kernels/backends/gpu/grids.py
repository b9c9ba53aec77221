"""Grids of the GPU kernels: how features are cut into tiles and which CTA computes what, as plain integers.

Launchers of both GPU backends, the roofline, ahead-of-time checks and tests ask here, so every formula and every size
of a tile stands once. A *CTA* is a block of threads, which Triton calls a program. A *K block* is 128 bytes of a
reduction's channels for one tap of a kernel. Nothing here imports torch or a kernel language.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from . import switches

INT32 = 2**31 - 1

TILE = 128  # positions, and outputs, of a tile of the CUDA C++ products
MIN_K_BLOCKS = 8  # of a CTA that shares a tile: a shorter range costs more to add up than it saves
# Percent of a mean tile that the busiest CTA may have above the mean before tiles are shared: 15 is a last wave that is
# 85% full. Sharing costs about as much (docs/log/gluon.md).
IDLE_PERCENT, ALWAYS_SHARE = 15, -1
MAX_CTAS = 1024  # of a persistent CUDA C++ kernel, whose schedule lies in shared memory
GATHER_POSITIONS = 64  # of a CTA that gathers
GATHER_BYTES = 16384  # of whole positions, all channels each, that a CTA of the CUDA C++ gather keeps in shared memory
SUM_POSITIONS = 64  # at least, of a CTA that sums features
# How many channels a CUDA C++ CTA sums, about: where channels lie side by side, and elsewhere. Only parts depend on it.
SUM_CHANNELS_LAST, SUM_CHANNELS = 64, 32
CTAS_PER_PROCESSOR = 4  # about so many in a launch without products, to hide the latency of memory

# KiB of shared memory of a multiprocessor, by compute capability times ten.
SMEM_KIB = {70: 96, 75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228}
SMEM_KIB_ELSEWHERE = 100  # of a chip that the table does not know: the least since compute capability 8.0
# KiB of shared memory that a CTA of CUDA C++ tensor core products takes at most, from a compute capability on.
PRODUCT_SMEM_KIB = {0: 44, 75: 32, 80: 70}


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def next_power(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


class Box(NamedTuple):
    """Positions of a Triton tile: frames, rows and columns, each a power of two.

    A convolution's tap shifts the box as a whole, and what lies outside the features reads as zero: by the hardware
    where a tensor descriptor loads the box, by a mask elsewhere.
    """

    t: int
    h: int
    w: int

    def tiles(self, t: int, h: int, w: int) -> int:
        """Boxes that cover features of ``t`` frames of ``h`` rows and ``w`` columns."""
        return cdiv(t, self.t) * cdiv(h, self.h) * cdiv(w, self.w)


@functools.cache
def best_box(positions: int, t: int, h: int, w: int) -> Box:
    """The box of ``positions`` (a power of two) that covers ``(t, h, w)`` with the fewest tiles.

    Among equals the widest in columns, then rows, is taken: neighbours in memory stay in one tile. No side exceeds
    256, the most that a tensor descriptor loads.
    """
    sides = [1 << i for i in range(positions.bit_length())]
    boxes = [Box(bt, bh, positions // (bt * bh)) for bt in sides for bh in sides if positions // (bt * bh)]
    allowed = [box for box in boxes if max(box) <= 256] or boxes
    return min(allowed, key=lambda box: (box.tiles(t, h, w), -min(box.w, next_power(w)), -min(box.h, next_power(h))))


class Tiles(NamedTuple):
    """Tiles of one sample's result: along its positions, and across its outputs (or channels)."""

    along: int
    across: int

    @property
    def per_sample(self) -> int:
        return self.along * self.across


def box_tiles(box: Box, size: tuple[int, int, int], outputs: int, columns: int) -> Tiles:
    """Tiles of Triton's products: boxes of positions by ``columns`` outputs, of features of ``size`` (T, H, W)."""
    return Tiles(box.tiles(*size), cdiv(outputs, columns))


def flat_tiles(positions: int, outputs: int) -> Tiles:
    """Tiles of CUDA C++ products: :data:`TILE` positions, in the order of their numbers, by as many outputs."""
    return Tiles(cdiv(positions, TILE), cdiv(outputs, TILE))


def product_smem_kib(capability: int) -> int:
    """KiB of shared memory that a CTA of CUDA C++ tensor core products takes at most; ``capability`` times ten."""
    return next(kib for since, kib in reversed(PRODUCT_SMEM_KIB.items()) if capability >= since)


def resident_ctas(capability: int, exact: bool) -> int:
    """CTAs of a CUDA C++ product that a multiprocessor holds: two where shared memory allows, else one.

    Args:
        capability: compute capability times ten.
        exact: of float32 products without tensor cores, whose registers allow one.
    """
    fits = SMEM_KIB.get(capability, SMEM_KIB_ELSEWHERE) >= 2 * product_smem_kib(capability)
    return 2 if fits and not exact else 1


class PersistentGrid(NamedTuple):
    """The grid of a persistent convolution, known before the plan is."""

    num_ctas: int
    waves: int  # of tiles that each CTA computes alone where what they leave is shared out
    arrival_counters: int  # integers, zero at the start: one a CTA, then one for every sample and column of tiles


def persistent_grid(
    batch: int, tiles: Tiles, k_blocks: int, processors: int, resident: int, cap: int | None = None
) -> PersistentGrid:
    """The grid of a convolution of ``batch`` samples of ``tiles``.

    As many CTAs as run at once, but none gets fewer than :data:`MIN_K_BLOCKS` on average. Where tiles are shared
    (:func:`dealt_waves`), the last whole wave is too: each CTA's range can then be as much shorter as its tiles of the
    waves were longer.

    Args:
        k_blocks: of one tile, the most that a plan may give it.
        processors: multiprocessors of the chip.
        resident: CTAs that a multiprocessor holds.
        cap: the most CTAs that a kernel's schedule takes.

    Raises:
        ValueError: K blocks of all tiles do not fit 32 bits.
    """
    every_tile = batch * tiles.per_sample
    steps = every_tile * k_blocks
    if steps > INT32:
        raise ValueError(
            f"x: got {batch} samples of {tiles.per_sample} tiles of {k_blocks} K blocks (128 bytes of channels, for a "
            f"tap), wanted fewer than 2^31 of them in all"
        )
    ctas = min(processors * resident, cdiv(steps, MIN_K_BLOCKS))
    ctas = max(1, ctas if cap is None else min(ctas, cap))
    return PersistentGrid(ctas, whole_waves(every_tile, ctas), ctas + batch * tiles.across)


def whole_waves(tiles: int, num_ctas: int) -> int:
    """Waves of tiles that CTAs compute alone where tiles are shared: all whole ones but the last."""
    return max(0, tiles // num_ctas - 1)


def idle_percent() -> int:
    """:data:`IDLE_PERCENT`, or :data:`ALWAYS_SHARE` where the switch ``whole_waves`` is off."""
    return IDLE_PERCENT if switches.current().whole_waves else ALWAYS_SHARE


def cuda_idle_percent(capability: int) -> int:
    """:func:`idle_percent` of CUDA C++: from sm_90 on its loop has no register left for a choice (schedule.h)."""
    return idle_percent() if capability < 90 else ALWAYS_SHARE


def dealt_waves(steps: Sequence[int], per_sample: int, num_ctas: int, idle: int | None = None) -> int:
    """Waves of tiles that CTAs compute alone: all, so that nothing is shared, where CTAs then end nearly together.

    Only the device knows how long a sample's list is, so kernels decide, all CTAs alike: triton/schedule.py and
    csrc/cuda/schedule.h. Where all tiles are alike, "nearly" says how full the last wave is.

    Args:
        steps: iterations (K blocks) in a tile of each sample.
        per_sample: tiles of a sample.
        idle: percent of a mean tile that the busiest CTA may have above the mean; ``None`` asks
            :func:`idle_percent`.
    """
    idle, tiles = idle_percent() if idle is None else idle, len(steps) * per_sample
    every = cdiv(tiles, num_ctas)
    if idle != ALWAYS_SHARE:
        total = sum(steps) * per_sample
        allowed = (total + total * idle * num_ctas // (100 * tiles)) // num_ctas
        if max(wave_iterations(steps, per_sample, num_ctas, every)) <= allowed:
            return every
    return whole_waves(tiles, num_ctas)


def iteration_ranges(
    steps: Sequence[int], per_sample: int, num_ctas: int, idle: int | None = None
) -> list[tuple[int, int]]:
    """Stream-K: every CTA's range of the iterations that whole waves leave, ``start`` and ``stop``.

    The schedule of both persistent convolutions: triton/schedule.py and csrc/cuda/schedule.h work out the same on the
    device. CTA ``q`` computes tile ``q + i * num_ctas`` of every whole wave ``i``; the iterations of all later tiles,
    one after the other, are cut into one range a CTA, the shorter the longer its waves were. Without whole waves no
    range is shorter than :data:`MIN_K_BLOCKS`.

    Args:
        steps, per_sample, idle: as for :func:`dealt_waves`.
    """
    tiles = len(steps) * per_sample
    waves = dealt_waves(steps, per_sample, num_ctas, idle)
    shared = sum(steps[tile // per_sample] for tile in range(waves * num_ctas, tiles))
    if waves:
        whole = wave_iterations(steps, per_sample, num_ctas, waves)
        mean = (sum(whole) + shared) // num_ctas + 1
        weights = [max(mean - iterations, 0) for iterations in whole]
    else:
        busy = min(max(shared // MIN_K_BLOCKS, 1), num_ctas)
        weights = [1] * busy + [0] * (num_ctas - busy)
    stops = [shared * until // sum(weights) for until in itertools.accumulate(weights)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def wave_iterations(steps: Sequence[int], per_sample: int, num_ctas: int, waves: int) -> list[int]:
    """Iterations of every CTA's tiles of so many waves, the last of which may not be full."""
    end = min(waves * num_ctas, len(steps) * per_sample)
    return [sum(steps[tile // per_sample] for tile in range(q, end, num_ctas)) for q in range(num_ctas)]


class Deal(NamedTuple):
    """What :func:`iteration_ranges` makes of a convolution."""

    longest: int  # iterations of the busiest CTA
    work_tiles: int  # tiles and parts of tiles that a CTA has at most
    parts: int  # of tiles that several CTAs share, each of which goes through the workspace
    parts_of_a_tile: int  # at most
    idle: int  # CTAs without work


def deal(steps: Sequence[int], per_sample: int, num_ctas: int, idle: int | None = None) -> Deal:
    """How a convolution is dealt out: arguments as for :func:`dealt_waves`."""
    tiles = len(steps) * per_sample
    waves = dealt_waves(steps, per_sample, num_ctas, idle)
    shared = (steps[tile // per_sample] for tile in range(waves * num_ctas, tiles))
    bounds = list(itertools.accumulate(shared, initial=0))  # of shared tiles, in iterations
    longest, work_tiles, unused = 0, waves, 0
    parts: Counter[int] = Counter()  # by shared tile
    whole = wave_iterations(steps, per_sample, num_ctas, waves)
    ranges = iteration_ranges(steps, per_sample, num_ctas, idle)
    for iterations, (start, stop) in zip(whole, ranges, strict=True):
        longest = max(longest, iterations + stop - start)
        if start == stop:
            unused += not iterations
            continue
        first, last = bisect.bisect_right(bounds, start) - 1, bisect.bisect_left(bounds, stop) - 1
        work_tiles = max(work_tiles, waves + last - first + 1)
        parts.update({tile for tile in (first, last) if start > bounds[tile] or stop < bounds[tile + 1]})
    return Deal(longest, work_tiles, sum(parts.values()), max(parts.values(), default=0), unused)


class GatherGrid(NamedTuple):
    """The grid of a gather: CTAs along samples and their positions, by ``splits`` of each one's work."""

    along: int
    splits: int  # of a list's K blocks, or of a sample's positions where they are taken whole

    @property
    def num_ctas(self) -> int:
        return self.along * self.splits


def gather_grid(batch: int, positions: int, list_blocks: int, processors: int, whole: int = 0) -> GatherGrid:
    """The grid of a gather: about :data:`CTAS_PER_PROCESSOR` CTAs a multiprocessor.

    Args:
        list_blocks: K blocks that a list fills at most.
        whole: positions whose channels a CTA takes whole at a time (:func:`whole_positions`), or 0: then a CTA takes
            listed channels of :data:`GATHER_POSITIONS` positions.
    """
    along = batch * (1 if whole else cdiv(positions, GATHER_POSITIONS))
    most = cdiv(positions, whole) if whole else list_blocks
    return GatherGrid(along, max(1, min(most, cdiv(CTAS_PER_PROCESSOR * processors, along))))


def whole_positions(position_bytes: int) -> int:
    """Positions that a CTA of the CUDA C++ gather takes whole at a time; 0 where not even one fits."""
    return min(GATHER_POSITIONS, GATHER_BYTES // position_bytes) if position_bytes else 0


def tap_sum_parts(batch: int, positions: int, channels: int, cta_channels: int, processors: int) -> int:
    """Parts that a channel's tap sums come in, so that a small batch still fills the chip.

    Args:
        cta_channels: channels of a CTA.
    """
    ctas = max(1, batch * cdiv(channels, cta_channels))
    return max(1, min(cdiv(positions, SUM_POSITIONS), cdiv(CTAS_PER_PROCESSOR * processors, ctas)))
