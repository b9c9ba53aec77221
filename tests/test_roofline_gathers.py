"""The model of the gathers against the H100 that measured them, and what it says of the goal."""

from __future__ import annotations

import itertools

import pytest

from dsts_kernels.roofline.cases import SHAPES, Case
from dsts_kernels.roofline.chips import CHIPS
from dsts_kernels.roofline.gathers import WAYS, gather_time, markdown

MEASURED = {  # us on an H100, commit e4cf77207fe6: benchmarks/results/h100.json, docs/log/h100.md
    ("training, before", "tpn"): 106.5,
    ("training, before", "swin"): 41.2,
    ("frozen, before", "tpn"): 97.0,
}


@pytest.mark.parametrize("title, shape", MEASURED)
def test_as_measured(title, shape):
    """Within a tenth of the range: the first and the last were fitted, Swin-B was not."""
    found = gather_time(WAYS[title], Case(*SHAPES[shape]), CHIPS["h100"])
    assert found.bound == "sectors"
    assert 0.9 * found.low < MEASURED[title, shape] < 1.1 * found.high


@pytest.mark.parametrize("chip", ["h100", "a100"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_way_is_faster_than_the_one_before(shape, chip):
    ways = ["frozen, before", "frozen, stored flat", "frozen, flat, sent for early", "frozen, Gluon"]
    times = [gather_time(WAYS[title], Case(*SHAPES[shape]), CHIPS[chip]) for title in ways]
    for worse, better in itertools.pairwise(times):
        assert better.high < worse.high and better.low <= worse.low * 1.05
    assert times[-1].shares[0] >= 0.7, "the goal, at the upper end"


def test_table():
    """A line for every way, chip and shape."""
    assert len(markdown().splitlines()) == 2 + 2 * 2 * len(WAYS)
