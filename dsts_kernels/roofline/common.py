"""What launches of either backend have in common: kernels without products, torch's own, and how tiles are dealt out.

:func:`deal` is the schedule of both persistent convolutions (backends/triton/schedule.py, csrc/cuda/schedule.h).
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..backends.triton import tuning
from ..backends.triton.boxes import cdiv
from .cases import FLOAT, Case
from .chips import DRAM_US, START_US, Chip, Launch

LEAST = tuning.LEAST_BLOCKS  # K blocks that a program of a shared tile takes at least, as in both backends
RESIDENT = 256  # threads of a program without products, by which a multiprocessor is filled (Triton: estimate)


def stream(
    kernel: str, chip: Chip, programs: int, dram: float, trips: float, *, l2: float | None = None, tail: float = 0.0
) -> Launch:
    """A kernel without products, whose programs wait ``trips`` microseconds for memory each."""
    chain = cdiv(programs, chip.threads // RESIDENT * chip.processors) * trips
    return Launch(kernel, programs, dram, dram if l2 is None else l2, chain=chain, tail=START_US + tail)


def little(kernel: str, case: Case, chip: Chip, programs: int, rows: int, trips: int) -> Launch:
    """A kernel on ``rows`` of ``C`` floats, which is hardly more than its launch."""
    return stream(kernel, chip, programs, rows * case.channels * FLOAT, 0.0, tail=trips * DRAM_US)


def library(what: str, dram: float, count: int = 1) -> Launch:
    """Kernels of torch's around ours, by the bytes they read and write."""
    return Launch(f"torch: {what}", 0, dram, dram, tail=count * (START_US + DRAM_US), count=count)


class Share(NamedTuple):
    """How the persistent convolution deals its tiles out."""

    longest: int  # K blocks of the busiest program
    items: int  # tiles and parts of tiles that a program has at most
    parts: int  # parts of tiles, which go through memory
    pieces: int  # most parts of one tile


def deal(steps: Sequence[int], per_sample: int, programs: int) -> Share:
    """What :mod:`dsts_kernels.backends.triton.schedule` does, with ``steps`` K blocks in a tile of each sample."""
    tiles = len(steps) * per_sample
    waves = max(0, tiles // programs - 1)
    dealt = [sum(steps[(q + i * programs) // per_sample] for i in range(waves)) for q in range(programs)]
    left = (steps[tile // per_sample] for tile in range(waves * programs, tiles))
    bounds = list(itertools.accumulate(left, initial=0))  # of shared tiles, in K blocks
    shared = bounds[-1]
    if waves:
        mean = (sum(dealt) + shared) // programs + 1
        weights = [max(mean - own, 0) for own in dealt]
    else:
        most = min(max(shared // LEAST, 1), programs)
        weights = [1] * most + [0] * (programs - most)
    stops = [shared * until // sum(weights) for until in itertools.accumulate(weights)]
    longest, items, partial = 0, waves, Counter()
    for own, start, stop in zip(dealt, [0, *stops[:-1]], stops, strict=True):
        longest = max(longest, own + stop - start)
        if start < stop:
            first, last = bisect.bisect_right(bounds, start) - 1, bisect.bisect_left(bounds, stop) - 1
            items = max(items, waves + last - first + 1)
            partial.update({tile for tile in (first, last) if start > bounds[tile] or stop < bounds[tile + 1]})
    return Share(longest, items, sum(partial.values()), max(partial.values(), default=0))


def busiest(steps: Sequence[int], slots: int) -> int:
    """Steps of the busiest of ``slots``, to which tiles go in order as they get free."""
    free = [0] * slots
    for n in steps:
        heapq.heapreplace(free, free[0] + n)
    return max(free)
