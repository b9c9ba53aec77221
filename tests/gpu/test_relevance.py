"""Tap sums and relevance scores on the GPU, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.functional import relevance_scores
from dsts_kernels.ops import tap_sums
from dsts_kernels.testing import TOLERANCES, assert_close

from .support import DTYPES, FORMATS, HALF, LAYOUTS, gpu_only, randn

pytestmark = [*gpu_only, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]

SIZES = [
    (2, 17, 3, 5, 4),
    (8, 100, 16, 7, 7),
    (1, 1024, 8, 16, 16),
    (32, 33, 2, 4, 4),
    (3, 5, 2, 1, 7),
    (2, 3, 4, 6, 1),
    (2, 3, 1, 1, 1),
    (0, 4, 2, 3, 3),
]
RAGGED = SIZES[0]


def literal_sums(x: torch.Tensor, taps: int) -> torch.Tensor:
    """What each tap of a zero-padded kernel meets, summed: ``(B, C, taps)``."""
    if taps == 1:
        return x.sum((2, 3, 4))[..., None]
    h, w = x.shape[3:]
    padded = F.pad(x, (1, 1, 1, 1))
    taps = [padded[..., i : i + h, j : j + w].sum((2, 3, 4)) for i in range(3) for j in range(3)]
    return torch.stack(taps, dim=-1)


def assert_sums(sums: torch.Tensor, x: torch.Tensor, taps: int) -> None:
    """Float32 sums, exact to float32's tolerance of the sizes they add: their own may cancel."""
    assert sums.dtype == torch.float32 and sums.shape == (*x.shape[:2], taps)
    error = (sums.double() - literal_sums(x.double(), taps)).abs()
    assert (error <= TOLERANCES[torch.float32] * literal_sums(x.double().abs(), taps) + 1e-30).all()


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize(
    "size, layout",
    [(size, layout) for size in SIZES for layout in LAYOUTS if layout in FORMATS or size == RAGGED],
    ids=lambda v: v if isinstance(v, str) else "x".join(map(str, v)),
)
def test_tap_sums(gpu_backend, size, layout, taps):
    """Every stride order, batches of 0, 1, 8 and 32, planes of one row or column."""
    x = LAYOUTS[layout](randn(*size, dtype=HALF))
    assert_sums(tap_sums(x, taps, backend=gpu_backend), x, taps)


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_tap_sums_in_other_dtypes(gpu_backend, dtype, layout, taps):
    """Half features lose nothing to their own dtype."""
    x = LAYOUTS[layout](randn(3, 40, 8, 9, 7, dtype=dtype))
    assert_sums(tap_sums(x, taps, backend=gpu_backend), x, taps)


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tap_sums_gradient(gpu_backend, dtype, taps):
    """The broadcast gradient is the true one."""
    x = randn(3, 20, 2, 5, 4, dtype=dtype)
    wide = x.double().requires_grad_()
    sums = tap_sums(x.requires_grad_(), taps, backend=gpu_backend)
    grad = randn(*sums.shape)
    (mine,), (theirs,) = (
        torch.autograd.grad(t, leaf, grad.to(t.dtype)) for t, leaf in ((sums, x), (literal_sums(wide, taps), wide))
    )
    assert_close(mine, theirs, dtype=dtype)


def test_tap_sums_stay_apart_and_repeat(gpu_backend):
    """NaN and Inf in one sample leave the others finite; the same bits every time."""
    x = randn(3, 200, 8, 16, 16, dtype=HALF)
    runs = [tap_sums(x, 9, backend=gpu_backend) for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs)
    x[1, 3], x[1, 4] = float("nan"), float("inf")
    for taps in (1, 9):
        assert torch.isfinite(tap_sums(x, taps, backend=gpu_backend)[[0, 2]]).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relevance_scores(gpu_backend, dtype, kernel, reduction):
    """Float32 scores from features of any dtype, and both gradients."""
    x, scoring = randn(5, 36, 4, 7, 7, dtype=dtype), randn(4, 6, 36, *kernel, dtype=dtype, scale=0.1)
    wide = [x.double().requires_grad_(), scoring.double().requires_grad_()]
    scores = relevance_scores(x.requires_grad_(), scoring.requires_grad_(), reduction=reduction, backend=gpu_backend)
    divisor = 6 * x[0, 0].numel() if reduction == "mean" else 1
    sums = literal_sums(wide[0], kernel[1] * kernel[2]).flatten(1)
    wanted = sums @ wide[1].sum(1).flatten(1).t() / divisor
    assert scores.dtype == torch.float32
    sizes = (
        literal_sums(wide[0].abs(), kernel[1] * kernel[2]).flatten(1) @ wide[1].abs().sum(1).flatten(1).t() / divisor
    )
    assert ((scores.double() - wanted).abs() <= TOLERANCES[torch.float32] * sizes).all()
    grad = randn(*scores.shape)
    mine = torch.autograd.grad(scores, (x, scoring), grad)
    for g, h in zip(mine, torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        assert_close(g, h, dtype=dtype, factor=2)
