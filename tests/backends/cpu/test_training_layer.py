"""A layer in training, in one step of autograd: the bits of the single ops forward, their gradients backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dsts_kernels import Draws, DSTSLayer, ops
from dsts_kernels.backends import BACKENDS, use_backend
from dsts_kernels.ops.training_layer import TrainingLayer
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from ...support.profiling import profile
from .support import LAYOUTS, filled

CPU = BACKENDS["cpu"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = ("scoring", "gate", "spatial", "temporal", "mixing")
OPTIONS = {
    "default": {},
    "mean-1x3x3": dict(scoring_kernel=(1, 3, 3), scoring_width=2, score_reduction="mean"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3), gumbel_tau=0.5),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "no-norm": dict(norm=None, num_neurons=1),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """One entry for each layer that ran in one step."""
    seen: list[int] = []
    real = TrainingLayer.apply
    monkeypatch.setattr(TrainingLayer, "apply", lambda *args: seen.append(1) or real(*args))
    return seen


def drawn(layer: DSTSLayer, x: Tensor) -> Draws:
    sampled = sample_draws(
        *x.shape[:2], layer.num_neurons, 1, noise_std=1.0, hard_fraction=0.5, device=x.device, dtype=x.dtype
    )
    return Draws(*(field[0] for field in sampled))


def small_scores(layer: DSTSLayer) -> DSTSLayer:
    """Scores of size one: a softmax that saturates leaves no gradient."""
    layer.scoring.data.mul_(0.05)
    return layer


def step(layer: DSTSLayer, x: Tensor, draws: Draws, factors: list[Tensor]) -> list[Tensor | None]:
    """Output, scores, gates, and the gradients of all that has one."""
    layer.zero_grad()
    leaf = x.detach().requires_grad_(x.requires_grad)
    y, routing = layer(leaf, draws, return_routing=True)
    results = [y, routing.scores, routing.gate]
    sum((r * f).sum() for r, f in zip(results, factors, strict=True) if r.requires_grad).backward()
    return [*results, routing.neuron, leaf.grad, *(p.grad for p in layer.parameters())]


def compare(monkeypatch, asked: list[int], layer: DSTSLayer, x: Tensor, used=(1, 1, 1)) -> None:
    """One step of each way, with a loss of the results that are ``used``."""
    draws, batch = drawn(layer, x), x.shape[0]
    shapes = ((batch, layer.out_channels, *x.shape[2:]), (batch, layer.num_neurons), x.shape[:2])
    factors = [(torch.randn(shape) * u).to(x.dtype) for shape, u in zip(shapes, used, strict=True)]
    before = len(asked)
    ours = step(layer, x, draws, factors)
    assert len(asked) == before + 1
    with monkeypatch.context() as patch:
        patch.setattr(CPU, "one_call", False)
        theirs = step(layer, x, draws, factors)
    assert len(asked) == before + 1
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert a.dtype == b.dtype and a.stride() == b.stride() and a.requires_grad == b.requires_grad, i
            if i < 4:
                assert torch.equal(a, b), i
            else:
                assert_close(a, b, name=str(i), factor=2)  # the softmax's gradient is written out


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_same_as_by_steps(monkeypatch, asked, name, dtype):
    layer = small_scores(DSTSLayer(11, 9, dtype=dtype, **dict(num_neurons=3) | OPTIONS[name]))
    compare(monkeypatch, asked, layer, torch.randn(5, 11, 2, 4, 3).to(dtype).requires_grad_())


def test_whatever_needs_a_gradient(monkeypatch, asked):
    layer = small_scores(DSTSLayer(6, num_neurons=2))
    for needs in itertools.product((True, False), repeat=1 + len(WEIGHTS)):
        if any(needs):
            for name, need in zip(WEIGHTS, needs[1:], strict=True):
                getattr(layer, name).requires_grad_(need)
            compare(monkeypatch, asked, layer, torch.randn(3, 6, 1, 3, 3).requires_grad_(needs[0]))


@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["output", "scores", "gates"])
def test_results_alone(monkeypatch, asked, used):
    compare(monkeypatch, asked, small_scores(DSTSLayer(6)), torch.randn(3, 6, 1, 3, 3).requires_grad_(), used)


def test_gates_alone_leave_other_gradients_out(asked):
    """Nothing is computed for what no loss reached."""
    layer, x = DSTSLayer(6, norm=None), torch.randn(2, 6, 1, 3, 3, requires_grad=True)
    layer(x, return_routing=True)[1].gate.sum().backward()
    assert asked and layer.gate.grad is not None
    assert all(p.grad is None for p in (x, layer.scoring, layer.spatial, layer.temporal, layer.mixing))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(monkeypatch, asked, layout):
    """Features in any strides, and weights with gaps."""
    layer = small_scores(DSTSLayer(18, 11, num_neurons=2))
    layer.spatial.data = torch.randn(2, 11, 36, 1, 3, 3)[:, :, ::2]
    layer.gate.data = torch.randn(36, 2).t()[:, ::2]
    compare(monkeypatch, asked, layer, filled((2, 18, 3, 5, 7), torch.float32, layout).requires_grad_())


def test_an_empty_batch(monkeypatch, asked):
    compare(monkeypatch, asked, DSTSLayer(6, norm=None), torch.randn(0, 6, 2, 3, 3).requires_grad_())


def whole(layer: DSTSLayer, x: Tensor, **options) -> tuple | None:
    return ops.training_layer(x, *(getattr(layer, name) for name in WEIGHTS), drawn(layer, x), **options)


def test_where_single_ops_run():
    """Where no derivative is wanted, autocast is on, something listens, or the backend has no such step."""
    layer, x = DSTSLayer(8, num_neurons=2), torch.randn(2, 8, 2, 3, 3)
    assert whole(layer, x) is not None
    assert whole(layer, x, backend="eager") is None
    with torch.no_grad():
        assert whole(layer, x) is None
    with torch.autocast("cpu"):
        assert whole(layer, x) is None
    with profile():
        assert whole(layer, x) is None
    layer.mixing.data = torch.randn(2, 8, 7, 1, 1, 1)
    assert whole(layer, x) is None


@pytest.mark.parametrize("options", [dict(routing_gradient="all"), dict(norm=None, activation=None)], ids=str)
def test_layers_of_steps(asked, options):
    """All neurons weigh in, or the result belongs to whoever gets it."""
    y = DSTSLayer(6, num_neurons=2, **options)(torch.randn(2, 6, 1, 3, 3))
    (y.mul_(2) if "norm" in options else y).sum().backward()
    assert not asked


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
def test_a_second_derivative(asked, gaps):
    """Through the ops of the single steps: the first with a graph, the second refused by the op that has none."""
    layer, x = small_scores(DSTSLayer(6, num_neurons=2)), torch.randn(2, 6, 1, 3, 3, requires_grad=True)
    if gaps:
        layer.spatial.data = torch.randn(2, 6, 12, 1, 3, 3)[:, :, ::2]
    draws, wanted = drawn(layer, x), [x, layer.scoring, layer.gate, layer.spatial, layer.temporal, layer.mixing]
    plain = torch.autograd.grad(layer(x, draws).square().sum(), wanted)
    found = torch.autograd.grad(layer(x, draws).square().sum(), wanted, create_graph=True)
    assert len(asked) == 2
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        found[0].sum().backward()


def test_batched_gradients(asked):
    """``is_grads_batched`` runs the backward pass under vmap."""
    layer, x = small_scores(DSTSLayer(6, num_neurons=2)), torch.randn(2, 6, 1, 3, 3, requires_grad=True)
    y = layer(x, drawn(layer, x))
    several = torch.randn(3, *y.shape)
    wanted = [x, layer.mixing, layer.scoring]
    found = torch.autograd.grad(y, wanted, several, is_grads_batched=True, retain_graph=True)
    assert asked
    for i, grad in enumerate(several):
        for a, b in zip(found, torch.autograd.grad(y, wanted, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_another_backend_for_the_backward_pass(monkeypatch, asked):
    """A block around ``backward()`` counts."""
    layer, x = DSTSLayer(6, num_neurons=2), torch.randn(2, 6, 1, 3, 3, requires_grad=True)
    y, seen = layer(x), []
    eager = BACKENDS["eager"]
    real = eager.gated_conv3d_backward
    monkeypatch.setattr(eager, "gated_conv3d_backward", lambda *args: seen.append(1) or real(*args))
    with use_backend("eager"):
        y.sum().backward()
    assert asked and seen
