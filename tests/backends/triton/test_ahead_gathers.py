"""Lines and sectors that a warp of the gathers touches, from their compiled code: what decides their time on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import ahead, gathers  # noqa: E402
from benchmarks.compiled.simulated import simulated  # noqa: E402
from dsts_kernels.roofline.gathers import UNIT, WAYS  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
HALF, SECTOR = torch.bfloat16, 32


def of(found: list[gathers.Mean], tensor: str, name: str) -> gathers.Mean:
    return next(one for one in found if (one.tensor, one.name) == (tensor, name))


def check_channels_last(found: list[gathers.Mean]) -> None:
    """Lanes of a load read neighbours of the list, one channel in two: 1.8 lines and 4.8 sectors where 64 bytes are
    wanted, more or less as lists are drawn."""
    load, store = of(found, "x", "ld"), of(found, "panel", "st")
    assert load.bytes == 64 and load.lines < 2.5 and load.sectors < 6, load
    assert store.bytes == 512 and store.lines == 4 and store.waste == 1, store


@pytest.mark.parametrize("architecture", ahead.TARGETS)
@pytest.mark.parametrize("gather", gathers.GATHERS)
def test_channels_last(gather, architecture):
    """Both gathers; stored as before, a load touches six times as many sectors, and this check fails."""
    check_channels_last(gathers.count(gather, architecture, "tpn", "channels-last", HALF))
    before = gathers.count(gather, architecture, "tpn", "channels-last", HALF, flat_gather=False, early_gather=False)
    assert of(before, "x", "ld").sectors > 25
    with pytest.raises(AssertionError):
        check_channels_last(before)


@pytest.mark.parametrize("architecture", ahead.TARGETS)
@pytest.mark.parametrize("shape", ahead.SHAPES)
@pytest.mark.parametrize("gather", gathers.GATHERS)
def test_channels_first(gather, shape, architecture):
    """As a module's first layer gets features: 16 bytes a lane, and no sector that is not wanted."""
    found = gathers.count(gather, architecture, shape, "channels-first", HALF)
    load, store = of(found, "x", "ld"), of(found, "panel", "st")
    assert load.bytes == 512 and load.waste == 1 and store.bytes == 512 and store.waste == 1, (load, store)


@pytest.mark.parametrize("architecture", ahead.TARGETS)
def test_sent_for_early(architecture):
    """While the choice is worked out, every line of a block of positions once, by all that share it."""
    every = lambda grid: [(0, split) for split in range(grid[1])]  # noqa: E731
    with simulated(architecture, 20, every) as chip:
        gathers.route_and_gather(chip, gathers.features("tpn", "channels-last", HALF))
    sent = [one.access for one in chip.accesses if one.access.name == "prefetch"]
    loads = [at for at, one in enumerate(chip.accesses) if (one.tensor, one.access.name) == ("x", "ld")]
    assert sum(one.lines for one in sent) == sum(one.lanes for one in sent) == 64 * gathers.CHANNELS * 2 // 128
    assert chip.accesses[0].access.name == "prefetch" and loads, "before anything else"


@pytest.mark.parametrize("title", WAYS)
def test_counts_of_the_model(title):
    """What the roofline says of each way is what its compiled code does, within what other lists change."""
    way = WAYS[title]
    draws = [gathers.count(way.kernel, "sm_90", "tpn", "channels-last", HALF, **way.changes) for _ in range(6)]
    found = draws[0]
    units = sum(one.count * one.bytes for one in found if one.tensor == "panel") / UNIT
    features = [one for draw in draws for one in draw if one.tensor == "x" and one.name != "prefetch"]
    for wanted, field in ((way.sectors, "sectors"), (way.lines, "lines")):
        mean = sum(one.count * getattr(one, field) for one in features) / len(draws)
        assert mean / units == pytest.approx(wanted, rel=0.3)
    stored = of(found, "panel", "st")
    assert stored.count * stored.lines / units == way.stored
    passes = sum(one.count * one.passes for one in found if one.tensor == "shared") / units
    routing = 2.2 if way.kernel == "route_and_gather" and not way.whole else 0.6  # its share, for one round
    assert way.passes * 0.8 <= passes <= way.passes * 1.2 + routing


@pytest.mark.parametrize("architecture", ahead.TARGETS)
@pytest.mark.parametrize("shape", ahead.SHAPES)
def test_gluon(shape, architecture):
    """Whole positions by asynchronous copies of 16 bytes, whole lines of panels, and 2.2 passes to take 32 elements."""
    found = gathers.count("route_and_gather", architecture, shape, "channels-last", HALF, gluon_gather=True)
    copy, store = of(found, "x", "cp.async"), of(found, "panel", "st")
    assert copy.bytes == 512 and copy.lines == 4 and copy.waste == 1, copy
    assert store.bytes == 128 and store.lines == 1 and store.waste == 1, store
    taken = of(found, "shared", "ld")
    assert taken.passes < 2.5, taken
