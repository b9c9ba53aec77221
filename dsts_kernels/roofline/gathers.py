"""What Triton's gathers should take, from what their compiled code touches.

A gather takes as long as the slowest of four: features and panel at the copy rate; sectors that loads ask of L2; lines
and passes of shared memory, one a cycle of a multiprocessor; features at the rate of what is on its way. Besides comes
what hides behind none of them: launching, and the choice of the neuron unless positions travel meanwhile. That is the
lower end of a prediction; at the upper one, trips to memory that wait for one another hide behind nothing either.

Counts of a warp's accesses are those of ``python -m benchmarks.compiled.gathers``; a slow test compares. How fast L2
delivers sectors is fitted: an H100 took 106.5 and 97 us for the two gathers of TPN as they were, at 31 and 29.5 sectors
for 64 bytes, which is 0.57 of the L2 bandwidth that :mod:`.chips` has. Swin-B's 41.2 us, left out of it, come out as
40 to 44.
"""

from __future__ import annotations

from typing import NamedTuple

from ..backends.gpu import grids
from ..backends.gpu.grids import cdiv
from ..backends.packing import tile_channels
from ..backends.triton.tuning import score_channels
from .cases import SHAPES, Case, reduction
from .chips import CHIPS, COPIED, DRAM_US, L2_US, START_US, Chip

UNIT, SECTOR = 64, 32  # bytes of 32 channels of a half type, for which accesses are counted; of a sector
L2_DELIVERED = 0.57  # of the L2 bandwidth, where most of a sector is not wanted: fitted, see above


class Way(NamedTuple):
    """How features are gathered: what loads of features, stores and shared memory take for :data:`UNIT` bytes."""

    kernel: str
    changes: dict[str, bool]  # of switches
    sectors: float  # that loads and copies of features touch
    lines: float  # and of those, lines
    stored: float  # lines of the panel
    passes: float  # of shared memory
    resident: int  # CTAs that a multiprocessor holds, by registers and shared memory
    whole: bool = False  # positions come with all their channels
    early: bool = False  # and are sent for before the choice is known


BEFORE = {"flat_gather": False, "early_gather": False}
FLAT, EARLY, GLUON = {"early_gather": False}, {}, {"gluon_gather": True}
# Of sm_90, channels-last, half of 1024 channels listed by either operator.
WAYS = {
    "training, before": Way("gather_panel", BEFORE, 31.0, 9.0, 0.5, 0.0, 7),
    "training, stored flat": Way("gather_panel", FLAT, 4.8, 1.7, 0.5, 1.0, 8),
    "frozen, before": Way("route_and_gather", BEFORE, 29.5, 9.0, 0.5, 0.0, 4),
    "frozen, stored flat": Way("route_and_gather", FLAT, 4.8, 1.7, 0.5, 1.0, 4),
    "frozen, flat, sent for early": Way("route_and_gather", EARLY, 4.8, 1.7, 0.5, 1.0, 4, early=True),
    "frozen, Gluon": Way("route_and_gather", GLUON, 2.0, 0.5, 0.5, 2.9, 4, whole=True, early=True),
}


class GatherTime(NamedTuple):
    """Microseconds, and the share of the copy rate at which features and panel would be moved."""

    floor: float
    low: float
    high: float
    bound: str

    @property
    def shares(self) -> tuple[float, float]:
        """At the upper end and at the lower one."""
        return self.floor / self.high, self.floor / self.low


def routing_us(case: Case, parts: int = 1) -> float:
    """Trips of a CTA that works its sample's choice out, as :func:`.launches.route_and_gather` has them."""
    return (cdiv(case.channels, score_channels(grids.next_power(case.neurons))) * (cdiv(parts, 4) + 1) + 3) * L2_US


def trips_us(way: Way, case: Case, chip: Chip) -> float:
    """Trips that wait for one another, of the busiest place for a CTA."""
    block = tile_channels(case.dtype)
    whole = grids.whole_positions(case.channels * case.element) if way.whole else 0
    blocks = reduction(case, *case.split).columns // block // 2
    grid = grids.gather_grid(case.batch, case.positions, cdiv(case.channels, block), chip.processors, whole)
    waves = cdiv(grid.num_ctas, way.resident * chip.processors)
    if whole:  # the next positions are asked for before these are written
        return waves * cdiv(cdiv(case.positions, whole), grid.splits) * DRAM_US
    # A list, then its channels, from memory; the other list, then its channels, which are in L2 by now.
    return waves * cdiv(blocks, grid.splits) * ((L2_US if way.early else DRAM_US) + 3 * L2_US)


def gather_time(way: Way, case: Case, chip: Chip) -> GatherTime:
    """A prediction for one gather of ``case``, half types."""
    panel = case.batch * case.positions * reduction(case, *case.split).columns * case.element
    units = panel / UNIT
    floor = (case.features + panel) / (COPIED * chip.bandwidth * 1e3)
    # On their way: some positions whole, or the channels of more of them that a block of a list spans, or all.
    asked = grids.GATHER_BYTES
    if not way.whole:
        spans = min(case.channels, 2 * tile_channels(case.dtype))
        asked = grids.GATHER_POSITIONS * (case.channels if way.early else spans) * case.element
    in_flight = way.resident * asked * chip.processors
    parts = {
        "copy rate": floor,
        "sectors": units * way.sectors * SECTOR / (L2_DELIVERED * chip.l2_bandwidth * 1e3),
        "lines and passes": units * (way.lines + way.stored + way.passes) / chip.processors / chip.clock,
        "bytes in flight": case.features / in_flight * DRAM_US,
    }
    bound = max(parts, key=lambda name: parts[name])
    routing = routing_us(case) if way.kernel == "route_and_gather" else 0.0
    if way.early:
        routing = max(0.0, routing - in_flight / (COPIED * chip.bandwidth * 1e3))
    low = parts[bound] + START_US + routing
    return GatherTime(floor, low, low + trips_us(way, case, chip), bound)


def markdown(chips: tuple[str, ...] = ("h100", "a100")) -> str:
    """Every way, chip and shape."""
    lines = [
        "| gather, batch 8 | chip | floor us | predicted us | of the copy rate | bound by |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for shape, (channels, size) in SHAPES.items():
        for name in chips:
            for title, way in WAYS.items():
                time = gather_time(way, Case(channels, size), CHIPS[name])
                least, most = time.shares
                lines.append(
                    f"| {title}, {shape} | {CHIPS[name].title} | {time.floor:.1f} | "
                    f"{time.low:.0f} to {time.high:.0f} | {least:.0%} to {most:.0%} | {time.bound} |"
                )
    return "\n".join(lines)
