"""FusedDSTS against the literal reference: output, routing and every gradient, and how it behaves as a layer."""

from __future__ import annotations

import copy

import pytest
import torch

from dsts_kernels import Draws, DSTSLayer, FusedDSTS, Routing, reference
from dsts_kernels.backends import convolution
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("poison")

OPTIONS = {
    "default": {},
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2),
    "mean-scores": dict(score_reduction="mean", gumbel_tau=0.5),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "no-skip": dict(skip=False),
    "bare": dict(norm=None, activation=None),
    "no-norm": dict(norm=None),
    "no-activation": dict(activation=None),
    "all-neurons-gradient": dict(routing_gradient="all", score_reduction="mean"),
    "one-neuron": dict(num_neurons=1),
    "one-layer": dict(num_layers=1),
    "all-hard": dict(hard_fraction=1.0, noise_std=0.1),
    "all-soft": dict(hard_fraction=0.0),
}


def pair(channels: int = 12, dtype: torch.dtype = torch.float64, backend: str | None = None, **options):
    """A reference and a fused module with the same weights, lively gates and statistics."""
    options = dict(num_neurons=3) | options
    ref = reference.DSTS(channels, dtype=torch.float64, **options)
    fused = FusedDSTS(channels, dtype=dtype, backend=backend, **options)
    with torch.no_grad():
        for layer in ref.layers:
            layer.gate.normal_()
            if layer.norm is not None:
                layer.norm.running_mean.normal_()
                layer.norm.running_var.uniform_(0.5, 2)
                layer.norm.weight.uniform_(0.5, 2)
                layer.norm.bias.normal_()
    fused.load_state_dict(ref.state_dict())
    ref.load_state_dict(fused.state_dict())  # the same rounding on both sides
    return ref, fused


def draws_for(module: FusedDSTS, batch: int, dtype: torch.dtype = torch.float64) -> Draws:
    layer = module.layers[0]
    return sample_draws(
        batch,
        layer.in_channels,
        layer.num_neurons,
        len(module.layers),
        noise_std=layer.noise_std,
        hard_fraction=layer.hard_fraction,
        dtype=dtype,
    )


