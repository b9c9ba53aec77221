"""What launches of either backend have in common: kernels without products, and torch's own."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from ..backends.gpu.grids import cdiv
from .cases import FLOAT, Case
from .chips import DRAM_US, START_US, Chip, Launch

RESIDENT = 256  # threads of a CTA without products, by which a multiprocessor is filled (Triton: estimate)


def stream(
    kernel: str, chip: Chip, ctas: int, dram: float, trips: float, *, l2: float | None = None, tail: float = 0.0
) -> Launch:
    """A kernel without products, whose CTAs wait ``trips`` microseconds for memory each."""
    chain = cdiv(ctas, chip.threads // RESIDENT * chip.processors) * trips
    return Launch(kernel, ctas, dram, dram if l2 is None else l2, chain=chain, tail=START_US + tail)


def little(kernel: str, case: Case, chip: Chip, ctas: int, rows: int, trips: int) -> Launch:
    """A kernel on ``rows`` of ``C`` floats, which is hardly more than its launch."""
    return stream(kernel, chip, ctas, rows * case.channels * FLOAT, 0.0, tail=trips * DRAM_US)


def library(what: str, dram: float, count: int = 1) -> Launch:
    """Kernels of torch's around ours, by the bytes they read and write."""
    return Launch(f"torch: {what}", 0, dram, dram, tail=count * (START_US + DRAM_US), count=count)


def busiest(steps: Sequence[int], places: int) -> int:
    """Steps of the busiest of ``places``, to which tiles go in order as they get free."""
    free = [0] * places
    for n in steps:
        heapq.heapreplace(free, free[0] + n)
    return max(free)
