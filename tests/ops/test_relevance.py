"""Relevance scores on every target, against the scoring convolutions that they stand for."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import reference
from dsts_kernels.functional import relevance_scores
from dsts_kernels.ops.relevance import spread_op
from dsts_kernels.testing import TOLERANCES, assert_close

from ..support.oracles import literal_gradients, literal_relevance, wide
from ..support.targets import Target, dtypes, large
from .stated import Dispatch

pytestmark = pytest.mark.usefixtures("poison")

DISPATCH = {
    "relevance_scores": Dispatch(
        ("x", "scoring"), relevance_scores, literal_relevance, op="tap_sums", backward=False, second=True
    )
}
kernels = pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
reductions = pytest.mark.parametrize("reduction", ["sum", "mean"])


def check(target: Target, size: tuple[int, ...], kernel: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    """Float32 scores (float64 of float64) of features in any dtype, as exact as what they add; and both gradients."""
    x = target.randn(*size, dtype=dtype)
    scoring = target.randn(4, 6, size[1], *kernel, dtype=dtype, scale=0.1)
    ours = [x.requires_grad_(), scoring.requires_grad_()]
    scores = relevance_scores(*ours, reduction=reduction, backend=target.backend)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    assert scores.dtype == kind and scores.shape == (size[0], 4)
    ref = literal_relevance(*wide(ours), reduction)
    terms = literal_relevance(*(t.abs() for t in wide(ours)), reduction)
    assert ((scores.double() - ref).abs() <= TOLERANCES[kind] * terms).all()
    if size[0]:
        grad = target.randn(*scores.shape, dtype=kind)
        theirs = literal_gradients(lambda *t: literal_relevance(*t, reduction), ours, grad)
        for g, h in zip(torch.autograd.grad(scores, ours, grad), theirs, strict=True):
            assert_close(g, h, dtype=dtype, factor=2)


SIZES = [
    (3, 7, 2, 5, 4),
    *(pytest.param(size, marks=large) for size in ((1, 33, 4, 7, 7), (2, 4, 3, 1, 1), (0, 4, 2, 3, 3))),
]


@reductions
@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(target, size, kernel, reduction):
    """Scores and both gradients are those of the convolutions, summed."""
    check(target, size, kernel, reduction, target.dtype)


@large
@dtypes
@reductions
@kernels
def test_dtypes(target, kernel, reduction, dtype):
    """Half features and kernels give float32 scores, as exact as float32 is."""
    check(target, (5, 36, 4, 7, 7), kernel, reduction, dtype)


@reductions
@kernels
def test_oracle_is_the_reference(kernel, reduction):
    """The literal scores are those of the literal module."""
    x, scoring = torch.randn(3, 7, 2, 5, 4).double(), torch.randn(4, 6, 7, *kernel).double()
    layer = reference.DSTSLayer(
        7, 6, num_neurons=4, scoring_kernel=kernel, score_reduction=reduction, dtype=torch.float64
    )
    del layer.scoring
    layer.scoring = scoring
    assert_close(literal_relevance(x, scoring, reduction), layer.scores(x))


def test_autocast_leaves_scores_alone(target):
    """Routing must not flip because somebody turned autocast on."""
    x, scoring = target.randn(2, 8, 2, 4, 4, dtype=torch.float32), target.randn(3, 8, 8, 1, 3, 3, dtype=torch.float32)
    plain = relevance_scores(x, scoring, backend=target.backend)
    with torch.autocast(target.device.type, target.half):
        assert torch.equal(relevance_scores(x, scoring, backend=target.backend), plain)


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