def assert_same_routing(mine: Routing, theirs, dtype: torch.dtype) -> None:
    assert torch.equal(mine.neuron, theirs.neuron)
    assert_close(mine.scores, theirs.scores, dtype=dtype, name="scores")
    assert_close(mine.gate, theirs.gate, dtype=dtype, name="gate")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_matches_reference(backend, options):
    """Output, routing, running statistics and every gradient, given the same draws."""
    ref, fused = pair(backend=backend, **options)
    x = torch.randn(5, 12, 3, 5, 4, dtype=torch.float64)
    draws = draws_for(fused, 5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    theirs, their_routing = ref(inputs[0], draws, return_routing=True)
    mine, routing = fused(inputs[1], draws=draws, return_routing=True)
    assert_close(mine, theirs)
    assert_same_routing(routing, their_routing, torch.float64)
    grad = torch.randn_like(theirs)
    theirs.backward(grad)
    mine.backward(grad)
    assert_close(inputs[1].grad, inputs[0].grad, factor=10)
    for (name, p), q in zip(ref.named_parameters(), fused.parameters(), strict=True):
        assert_close(q.grad, p.grad, name=f"gradient of {name}", factor=10)
    for (name, p), q in zip(ref.named_buffers(), fused.buffers(), strict=True):
        assert_close(q.double(), p.double(), name=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_evaluation_matches_reference(backend, options):
    """Output and routing in evaluation; draws are accepted and change nothing."""
    ref, fused = pair(backend=backend, **options)
    x = torch.randn(4, 12, 3, 5, 4, dtype=torch.float64)
    theirs, their_routing = ref.eval()(x, return_routing=True)
    mine, routing = fused.eval()(x, return_routing=True)
    assert_close(mine, theirs)
    assert_same_routing(routing, their_routing, torch.float64)
    assert torch.equal(fused(x, draws=draws_for(fused, 4)), mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend, dtype):
    """A module in another dtype routes as float64 does on the same rounded weights, within its tolerance.

    Without a ReLU, whose flips near zero are no error of ours; a gradient sums terms of both signs, which leaves
    it a few times the relative error of its terms.
    """
    ref, fused = pair(32, dtype, backend, score_reduction="mean", num_layers=1, activation=None)
    x = torch.randn(4, 32, 4, 7, 7).to(dtype)
    draws = draws_for(fused, 4, torch.float32)
    wide = Draws(draws.noise.to(dtype).double(), draws.hard, draws.gumbel.double())
    inputs = [x.double().requires_grad_(), x.clone().requires_grad_()]
    theirs, their_routing = ref(inputs[0], wide, return_routing=True)
    mine, routing = fused(inputs[1], draws, return_routing=True)
    assert mine.dtype == dtype and routing.scores.dtype == torch.float32
    assert torch.equal(routing.neuron, their_routing.neuron)
    assert_close(mine, theirs, dtype=dtype)
    grad = torch.randn_like(theirs).to(dtype)
    theirs.backward(grad.double())
    mine.backward(grad)
    for (name, p), q in zip(ref.named_parameters(), fused.parameters(), strict=True):
        assert_close(q.grad, p.grad, dtype=dtype, name=f"gradient of {name}", factor=10)


def test_autocast(backend):
    """Autocast computes in its dtype, keeps float32 parameters, gradients, scores and routing."""
    ref, fused = pair(16, torch.float32, backend, score_reduction="mean", num_layers=1)
    ref = ref.float()
    x = torch.randn(3, 16, 2, 6, 6)
    draws = draws_for(fused, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, routing = fused(x, draws, return_routing=True)
        theirs, their_routing = ref(x, draws, return_routing=True)
    assert mine.dtype == theirs.dtype == torch.float32 and routing.scores.dtype == torch.float32
    assert torch.equal(routing.neuron, their_routing.neuron)
    assert_close(mine, theirs, dtype=torch.bfloat16)
    mine.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


@pytest.mark.parametrize("routing_gradient", ["selected", "all"])
def test_one_sample_and_a_contiguous_gradient(backend, routing_gradient):
    """A batch of one through BatchNorm with nothing after it: its backward must see the strides there are."""
    ref, fused = pair(16, backend=backend, activation=None, skip=False, num_layers=1, routing_gradient=routing_gradient)
    x, draws = torch.randn(1, 16, 4, 7, 7, dtype=torch.float64), draws_for(fused, 1)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    theirs, mine = ref(inputs[0], draws), fused(inputs[1], draws)
    grad = torch.randn_like(x)
    theirs.backward(grad)
    mine.backward(grad)
    assert_close(inputs[1].grad, inputs[0].grad, factor=100)
    for (name, p), q in zip(ref.named_parameters(), fused.parameters(), strict=True):
        if name.split(".")[-1] not in ("scoring",):  # one sample's norm leaves the router no gradient but rounding
            assert_close(q.grad, p.grad, name=f"gradient of {name}", factor=100)


def test_float64_stays_float64_under_autocast(backend):
    """As everywhere in torch, autocast leaves double precision alone."""
    ref, fused = pair(8, backend=backend, norm=None)
    x = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        mine = fused.eval()(x)
    assert mine.dtype == torch.float64
    assert_close(mine, ref.eval()(x))


def test_meta_device():
    """Shapes without data: the module runs on the meta device, as torch's own layers do."""
    dsts = FusedDSTS(8, num_neurons=3, device="meta")
    for training in (True, False):
        y, routing = dsts.train(training)(torch.empty(2, 8, 2, 3, 3, device="meta"), return_routing=True)
        assert y.shape == (2, 8, 2, 3, 3) and routing.gate.shape == (3, 2, 8)


def test_is_a_drop_in(backend):
    """Same shape, memory format and dtype out as in, with sampled draws; Routing has the shapes promised."""
    dsts = FusedDSTS(8, num_layers=2, num_neurons=5, backend=backend)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        for skip in (True, False):
            dsts.skip = skip
            x = torch.randn(3, 8, 4, 5, 6).contiguous(memory_format=memory_format)
            y, routing = dsts(x, return_routing=True)
            assert y.shape == x.shape and y.stride() == x.stride()
    assert routing.neuron.shape == (2, 3) and routing.neuron.dtype == torch.int64
    assert routing.scores.shape == (2, 3, 5) and routing.gate.shape == (2, 3, 8)


def test_layer_changes_channels(backend):
    """DSTSLayer alone: other output channels, its own draws and routing without the layer dimension."""
    layer = DSTSLayer(6, 10, num_neurons=4, scoring_width=2, backend=backend)
    y, routing = layer(torch.randn(3, 6, 2, 4, 4), return_routing=True)
    assert y.shape == (3, 10, 2, 4, 4) and layer.scoring.shape == (4, 20, 6, 1, 1, 1)
    assert routing.neuron.shape == (3,) and routing.gate.shape == (3, 6)


def test_same_seed_same_bits(backend):
    """Same seed: the same initial weights as the reference, the same output and gradients, bit for bit."""
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        dsts = FusedDSTS(24, num_neurons=4, backend=backend)
        x = torch.randn(4, 24, 4, 6, 6, requires_grad=True)
        y = dsts(x)
        y.square().sum().backward()
        runs.append([y, x.grad, *(p.grad for p in dsts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.manual_seed(3)
    first = reference.DSTS(24, num_neurons=4).state_dict()
    torch.manual_seed(3)
    second = FusedDSTS(24, num_neurons=4).state_dict()
    assert list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_parameters_are_partitioned():
    """Upstream and downstream are disjoint and complete."""
    dsts = FusedDSTS(4, num_layers=2, num_neurons=2)
    upstream, downstream = dsts.upstream_parameters(), dsts.downstream_parameters()
    assert {id(p) for p in upstream} == {id(q) for layer in dsts.layers for q in (layer.scoring, layer.gate)}
    assert sorted(map(id, upstream + downstream)) == sorted(map(id, dsts.parameters()))


def test_frozen_parameters_get_no_gradient_and_change_none(backend):
    """Freezing one side leaves the other side's gradients as they were."""
    _, fused = pair(backend=backend, score_reduction="mean")
    x = torch.randn(3, 12, 2, 4, 4, dtype=torch.float64)
    draws = draws_for(fused, 3)
    fused(x, draws).square().sum().backward()
    both = {name: p.grad.clone() for name, p in fused.named_parameters()}
    for frozen, training in (
        (fused.upstream_parameters(), fused.downstream_parameters()),
        (fused.downstream_parameters(), fused.upstream_parameters()),
    ):
        fused.zero_grad()
        for p in frozen:
            p.requires_grad_(False)
        fused(x, draws).square().sum().backward()
        for name, p in fused.named_parameters():
            if any(p is q for q in training):
                assert_close(p.grad, both[name], name=name)
            else:
                assert p.grad is None
        for p in frozen:
            p.requires_grad_(True)


def test_no_scoring_convolution_is_run(backend, monkeypatch):
    """Evaluation costs the gated convolutions and the mixing, counted: scores cost none."""
    shapes = []
    for name in ("forward", "data_gradient", "weight_gradient"):
        original = getattr(convolution, name)
        monkeypatch.setattr(
            convolution, name, lambda a, b, kernel, original=original: shapes.append(kernel) or original(a, b, kernel)
        )
    for dtype in (torch.float32, torch.float64):
        shapes.clear()
        dsts = FusedDSTS(8, num_layers=1, num_neurons=50, backend=backend, dtype=dtype)
        dsts.layers[0].gate.data.copy_(torch.tensor([1.0, -1.0]).repeat(4))  # both operators, whichever neuron it is
        dsts.eval()(torch.randn(1, 8, 2, 4, 4, dtype=dtype))
        direct = backend != "cpu" or dtype == torch.float64
        assert sorted(shapes) == [(1, 1, 1), *([(1, 3, 3), (3, 1, 1)] if direct else [])]


@pytest.mark.parametrize("training", [False, True])
def test_samples_stay_apart(backend, training):
    """NaN and Inf in one sample never reach another's output, and its neuron index is valid."""
    dsts = FusedDSTS(6, num_neurons=4, norm=None, backend=backend).train(training)
    x = torch.randn(3, 6, 2, 5, 5)
    x[1, 0] = float("nan")
    x[1, 1] = float("inf")
    y, routing = dsts(x, return_routing=True)
    assert torch.isfinite(y[[0, 2]]).all()
    assert ((routing.neuron >= 0) & (routing.neuron < 4)).all()


@pytest.mark.parametrize("size", [(0, 6, 2, 3, 3), (1, 6, 1, 1, 1), (2, 6, 1, 3, 1), (1, 6, 5, 1, 2)], ids=str)
def test_smallest_inputs(backend, size):
    """An empty batch and planes or clips of one are valid, forward and backward."""
    ref, fused = pair(6, backend=backend, norm=None)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    draws = draws_for(fused, size[0])
    y = fused(x, draws)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if size[0]:
        assert_close(y, ref(x, draws))
    assert FusedDSTS(6, backend=backend).eval()(torch.randn(size)).shape == size
    if size[0] != 1:
        assert FusedDSTS(6, backend=backend)(torch.randn(size)).shape == size


def test_copies_and_state(backend):
    """deepcopy and a state_dict round trip give the same module; keys are those of the contract."""
    dsts = FusedDSTS(6, num_layers=1, num_neurons=2, backend=backend).eval()
    x = torch.randn(2, 6, 2, 3, 3)
    y = dsts(x)
    other = FusedDSTS(6, num_layers=1, num_neurons=2, backend=backend).eval()
    other.load_state_dict(dsts.state_dict())
    assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(dsts)(x), y)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["scoring", "gate", "spatial", "temporal", "mixing", *(f"norm.{n}" for n in norm)]
    assert list(dsts.state_dict()) == [f"layers.0.{n}" for n in names]


def test_reference_runs_the_same_weights_in_float32(backend):
    """The contract in the dtype users have: float32 against the float32 reference, same seed for the draws."""
    dsts = FusedDSTS(16, num_neurons=4, score_reduction="mean", backend=backend)
    ref = reference.DSTS(16, num_neurons=4, score_reduction="mean")
    ref.load_state_dict(dsts.state_dict())
    x = torch.randn(4, 16, 4, 7, 7)
    torch.manual_seed(11)
    mine = dsts(x)
    torch.manual_seed(11)
    assert_close(mine, ref(x))
