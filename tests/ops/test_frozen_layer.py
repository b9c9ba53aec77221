"""The op of one frozen layer on every target: what it gives the next layer, and what torch asks of an op."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.ops.frozen_layer import frozen_layer, frozen_layer_op
from dsts_kernels.testing import assert_close

from ..support.checks import opcheck, opchecked
from ..support.modules import features_for, pair, reference_output
from ..support.oracles import literal_tap_sums
from ..support.targets import dtypes, large

pytestmark = pytest.mark.usefixtures("poison")
kernels = pytest.mark.parametrize("kernel", [(1, 1, 1), pytest.param((1, 3, 3), marks=large)], ids=str)


@dtypes
@pytest.mark.parametrize("taps", [1, 9])
@kernels
def test_values(target, kernel, taps, dtype):
    """The layer's output with its skip, the sums that the next layer routes by, neurons and scores."""
    options = dict(num_layers=1, mixing_kernel=kernel, score_reduction="mean")
    ref, fused = pair(40, dtype, target.backend, target.device, **options)
    x = features_for(ref, target.randn(3, 40, *target.size, dtype=dtype))
    layer = fused.eval().freeze().layers[0]
    y, sums, neuron, scores = frozen_layer(x, None, x, layer.weights(), layer.options(taps), backend=target.backend)
    theirs, routing = reference_output(ref, x)
    assert_close(y, theirs, factor=2)
    assert torch.equal(neuron, routing.neuron[0])
    assert_close(scores, routing.scores[0], dtype=dtype, factor=2)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == scores.dtype == kind
    error = (sums.double() - literal_tap_sums(y.double(), taps)).abs()
    of = literal_tap_sums(y.double().abs(), taps)
    assert (error <= (1e-12 if kind == torch.float64 else 1e-5) * of).all()


@kernels
def test_opcheck(target, kernel):
    """Schema, fake and dispatch, with and without a skip."""
    dtype, size = opchecked(target)
    layer = (
        pair(8, dtype, target.backend, target.device, num_layers=1, mixing_kernel=kernel)[1].eval().freeze().layers[0]
    )
    x = target.randn(2, 8, *size, dtype=dtype)
    for skip, taps in ((None, 9), (x, 0)):
        opcheck(target, frozen_layer_op, x, None, skip, *layer.weights(), *layer.options(taps))
