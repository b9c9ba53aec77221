"""Tap sums on every target, against what each tap of a zero-padded kernel meets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends import BACKENDS, available
from dsts_kernels.ops import tap_sums
from dsts_kernels.ops.tap_sums import tap_sums_op
from dsts_kernels.testing import TOLERANCES, assert_close

from ..support.checks import assert_same_bits, opcheck, opchecked
from ..support.inputs import LAYOUTS
from ..support.oracles import literal_tap_sums
from ..support.targets import dtypes, huge, large
from .stated import HERE, Dispatch

pytestmark = pytest.mark.usefixtures("poison")

DISPATCH = {
    "tap_sums": Dispatch(
        ("x",), lambda x: tap_sums(x, 1), lambda x: literal_tap_sums(x, 1), backward=False, second=True
    )
}
NATIVE = {
    "tap_sums": dict(
        x=HERE, size=(1, 2, 3), x_strides=(6, 6, 6, 3, 1), sums=HERE, batch=1, channels=1, parts=1, taps=9,
        vector=False, dtype=0,
    )
}  # fmt: skip

SIZES = [(2, 37, 3, 5, 4), (2, 37, 1, 1, 1), (2, 37, 2, 1, 70), (2, 37, 5, 9, 1)]
LARGE = [
    (1, 64, 8, 16, 16),
    pytest.param((8, 100, 16, 7, 7), marks=huge),
    pytest.param((1, 1024, 8, 16, 16), marks=huge),
    (32, 33, 2, 4, 4),
    (3, 5, 2, 1, 7),
    (0, 4, 2, 3, 3),
]


def assert_sums(sums: Tensor, x: Tensor, taps: int) -> None:
    """As exact as what accumulates them, of the sizes that they add: they may cancel themselves."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert sums.dtype == dtype and sums.shape == (*x.shape[:2], taps)
    wanted = literal_tap_sums(x.double(), taps)
    error = (sums.double() - wanted).abs()
    assert (error <= TOLERANCES[dtype] * literal_tap_sums(x.double().abs(), taps) + 1e-30).all()


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values(target, size, layout, dtype):
    """Every stride order, dtype, and planes of one row or column where a tap meets nothing; the same bits again."""
    x = LAYOUTS[layout](target.randn(*size, dtype=dtype))
    for taps in (1, 9):
        sums = tap_sums(x, taps, backend=target.backend)
        assert_sums(sums, x, taps)
        assert_close(sums, literal_tap_sums(x.double(), taps), dtype=sums.dtype)
        assert torch.equal(sums, tap_sums(x, taps, backend=target.backend))


@large
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("size", LARGE, ids=lambda size: "x".join(map(str, size)))
def test_sizes(target, size, layout):
    """Batches of 0, 1, 8 and 32, the planes of the paper."""
    x = LAYOUTS[layout](target.randn(*size))
    for taps in (1, 9):
        assert_sums(tap_sums(x, taps, backend=target.backend), x, taps)


@large
@dtypes
def test_half_accumulates_in_float32(target, dtype):
    """A half sum loses nothing to its own dtype: the error is that of float32."""
    x = torch.rand(2, 8, 8, 16, 16, dtype=torch.float64, device=target.device).to(dtype)
    assert_sums(tap_sums(x, 1, backend=target.backend), x, 1)


@large
@pytest.mark.parametrize("taps", [1, 9])
@dtypes
def test_gradient(target, dtype, taps):
    """The broadcast gradient is the true one."""
    x = target.randn(3, 20, 2, 5, 4, dtype=dtype)
    leaf = x.double().requires_grad_()
    sums, ref = tap_sums(x.requires_grad_(), taps, backend=target.backend), literal_tap_sums(leaf, taps)
    grad = target.randn(*sums.shape, dtype=sums.dtype)
    (ours,), (theirs,) = torch.autograd.grad(sums, x, grad), torch.autograd.grad(ref, leaf, grad.double())
    assert_close(ours, theirs, dtype=dtype)


@pytest.mark.parametrize("taps", [1, 9])
def test_gradcheck(backend, taps):
    """The broadcast gradient is the true one, on one-row planes too."""
    for size in ((2, 3, 2, 3, 4), (1, 2, 2, 1, 3)):
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: tap_sums(t, taps, backend=backend), (x,))


def test_samples_stay_apart(target):
    """NaN and Inf in one sample leave the sums of the others finite."""
    x = target.randn(3, 20, 2, 4, 4)
    x[1, 3] = torch.nan
    x[1, 4] = torch.inf
    for taps in (1, 9):
        assert torch.isfinite(tap_sums(x, taps, backend=target.backend)[[0, 2]]).all()


def test_repeats_bit_for_bit(target, in_any_order):
    """The same bits every time, of a sample that several blocks add up."""
    x = target.randn(*((3, 12, 2, 4, 5) if target.stand_in else (3, 200, 8, 16, 16)))
    runs = []
    for again in range(2 if target.stand_in else 5):
        if again:
            in_any_order()
        runs.append([tap_sums(x, 9, backend=target.backend)])
    assert_same_bits(runs)


def test_threads_do_not_change_bits():
    """The native sums are the same whatever the thread count (eager leaves their order to torch)."""
    if "cpu" not in available():
        pytest.skip(BACKENDS["cpu"].missing())
    x = torch.randn(2, 96, 8, 14, 14)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tap_sums(x, 9, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_opcheck(target):
    """Schema, fake and dispatch."""
    dtype, size = opchecked(target)
    opcheck(target, tap_sums_op, target.randn(2, 3, *size, dtype=dtype), 9)


def test_bad_input():
    """Wrong taps and wrong features are named."""
    with pytest.raises(ValueError, match="taps: got 4, wanted 1 or 9"):
        tap_sums(torch.zeros(1, 1, 1, 1, 1), 4)
    with pytest.raises(ValueError, match=r"x: .* wanted 5 dimensions"):
        tap_sums(torch.zeros(1, 1), 1)
