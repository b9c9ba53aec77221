"""Tap sums against slices summed in float64, in every layout; 1, 2 and 3 threads bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .support import _C, acc, check, check_threads, dtypes, filled, layouts, shapes, tap_sums_ref

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


def tap_sums(x: Tensor, taps: int, threads: int = 1) -> Tensor:
    out = torch.full((*x.shape[:2], taps), torch.nan, dtype=acc(x.dtype))
    _C.tap_sums(x, out, threads)
    return out


@dtypes
@shapes
@layouts
@pytest.mark.parametrize("taps", [1, 9])
def test_values(dtype, shape, layout, taps):
    """Both tap counts in every layout, H or W of 1 included, against slices summed in float64."""
    x = filled(shape, dtype, layout)
    out = check_threads(lambda k: [tap_sums(x, taps, k)])[0]
    check(out, tap_sums_ref(x, taps), acc(dtype), 4)  # random signs cancel: the sum is small beside its terms


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_accuracy(taps, layout):
    """A long sum of positive numbers keeps float32 accuracy: partial sums, never one running total."""
    x = filled((1, 2, 20, 80, 100), torch.float32, layout).abs_()
    check(tap_sums(x, taps), tap_sums_ref(x, taps), torch.float32)


def test_no_cancellation():
    """A huge edge row does not disturb the taps that do not see it: nothing is computed by subtraction."""
    for layout in ("contiguous", "channels_last"):
        x = filled((1, 3, 2, 5, 5), torch.float32, layout)
        x[:, :, :, 0, :] = 1e12
        check(tap_sums(x, 9)[..., 6:], tap_sums_ref(x, 9)[..., 6:], torch.float32)


def test_wide_rows():
    """A row longer than the plane buffer takes the other way and is right too."""
    x = filled((1, 2, 2, 3, 5000), torch.float32)
    check(tap_sums(x, 9), tap_sums_ref(x, 9), torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_isolates(layout):
    """NaN and Inf of one sample and channel stay there."""
    x = filled((3, 9, 2, 4, 4), torch.float32, layout)
    x[1, 2, 1, 1, 1], x[1, 4, 0, 2, 3] = torch.nan, torch.inf
    bad = ~tap_sums(x, 9).isfinite().all(-1)
    assert bad.nonzero().tolist() == [[1, 2], [1, 4]]
