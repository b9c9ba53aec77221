"""Tap sums against the definition: a convolution with a one-hot kernel, summed over all positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.backends import BACKENDS, available
from dsts_kernels.ops import tap_sums
from dsts_kernels.ops.tap_sums import tap_sums_op
from dsts_kernels.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "strided": lambda x: x.repeat(1, 2, 1, 1, 2)[:, ::2, :, :, ::2],
    "transposed": lambda x: x.permute(4, 0, 3, 1, 2).contiguous().permute(1, 3, 4, 2, 0),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
SIZES = [(2, 17, 3, 5, 4), (1, 64, 8, 16, 16), (3, 5, 2, 1, 7), (2, 3, 4, 6, 1), (2, 3, 1, 1, 1), (0, 4, 2, 3, 3)]


def literal(x: torch.Tensor, taps: int) -> torch.Tensor:
    """One channel at a time, one real convolution a tap."""
    side = 3 if taps == 9 else 1
    kernels = torch.eye(taps, dtype=x.dtype).view(taps, 1, 1, side, side)
    planes = x.flatten(0, 1)[:, None]
    return F.conv3d(planes, kernels, padding=(0, side // 2, side // 2)).sum((2, 3, 4)).view(*x.shape[:2], taps)


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_values(backend, size, layout, taps):
    """Every stride order, and planes of one row or column where a tap meets nothing."""
    x = LAYOUTS[layout](torch.randn(size, dtype=torch.float64))
    assert_close(tap_sums(x, taps, backend=backend), literal(x, taps))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_half_accumulates_in_float32(backend, dtype):
    """A half sum loses nothing to its own dtype: the error is that of float32."""
    x = torch.rand(2, 8, 8, 16, 16, dtype=torch.float64).to(dtype)
    sums = tap_sums(x, 1, backend=backend)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(sums, x.double().sum((2, 3, 4))[..., None], dtype=sums.dtype)


@pytest.mark.parametrize("taps", [1, 9])
def test_gradcheck(backend, taps):
    """The broadcast gradient is the true one, on one-row planes too."""
    for size in ((2, 3, 2, 3, 4), (1, 2, 2, 1, 3)):
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: tap_sums(t, taps, backend=backend), (x,))


def test_samples_stay_apart(backend):
    """NaN and Inf in one sample leave the sums of the others finite."""
    x = torch.randn(3, 20, 2, 4, 4)
    x[1, 3] = float("nan")
    x[1, 4] = float("inf")
    for taps in (1, 9):
        assert torch.isfinite(tap_sums(x, taps, backend=backend)[[0, 2]]).all()


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


def test_opcheck(backend):
    """Schema, fake and dispatch."""
    torch.library.opcheck(tap_sums_op.overload, (torch.randn(2, 3, 2, 4, 5), 9, backend))


def test_bad_input():
    """Wrong taps and wrong features are named."""
    with pytest.raises(ValueError, match="taps: got 4, wanted 1 or 9"):
        tap_sums(torch.zeros(1, 1, 1, 1, 1), 4)
    with pytest.raises(ValueError, match=r"x: .* wanted 5 dimensions"):
        tap_sums(torch.zeros(1, 1), 1)
