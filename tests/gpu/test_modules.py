"""FusedDSTS on the GPU against the literal reference in float64: output, routing, every gradient, every option."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.testing import assert_close

from ..support.inputs import FORMATS, LAYOUTS
from ..support.modules import (
    RELU_GRADIENTS,
    assert_same_gradients,
    assert_same_routing,
    draws_for,
    features_for,
    reference_output,
    reference_step,
    training_step,
)
from .support import DEVICE, DTYPES, HALF, pair, randn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]

SIZE = (5, 40, 3, 6, 5)
OPTIONS = {
    "default": {},
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2),
    "summed-scores": dict(score_reduction="sum"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "no-skip": dict(skip=False),
    "no-norm": dict(norm=None),
    "all-neurons-gradient": dict(routing_gradient="all"),
    "one-neuron": dict(num_neurons=1),
}


def check_training(gpu_backend, dtype, options, size=SIZE, factor=5.0, hard_fraction=0.5, leave_out="nothing") -> None:
    """One step of both, on draws that rounding cannot reroute."""
    ref, fused = pair(gpu_backend, size[1], dtype, **options)
    x = randn(*size, dtype=dtype)
    draws, grad = draws_for(ref, x, dtype, hard_fraction), randn(*size, dtype=dtype)
    fused.load_state_dict(ref.state_dict())
    theirs, their_routing, wanted = reference_step(ref, x, draws, grad)
    mine, routing, found = training_step(fused, x, draws, grad)
    assert mine.dtype == dtype
    assert_close(mine, theirs, name="output", factor=2)
    assert_same_routing(routing, their_routing, dtype)
    assert_same_gradients(found, wanted, dtype, factor, leave_out)
    for (name, mine), theirs in zip(fused.named_buffers(), ref.buffers(), strict=True):
        assert_close(mine.double(), theirs.double(), dtype=dtype, name=name, factor=2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_training(gpu_backend, dtype, options):
    """Every option. Without a ReLU, whose flips near zero are no error of ours."""
    check_training(gpu_backend, dtype, options | {"activation": None})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_with_relu(gpu_backend, dtype):
    """The paper's layer; the third dtype too."""
    check_training(gpu_backend, dtype, {}, factor=RELU_GRADIENTS[dtype])


