"""FusedDSTS against the literal reference on every target: output, routing and every gradient, every option."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsts_kernels import FusedDSTS
from dsts_kernels.testing import assert_close

from .support import modules
from .support.checks import assert_same_bits
from .support.inputs import FORMATS, LAYOUTS
from .support.modules import (
    RELU_GRADIENTS,
    assert_same_gradients,
    assert_same_routing,
    assert_same_statistics,
    draws_for,
    features_for,
    reference_output,
    reference_step,
    training_step,
)
from .support.targets import HALF, Target, huge, large

pytestmark = pytest.mark.usefixtures("poison")

OPTIONS = {
    "default": {},
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2),
    "summed-scores": dict(score_reduction="sum"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "no-skip": dict(skip=False),
    "bare": dict(norm=None, activation=None),
    "no-norm": dict(norm=None),
    "no-activation": dict(activation=None),
    "all-neurons-gradient": dict(routing_gradient="all"),
    "one-neuron": dict(num_neurons=1),
    "many-neurons": dict(num_neurons=17, num_layers=1, hard_fraction=0.0),
}
MORE = {
    "gumbel-tau": dict(gumbel_tau=0.5),
    "one-layer": dict(num_layers=1),
    "all-hard": dict(hard_fraction=1.0, noise_std=0.1),
    "all-soft": dict(hard_fraction=0.0),
    "summed-wide-scores": dict(score_reduction="sum", scoring_kernel=(1, 3, 3), scoring_width=2),
}
every_option = pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), *(pytest.param(options, marks=large) for options in MORE.values())],
    ids=[*OPTIONS, *MORE],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, pytest.param(HALF, marks=huge)], ids=str)


def size_of(target: Target) -> tuple[int, ...]:
    """A small batch."""
    return (3, 20, *target.size) if target.stand_in else (5, 40, *target.size)


def pair(target: Target, channels: int, dtype: torch.dtype, **options) -> tuple[torch.nn.Module, FusedDSTS]:
    """:func:`.support.modules.pair` on the target."""
    given = dict(num_neurons=4, num_layers=2 if target.stand_in else 3, score_reduction="mean") | options
    return modules.pair(channels, dtype, target.backend, target.device, **given)


def check_training(
    target: Target,
    dtype: torch.dtype,
    options: dict,
    size: tuple[int, ...] | None = None,
    factor: float = 5.0,
    leave_out: str = "nothing",
) -> None:
    """One step of both, on draws that rounding cannot reroute."""
    size = size or size_of(target)
    ref, fused = pair(target, size[1], dtype, **options)
    layer, x, grad = fused.layers[0], target.randn(*size, dtype=dtype), target.randn(*size, dtype=dtype)
    draws = draws_for(ref, x, dtype, layer.hard_fraction, layer.noise_std)
    theirs, their_routing, wanted = reference_step(ref, x, draws, grad)
    ours, routing, gradients = training_step(fused, x, draws, grad)
    assert ours.dtype == dtype
    assert_close(ours, theirs, name="output", factor=2)
    assert_same_routing(routing, their_routing, dtype)
    assert_same_gradients(gradients, wanted, dtype, factor, leave_out)
    assert_same_statistics(fused, ref, dtype)


@every_option
@dtypes
def test_training(target, dtype, options):
    """Every option. Without a ReLU where its flips near zero would be no error of ours."""
    activation = {} if dtype == torch.float64 else {"activation": None}
    check_training(target, dtype, options | activation, factor=10 if dtype == torch.float64 else 5)


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(half, marks=large) for half in (torch.float16, torch.bfloat16))], ids=str
)
def test_training_with_relu(target, dtype):
    """The paper's layer. Half types leave scoring to :func:`test_training`: behind a ReLU, whose flips move whole
    elements, its gradient is a small difference that may be off by any share of itself."""
    leave_out = "nothing" if dtype == torch.float32 else "scoring"
    check_training(target, dtype, {}, factor=RELU_GRADIENTS[dtype], leave_out=leave_out)


@large
@pytest.mark.parametrize("hard_fraction", [0.0, 1.0], ids=["all-soft", "all-hard"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kinds_of_samples(target, dtype, hard_fraction):
    """A batch of soft samples alone, and of hard ones alone."""
    check_training(target, dtype, {"activation": None, "hard_fraction": hard_fraction})


@large
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("channels", [20, 33, pytest.param(100, marks=huge)])
def test_batches_and_ragged_channels(target, batch, channels):
    """Batches of 1, 8, 32; channels that are not multiples of 8. One sample's norm leaves the router no gradient."""
    leave_out = "scoring" if batch == 1 else "nothing"
    size = (batch, channels, *target.size)
    check_training(target, target.half, {"activation": None, "num_layers": 2}, size, leave_out=leave_out)


@large
@every_option
@dtypes
def test_evaluation(target, dtype, options):
    """Hard gates and running statistics, every option; draws are accepted and change nothing."""
    ref, fused = pair(target, 40, dtype, **options)
    x = features_for(ref, target.randn(5, 40, *target.size, dtype=dtype))
    theirs, their_routing = reference_output(ref, x)
    ours, routing = fused.eval()(x, return_routing=True)
    assert_close(ours, theirs, factor=2)
    assert_same_routing(routing, their_routing, dtype)
    assert torch.equal(fused(x, draws=draws_for(ref, x, dtype)), ours)


