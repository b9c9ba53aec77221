"""Lines and sectors that a warp of the gathers touches, from their compiled code: what decides their time on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import ahead, gathers  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
HALF, SECTOR = torch.bfloat16, 32


def of(found: list[gathers.Mean], tensor: str, name: str) -> gathers.Mean:
    return next(one for one in found if (one.tensor, one.name) == (tensor, name))


def check_channels_last(found: list[gathers.Mean]) -> None:
    """Lanes of a load read neighbours of the list: of half the channels 1.8 lines and 4.8 sectors, where 64 bytes are
    wanted and the list has one channel in two."""
    load, store = of(found, "x", "ld"), of(found, "panel", "st")
    assert load.bytes == 64 and load.lines < 2.0 and load.sectors < 5.0, load
    assert store.bytes == 512 and store.lines == 4 and store.waste == 1, store


@pytest.mark.parametrize("architecture", ahead.TARGETS)
@pytest.mark.parametrize("gather", gathers.GATHERS)
def test_channels_last(gather, architecture):
    """Both gathers; stored as before, a load touches six times as many sectors, and this check fails."""
    check_channels_last(gathers.count(gather, architecture, "tpn", "channels-last", HALF))
    before = gathers.count(gather, architecture, "tpn", "channels-last", HALF, flat_gather=False)
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
@pytest.mark.parametrize("shape", ahead.SHAPES)
def test_gluon(shape, architecture):
    """Whole positions by asynchronous copies of 16 bytes, whole lines of panels, and 2.2 passes to take 32 elements."""
    found = gathers.count("route_and_gather", architecture, shape, "channels-last", HALF, gluon_gather=True)
    copy, store = of(found, "x", "cp.async"), of(found, "panel", "st")
    assert copy.bytes == 512 and copy.lines == 4 and copy.waste == 1, copy
    assert store.bytes == 128 and store.lines == 1 and store.waste == 1, store
    taken = of(found, "shared", "ld")
    assert taken.passes < 2.5, taken
