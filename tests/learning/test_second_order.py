"""Line 6 differentiated through line 4: exact, or a central difference where ops have no second derivative."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsts_kernels import reference
from dsts_kernels.learning import UpstreamDownstream

from .support import RATE, Net, batch, learner, sgd


class Smooth(nn.Module):
    """``loss = (u * d * x - y)^2``: every derivative is known."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.d = nn.Parameter(torch.tensor([1.1, 0.3], dtype=torch.float64))

    def upstream_parameters(self) -> list[nn.Parameter]:
        return [self.u]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.u * self.d * x


@pytest.mark.parametrize("exact", [True, False])
def test_second_order(exact):
    """Line 6 differentiated through line 4: the derivative of the whole composition, exact or as a difference."""
    net = Smooth()
    train, val = ((torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)) for _ in range(2))
    u, d = net.u.detach().clone().requires_grad_(), net.d.detach().clone()
    inner = d.clone().requires_grad_()
    step = torch.autograd.grad(F.mse_loss(u * inner * train[0], train[1]), inner, create_graph=True)[0]
    loss = F.mse_loss(u * (d - RATE * step) * val[0], val[1])
    expected = u.detach() - RATE * torch.autograd.grad(loss, u)[0]
    steps = UpstreamDownstream(net, F.mse_loss, **sgd(net), second_order=True)
    steps.exact_second_order = exact
    steps.step(train, val)
    torch.testing.assert_close(net.u.detach(), expected, rtol=1e-12 if exact else 1e-4, atol=0)


def test_second_order_of_our_ops_is_a_difference():
    """Ops without a second derivative fall back; the literal module's are exact, and both agree.

    Where scores depend on ``d`` they do not: a straight-through estimate is no function's derivative.
    """
    options = {"num_layers": 1, "num_neurons": 2, "norm": None, "activation": None, "routing_gradient": "selected"}
    net = Net(**options)
    net.stem.requires_grad_(False)
    literal = copy.deepcopy(net)
    literal.dsts = reference.DSTS(6, dtype=torch.float64, **options)
    literal.load_state_dict(net.state_dict())
    train, val = (batch(3, layers=1, neurons=2) for _ in range(2))
    for inputs, _ in (train, val):
        inputs[2].fill_(False)
    mine, theirs = learner(net, second_order=True), learner(literal, second_order=True)
    first = copy.deepcopy(net)
    learner(first).step(train, val)
    mine.step(train, val)
    theirs.step(train, val)
    assert not mine.exact_second_order and theirs.exact_second_order
    gates = [m.dsts.layers[0].gate for m in (net, literal, first)]
    term = (gates[2] - gates[1]).norm()
    assert term > 0 and (gates[0] - gates[1]).norm() < 1e-3 * term