@large
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_layouts(target, layout, training):
    """Any stride order in; the memory format of the input out."""
    dtype, size = target.dtype, (5, 40, *target.size)
    ref, fused = pair(target, 40, dtype, activation=None, num_layers=2)
    x = LAYOUTS[layout](target.randn(*size)).detach()
    if training:
        draws, grad = draws_for(ref, x, dtype), target.randn(*size)
        theirs, _, wanted = reference_step(ref, x, draws, grad)
        ours, _, gradients = training_step(fused, x, draws, grad)
        assert_same_gradients(gradients, wanted, dtype, 10 if dtype == torch.float64 else 5)
    else:
        x = LAYOUTS[layout](features_for(ref, x)) if layout != "expanded" else x
        theirs = reference_output(ref, x)[0]
        ours = fused.eval()(x)
    assert_close(ours, theirs, factor=2)
    if layout in FORMATS:
        assert ours.is_contiguous(memory_format=FORMATS[layout])


@large
def test_autocast(target):
    """Autocast computes in half precision and keeps float32 parameters, gradients, scores and routing."""
    ref, fused = pair(target, 40, torch.float32, num_layers=1, activation=None)
    x = target.randn(5, 40, *target.size, dtype=torch.float32)
    draws = draws_for(ref, x, torch.float32)
    theirs, their_routing, wanted = reference_step(ref, x, draws, torch.ones_like(x))
    with torch.autocast(target.device.type, target.half):
        ours, routing = fused(x, draws, return_routing=True)
    assert torch.equal(routing.neuron, their_routing.neuron) and routing.scores.dtype == torch.float32
    assert_close(routing.scores, their_routing.scores)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, dtype=target.half)
    gradients = torch.autograd.grad(ours.sum(), list(fused.parameters()))
    assert all(g.dtype == torch.float32 for g in gradients) and len(gradients) == len(wanted) - 1


@large
def test_frozen_sides(target):
    """Freezing one side of Upstream-Downstream Learning leaves the other side's gradients as they were."""
    dtype, size = target.dtype, (5, 40, *target.size)
    ref, fused = pair(target, 40, dtype, activation=None, norm=None)
    x, grad = target.randn(*size), target.randn(*size)
    draws = draws_for(ref, x, dtype)
    wanted = reference_step(ref, x, draws, grad)[2]
    for frozen in (fused.upstream_parameters(), fused.downstream_parameters()):
        for p in frozen:
            p.requires_grad_(False)
        gradients = training_step(fused, x, draws, grad)[2]
        assert len(gradients) == len(wanted) - len(frozen)
        assert_same_gradients(gradients, {name: wanted[name] for name in gradients}, dtype, 5)
        for p in frozen:
            p.requires_grad_(True)


@large
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("options", ["default", "bare", "mixing-3x1x1", "all-neurons-gradient"])
def test_activation_checkpointing(target, options, reentrant):
    """A pass that ``torch.utils.checkpoint`` runs once more gives the bits of one whose tensors are kept."""
    ref, fused = pair(target, 12, target.dtype, **OPTIONS[options])
    x, grad = target.randn(3, 12, *target.size), target.randn(3, 12, *target.size)
    draws, runs = draws_for(ref, x, target.dtype), []
    for again in (False, True):
        fused.zero_grad()
        given = x.clone().requires_grad_()
        y = checkpoint(fused, given, draws, use_reentrant=reentrant) if again else fused(given, draws)
        y.backward(grad)
        runs.append([y.detach(), given.grad, *(p.grad for p in fused.parameters())])
    assert_same_bits(runs)


@large
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_repeats_bit_for_bit(target, dtype, norm):
    """The same draws give the same bits, forward and backward, four times over."""
    size = (4, 24, 4, 6, 6) if target.device.type == "cpu" else (8, 96, 8, 7, 7)
    ref, fused = pair(target, size[1], dtype, norm=norm)
    x, grad = target.randn(*size, dtype=dtype), target.randn(*size, dtype=dtype)
    draws, runs = draws_for(ref, x, dtype), []
    for _ in range(4):
        y, _, gradients = training_step(fused, x, draws, grad)
        runs.append([y, *gradients.values()])
    assert_same_bits(runs)


@large
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_samples_stay_apart(target, training):
    """NaN and Inf in one sample never reach another's output or gradient, and a neuron index is always valid."""
    _, fused = pair(target, 40, target.dtype, norm=None)
    fused.train(training)
    x = target.randn(4, 40, *target.size)
    x[1], x[2, 3] = torch.nan, torch.inf
    y, routing = fused(x.requires_grad_(), return_routing=True)
    assert y[[0, 3]].isfinite().all()
    assert ((routing.neuron >= 0) & (routing.neuron < 4)).all()
    grad = torch.randn_like(y)
    grad[1] = torch.nan
    (dx,) = torch.autograd.grad(y, x, grad)
    assert dx[[0, 3]].isfinite().all()


@large
@pytest.mark.parametrize("size", [(0, 6, 2, 3, 3), (1, 6, 1, 1, 1), (2, 6, 1, 3, 1), (1, 6, 5, 1, 2)], ids=str)
def test_smallest_inputs(target, size):
    """An empty batch and planes or clips of one are valid, forward and backward."""
    ref, fused = pair(target, 6, target.dtype, norm=None)
    x = target.randn(*size).requires_grad_()
    draws = draws_for(ref, x.detach(), target.dtype)
    y = fused(x, draws)
    gradients = torch.autograd.grad(y.sum(), [x, *fused.parameters()], allow_unused=True)
    assert y.shape == gradients[0].shape == x.shape
    if size[0]:
        assert_close(y, reference_step(ref, x, draws, torch.ones_like(x))[0], factor=2)
    else:
        assert all(g is None or g.count_nonzero() == 0 for g in gradients)
    options = dict(backend=target.backend, device=target.device, dtype=target.dtype)
    assert FusedDSTS(6, **options).eval()(x).shape == size
    if size[0] != 1:
        assert FusedDSTS(6, **options)(x).shape == size
