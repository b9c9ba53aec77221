"""torch.compile sees one op where there is one: whole graphs, forward and backward, for every public op."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS, functional, reference
from dsts_kernels.ops import mixing_conv3d, tap_sums
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def operands():
    x = torch.randn(3, 6, 2, 4, 5, requires_grad=True)
    gate = torch.rand(3, 6).round().requires_grad_()
    neuron = torch.tensor([0, 1, 0])
    return x, gate, neuron


OPS = {
    "saturating_sigmoid": lambda x, gate, neuron: functional.saturating_sigmoid(x),
    "semhash_gate": lambda x, gate, neuron: functional.semhash_gate(
        gate, torch.zeros(3, 6), torch.tensor([True, False, True]), neuron=neuron
    ),
    "tap_sums": lambda x, gate, neuron: tap_sums(x, 9),
    "relevance_scores": lambda x, gate, neuron: functional.relevance_scores(x, torch.ones(2, 4, 6, 1, 3, 3)),
    "gated_conv3d": lambda x, gate, neuron: functional.gated_conv3d(
        x, gate, neuron, torch.ones(2, 4, 6, 1, 3, 3), torch.ones(2, 4, 6, 3, 1, 1)
    ),
    "mixing_conv3d": lambda x, gate, neuron: mixing_conv3d(x, neuron, torch.ones(2, 6, 6, 1, 3, 3)),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op_is_one_graph(op):
    """Values and gradients of the compiled op are those of the op, with no graph break."""
    x, gate, neuron = operands()
    eager = op(x, gate, neuron)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(x, gate, neuron)
    assert_close(compiled, eager)
    used = [
        t for t in (x, gate) if torch.autograd.grad(eager.sum(), t, retain_graph=True, allow_unused=True)[0] is not None
    ]
    for mine, theirs in zip(
        torch.autograd.grad(compiled.sum(), used), torch.autograd.grad(eager.sum(), used), strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("routing_gradient", ["selected", "all"])
def test_module_trains_compiled(routing_gradient):
    """The whole module, forward and backward, in one graph through the default compiler."""
    dsts = FusedDSTS(6, num_layers=2, num_neurons=2, score_reduction="mean", routing_gradient=routing_gradient)
    x, draws = torch.randn(3, 6, 2, 4, 5), sample_draws(3, 6, 2, 2)
    compiled = torch.compile(dsts, fullgraph=True)
    results = []
    for module in (dsts, compiled):
        dsts.zero_grad()
        y, routing = module(x, draws, return_routing=True)
        y.square().sum().backward()
        results.append([y, routing.scores, *(p.grad for p in dsts.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, factor=10)
    assert compiled(x).shape == x.shape


def test_frozen_compiles():
    """A frozen module is one graph too."""
    fast = FusedDSTS(6, num_neurons=2).eval().freeze()
    x = torch.randn(2, 6, 2, 4, 5)
    assert_close(torch.compile(fast, fullgraph=True)(x), fast(x))


def test_dynamic_shapes():
    """One graph for clips of any size: every gradient is that of float64, whatever the shape."""
    options = dict(num_layers=2, num_neurons=3, score_reduction="mean", dtype=torch.float64)
    dsts, literal = FusedDSTS(16, **options), reference.DSTS(16, **options)
    literal.load_state_dict(dsts.state_dict())
    compiled = torch.compile(dsts, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((2, 16, 4, 7, 7), (3, 16, 4, 6, 5), (5, 16, 2, 8, 8), (4, 16, 3, 7, 9), (6, 16, 8, 5, 5)):
        x, draws = torch.randn(size, dtype=torch.float64), sample_draws(size[0], 16, 3, 2, dtype=torch.float64)
        for run, module in ((compiled, dsts), (literal, literal)):
            module.zero_grad()
            run(x, draws).square().sum().backward()
        for (name, p), q in zip(dsts.named_parameters(), literal.parameters(), strict=True):
            assert_close(p.grad, q.grad, name=f"{size}: gradient of {name}", factor=100)
