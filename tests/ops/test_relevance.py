"""Relevance scores against real scoring convolutions."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import reference
from dsts_kernels.functional import relevance_scores
from dsts_kernels.ops.relevance import spread_op
from dsts_kernels.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")


def literal(x: torch.Tensor, scoring: torch.Tensor, reduction: str) -> torch.Tensor:
    n, width, c, *kernel = scoring.shape
    layer = reference.DSTSLayer(
        c, width, num_neurons=n, scoring_kernel=tuple(kernel), score_reduction=reduction, dtype=x.dtype
    )
    del layer.scoring
    layer.scoring = scoring
    return layer.scores(x)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("size", [(3, 7, 2, 5, 4), (1, 33, 4, 7, 7), (2, 4, 3, 1, 1), (0, 4, 2, 3, 3)], ids=str)
def test_values_and_gradients(backend, size, kernel, reduction):
    """Scores and both gradients are those of ten convolutions summed."""
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    scoring = torch.randn(4, 6, size[1], *kernel, dtype=torch.float64, requires_grad=True)
    scores = relevance_scores(x, scoring, reduction=reduction, backend=backend)
    expected = literal(x, scoring, reduction)
    assert_close(scores, expected)
    if size[0]:
        grad = torch.randn_like(scores)
        for mine, theirs in zip(
            torch.autograd.grad(scores, (x, scoring), grad),
            torch.autograd.grad(expected, (x, scoring), grad),
            strict=True,
        ):
            assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_scores_are_float32(backend, dtype):
    """Half features and kernels give float32 scores, as exact as float32 is."""
    x, scoring = torch.randn(2, 16, 4, 7, 7).to(dtype), torch.randn(3, 16, 16, 1, 1, 1).to(dtype)
    scores = relevance_scores(x, scoring, backend=backend)
    assert scores.dtype == torch.float32
    terms = x.double().abs().sum((2, 3, 4)) @ scoring.double().abs().sum(1).flatten(1).t()
    error = (scores.double() - literal(x.double(), scoring.double(), "sum")).abs()
    assert (error <= TOLERANCES[torch.float32] * terms).all()


def test_autocast_leaves_scores_alone(backend):
    """Routing must not flip because somebody turned autocast on."""
    x, scoring = torch.randn(2, 8, 2, 4, 4), torch.randn(3, 8, 8, 1, 3, 3)
    plain = relevance_scores(x, scoring, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relevance_scores(x, scoring, backend=backend), plain)


BAD = {
    "channels": (dict(scoring=torch.zeros(2, 4, 5, 1, 1, 1)), ValueError, r"scoring: .*wanted \(N, K, 4, 1, 1, 1\)"),
    "outputs": (dict(scoring=torch.zeros(2, 0, 4, 1, 1, 1)), ValueError, "scoring: .*wanted"),
    "precision": (dict(scoring=torch.zeros(2, 4, 4, 1, 1, 1).double()), TypeError, "scoring: .*float64, wanted"),
    "kernel": (dict(scoring=torch.zeros(2, 4, 4, 3, 3, 3)), ValueError, "scoring: .*1, 3, 3"),
    "reduction": (dict(reduction="max"), ValueError, "reduction: got 'max', wanted 'sum' or 'mean'"),
    "features": (dict(x=torch.zeros(1, 4, 0, 2, 2)), ValueError, "x: .* at least 1"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    """A wrong argument is named."""
    arguments = dict(x=torch.zeros(1, 4, 1, 2, 2), scoring=torch.zeros(2, 4, 4, 1, 1, 1)) | change
    with pytest.raises(error, match=message):
        relevance_scores(**arguments)


def test_opcheck():
    """Schema, fake and dispatch of the backward op."""
    torch.library.opcheck(spread_op.overload, (torch.randn(2, 4, 9), torch.randn(2, 3, 4, 1, 3, 3)))
