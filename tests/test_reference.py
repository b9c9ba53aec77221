"""The yardstick itself: the reference against the formulas written out by hand, and what it may import."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels import reference
from dsts_kernels.testing import assert_close


def test_imports_nothing_of_the_package():
    """A yardstick that shares code with what it measures would agree with its mistakes."""
    tree = ast.parse(inspect.getsource(reference))
    modules = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(getattr(node, "level", 0) == 0 for node in modules)
    names = [a.name for n in modules if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in modules if isinstance(n, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("dsts_kernels")]


def test_gate_by_hand():
    """q = 0 is closed; r is linear in the sigmoid between its ends; the hard gradient is the soft one's."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 9.0]], dtype=torch.float64, requires_grad=True)
    hard = reference.gate_values(logits, None, None)
    assert hard.tolist() == [[0, 1, 0, 1]]
    s = torch.sigmoid(logits.detach())
    expected = 1.2 * s * (1 - s)
    expected[0, 3] = 0  # saturated: r = min(1, 1.0998...)
    assert_close(torch.autograd.grad(hard.sum(), logits)[0], expected)
    soft = reference.gate_values(logits, None, torch.tensor([False]))
    assert_close(soft, torch.tensor([[0.5, 1.2 * s[0, 1] - 0.1, 1.2 * s[0, 2] - 0.1, 1.0]], dtype=torch.float64))


def test_layer_by_hand():
    """One sample, one layer, training, spelled out from section 1 with no module in sight."""
    layer = reference.DSTSLayer(4, num_neurons=3, norm=None, activation=None, dtype=torch.float64)
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64)
    noise, gumbel = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64) * 100
    draws = reference.Draws(noise, torch.tensor([True]), gumbel)
    out, routing = layer(x, draws, return_routing=True)

    v = torch.stack([F.conv3d(x, layer.scoring[i]).sum() for i in range(3)])
    a = int((v + gumbel[0]).argmax())
    b = (layer.gate[a] + noise[0] > 0).double()[None, :, None, None, None]
    z = F.conv3d(b * x, layer.spatial[a], padding=(0, 1, 1))
    z = z + F.conv3d((1 - b) * x, layer.temporal[a], padding=(1, 0, 0))
    assert int(routing.neuron) == a
    assert_close(routing.scores[0], v)
    assert_close(out, F.conv3d(z, layer.mixing[a]))


@pytest.mark.parametrize("routing_gradient", ["selected", "all"])
def test_router_gradient_by_hand(routing_gradient):
    """d loss / d v through the softmax: <dz', z'> of the chosen neuron, or of every neuron."""
    layer = reference.DSTSLayer(
        3, num_neurons=3, norm=None, activation=None, gumbel_tau=0.7, score_reduction="mean",
        routing_gradient=routing_gradient, dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(2, 3, 2, 3, 3, dtype=torch.float64)
    draws = reference.Draws(
        torch.randn(2, 3, dtype=torch.float64), torch.tensor([True, False]), torch.randn(2, 3, dtype=torch.float64)
    )
    out, routing = layer(x, draws, return_routing=True)
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, routing.scores, grad)

    y = torch.softmax((routing.scores + draws.gumbel) / 0.7, dim=1).detach()
    expected = torch.zeros_like(y)
    for b in range(2):
        products = torch.zeros(3, dtype=torch.float64)
        for i in range(3):
            gate = reference.gate_values(layer.gate[i : i + 1], draws.noise[b : b + 1], draws.hard[b : b + 1])
            z = layer.neuron_output(i, x[b : b + 1], gate)
            products[i] = (grad[b] * z[0]).sum()
        if routing_gradient == "selected":
            products = torch.where(torch.arange(3) == routing.neuron[b], products, 0.0)
        expected[b] = y[b] * (products - (y[b] * products).sum()) / 0.7
    assert_close(dv, expected)
    assert dv.norm() > 0


def test_sampled_draws():
    """Exactly half of an even batch is hard, an odd one differs by a coin, the scale is the one asked for."""
    draws = reference.sample_draws(torch.zeros(7, 300, 1, 1, 1), 40, 5, 0.25, 0.5)
    assert set(draws.hard.sum(1).tolist()) == {3, 4}
    assert abs(float(draws.noise.std()) - 0.25) < 0.01
    assert abs(float(draws.gumbel.mean()) - 0.5772) < 0.15
