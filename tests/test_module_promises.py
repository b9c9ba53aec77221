"""What the module promises besides its numbers: shapes, formats, seeds, state, and what it does not compute."""

from __future__ import annotations

import copy

import pytest
import torch

from dsts_kernels import DSTSLayer, FusedDSTS, reference
from dsts_kernels.backends import convolution
from dsts_kernels.testing import assert_close

from .support.modules import assert_same_gradients, draws_for, pair, reference_step, training_step

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("routing_gradient", ["selected", "all"])
def test_one_sample_and_a_contiguous_gradient(backend, routing_gradient):
    """A batch of one through BatchNorm with nothing after it: its backward must see the strides there are."""
    ref, fused = pair(
        16, torch.float64, backend, activation=None, skip=False, num_layers=1, routing_gradient=routing_gradient
    )
    x, grad = torch.randn(2, 1, 16, 4, 7, 7, dtype=torch.float64)
    draws = draws_for(ref, x, torch.float64)
    wanted = reference_step(ref, x, draws, grad)[2]
    # One sample's norm leaves the router no gradient but rounding.
    assert_same_gradients(training_step(fused, x, draws, grad)[2], wanted, torch.float64, 100, leave_out="scoring")


def test_float64_stays_float64_under_autocast(backend):
    """As everywhere in torch, autocast leaves double precision alone."""
    ref, fused = pair(8, torch.float64, backend, norm=None)
    x = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused.eval()(x)
    assert ours.dtype == torch.float64
    assert_close(ours, ref.eval()(x))


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
    ours = dsts(x)
    torch.manual_seed(11)
    assert_close(ours, ref(x))