@pytest.mark.parametrize("hard_fraction", [0.0, 1.0], ids=["all-soft", "all-hard"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kinds_of_samples(gpu_backend, dtype, hard_fraction):
    """A batch of soft samples alone, and of hard ones alone."""
    check_training(gpu_backend, dtype, {"activation": None}, hard_fraction=hard_fraction)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("channels", [20, 33, 100])
def test_batches_and_ragged_channels(gpu_backend, batch, channels):
    """Batches of 1, 8, 32; channels that are not multiples of 8. One sample's norm leaves the router no gradient."""
    leave_out = "scoring" if batch == 1 else "nothing"
    check_training(
        gpu_backend, HALF, {"activation": None, "num_layers": 2}, (batch, channels, 3, 6, 5), 5, 0.5, leave_out
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_evaluation(gpu_backend, dtype, options):
    """Hard gates, running statistics, every option."""
    ref, fused = pair(gpu_backend, 40, dtype, **options)
    x = features_for(ref, randn(*SIZE, dtype=dtype))
    theirs, their_routing = reference_output(ref, x)
    mine, routing = fused.eval()(x, return_routing=True)
    assert_close(mine, theirs, factor=2)
    assert_same_routing(routing, their_routing, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_layouts(gpu_backend, layout, training):
    """Any stride order in; the memory format of the input out."""
    dtype = HALF
    ref, fused = pair(gpu_backend, 40, dtype, activation=None, num_layers=2)
    x = LAYOUTS[layout](randn(*SIZE, dtype=dtype)).detach()
    if training:
        draws, grad = draws_for(ref, x, dtype), randn(*SIZE, dtype=dtype)
        theirs, _, wanted = reference_step(ref, x, draws, grad)
        mine, _, found = training_step(fused, x, draws, grad)
        assert_same_gradients(found, wanted, dtype, 5)
    else:
        x = LAYOUTS[layout](features_for(ref, x)) if layout != "expanded" else x
        theirs = reference_output(ref, x)[0]
        mine = fused.eval()(x)
    assert_close(mine, theirs, factor=2)
    if layout in FORMATS:
        assert mine.is_contiguous(memory_format=FORMATS[layout])


def test_autocast(gpu_backend):
    """Autocast computes in half precision and keeps float32 parameters, gradients, scores and routing."""
    ref, fused = pair(gpu_backend, 40, torch.float32, num_layers=1, activation=None)
    x = randn(*SIZE)
    draws = draws_for(ref, x, torch.float32)
    theirs, their_routing, wanted = reference_step(ref, x, draws, torch.ones_like(x))
    with torch.autocast(DEVICE.type, HALF):
        mine, routing = fused(x, draws, return_routing=True)
    assert torch.equal(routing.neuron, their_routing.neuron) and routing.scores.dtype == torch.float32
    assert_close(routing.scores, their_routing.scores)
    assert_close(mine, theirs, dtype=HALF)
    found = torch.autograd.grad(mine.sum(), list(fused.parameters()))
    assert all(g.dtype == torch.float32 for g in found) and len(found) == len(wanted) - 1


def test_frozen_sides(gpu_backend):
    """Freezing one side of Upstream-Downstream Learning leaves the other side's gradients as they were."""
    dtype = HALF
    ref, fused = pair(gpu_backend, 40, dtype, activation=None, norm=None)
    x, grad = randn(*SIZE, dtype=dtype), randn(*SIZE, dtype=dtype)
    draws = draws_for(ref, x, dtype)
    wanted = reference_step(ref, x, draws, grad)[2]
    for frozen in (fused.upstream_parameters(), fused.downstream_parameters()):
        for p in frozen:
            p.requires_grad_(False)
        found = training_step(fused, x, draws, grad)[2]
        assert_same_gradients(found, {name: wanted[name] for name in found}, dtype, 5)
        for p in frozen:
            p.requires_grad_(True)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_repeats_bit_for_bit(gpu_backend, dtype, norm):
    """The same draws give the same bits, forward and backward, four times over."""
    _, fused = pair(gpu_backend, 96, dtype, norm=norm)
    x, grad = randn(8, 96, 8, 7, 7, dtype=dtype), randn(8, 96, 8, 7, 7, dtype=dtype)
    ref, _ = pair(gpu_backend, 96, dtype, norm=norm)
    draws = draws_for(ref, x, dtype)
    runs = [training_step(fused, x, draws, grad) for _ in range(4)]
    for y, _, gradients in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert [name for name in gradients if not torch.equal(gradients[name], runs[0][2][name])] == []


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_samples_stay_apart(gpu_backend, training):
    """NaN and Inf in one sample never reach another's output or gradient, and a neuron index is always valid."""
    _, fused = pair(gpu_backend, 40, HALF, norm=None)
    fused.train(training)
    x = randn(4, 40, 3, 6, 5, dtype=HALF)
    x[1], x[2, 3] = float("nan"), float("inf")
    y, routing = fused(x.requires_grad_(), return_routing=True)
    assert torch.isfinite(y[[0, 3]]).all()
    assert ((routing.neuron >= 0) & (routing.neuron < 4)).all()
    grad = torch.randn_like(y)
    grad[1] = float("nan")
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.isfinite(dx[[0, 3]]).all()


def test_empty_batch(gpu_backend):
    """No samples pass through, forward and backward."""
    fused = FusedDSTS(24, num_neurons=3, norm=None, device=DEVICE, dtype=HALF, backend=gpu_backend)
    x = torch.empty(0, 24, 2, 3, 3, device=DEVICE, dtype=HALF, requires_grad=True)
    y = fused(x)
    assert y.shape == x.shape
    found = torch.autograd.grad(y.sum(), [x, *fused.parameters()], allow_unused=True)
    assert all(g is None or g.count_nonzero() == 0 for g in found)
    assert fused.eval()(x).shape == x.shape
