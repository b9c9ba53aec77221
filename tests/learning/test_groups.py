"""Groups of rates: gates apart from scoring kernels, whatever a user wraps round them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from dsts_kernels import reference
from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, upstream_groups, upstream_parameters

from .support import Net, batch


def test_gates_and_scores_apart():
    """Two groups that are the upstream side, with their rates and what both share."""
    net = Net()
    scores, gates = upstream_groups(net, 0.1, 0.5, weight_decay=0.0)
    assert [id(p) for p in scores["params"]] == [id(layer.scoring) for layer in net.dsts.layers]
    assert [id(p) for p in gates["params"]] == [id(layer.gate) for layer in net.dsts.layers]
    assert (scores["lr"], gates["lr"]) == (0.1, 0.5) and scores["weight_decay"] == gates["weight_decay"] == 0.0
    assert [group["lr"] for group in upstream_groups(net, 0.1)] == [0.1, 0.1]
    net.dsts.layers[0].gate.requires_grad_(False)
    assert len(upstream_groups(net, 0.1, 0.5)[1]["params"]) == 1
    for layer in net.dsts.layers:
        layer.scoring.requires_grad_(False)
    (gates,) = upstream_groups(net, 0.1, 0.5)
    assert gates["params"] == [net.dsts.layers[1].gate]
    assert len(upstream_groups(reference.DSTS(4), 0.1)[1]["params"]) == 3


def test_wrapped_weights_and_others_upstream():
    """A parametrized gate, a pruned scoring kernel, and a module with an upstream side of its own."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def upstream_parameters(self) -> list[nn.Parameter]:
            return [self.weight]

    net = Net()
    net.router = Router()
    parametrizations.weight_norm(net.dsts.layers[0], "gate")
    prune.l1_unstructured(net.dsts.layers[1], "scoring", 0.5)
    scores, gates = upstream_groups(net, 0.1, 0.5)
    names = {id(p): name for name, p in net.named_parameters()}
    assert [names[id(p)] for p in gates["params"]] == [
        "dsts.layers.0.parametrizations.gate.original0",
        "dsts.layers.0.parametrizations.gate.original1",
        "dsts.layers.1.gate",
    ]
    assert "router.weight" in {names[id(p)] for p in scores["params"]}
    both = {id(p) for group in (scores, gates) for p in group["params"]}
    assert both == set(map(id, upstream_parameters(net)))


def test_algorithm_1_takes_them():
    """Gates move at their own rate."""
    net = Net()
    learner = UpstreamDownstream(
        net,
        F.cross_entropy,
        upstream_optimizer=torch.optim.SGD(upstream_groups(net, 0.0, 0.5)),
        downstream_optimizer=torch.optim.SGD(downstream_parameters(net), 0.1),
    )
    before = [p.detach().clone() for p in upstream_parameters(net)]
    learner.step(batch(8), batch(8))
    moved = [not torch.equal(p, old) for p, old in zip(upstream_parameters(net), before, strict=True)]
    assert moved == [False, True, False, True]
    learner.load_state_dict(learner.state_dict())


def test_bad_rates():
    with pytest.raises(ValueError, match="rate: got -1"):
        upstream_groups(Net(), -1)
    with pytest.raises(ValueError, match="gate_rate: got inf"):
        upstream_groups(Net(), 1, float("inf"))
