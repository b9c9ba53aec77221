"""What a monitor counts, against counting by hand; the balance term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsts_kernels import DSTSLayer, FusedDSTS, Routing
from dsts_kernels.functional import saturating_sigmoid
from dsts_kernels.learning import RoutingMonitor, balance_loss
from dsts_kernels.learning.health import SATURATION

from .support import Net, batch


def test_counts_are_those_of_the_routing():
    """Usage, entropy, dead neurons, saturated gates and spatial shares, over several passes and modes."""
    dsts = FusedDSTS(6, num_layers=2, num_neurons=4)
    with torch.no_grad():
        for layer in dsts.layers:
            layer.gate.normal_(std=3.0)
    monitor = RoutingMonitor(nn.Sequential(dsts), keep=True)
    seen = []
    for mode in (True, True, False):
        dsts.train(mode)
        seen.append(dsts(torch.randn(5, 6, 2, 3, 3), return_routing=True)[1].neuron)
    neuron = torch.cat(seen, 1)
    found = monitor.statistics()
    for index, layer in enumerate(dsts.layers):
        counts = torch.bincount(neuron[index], minlength=4)
        share = counts / 15
        assert torch.allclose(found.usage[index], share.double())
        entropy = -sum(p * math.log2(p) for p in share.tolist() if p)
        assert math.isclose(found.entropy[index].item(), entropy, rel_tol=1e-6)
        assert found.dead[index] == (counts == 0).sum() and found.samples[index] == 15
        soft = saturating_sigmoid(layer.gate.detach())
        assert math.isclose(found.saturated[index].item(), ((soft <= 0) | (soft >= 1)).double().mean().item())
        assert torch.allclose(found.spatial[index], (layer.gate > 0).double().mean(1))
    assert torch.equal(torch.stack([r.neuron for r in monitor.last]), seen[-1])

    monitor.reset()
    assert found.samples.tolist() == [15, 15] and monitor.statistics().samples.tolist() == [0, 0]
    monitor.enabled = False
    dsts(torch.randn(5, 6, 2, 3, 3))
    monitor.enabled = True
    monitor.remove()
    dsts(torch.randn(5, 6, 2, 3, 3))
    assert monitor.statistics().samples.tolist() == [0, 0]


def test_choices_without_noise():
    """Noise spreads samples over neurons that evaluation never takes: the monitor counts both, by the same scores."""
    dsts = FusedDSTS(4, num_layers=1, num_neurons=4, score_reduction="mean")
    layer = dsts.layers[0]
    with torch.no_grad():
        layer.scoring.zero_()
        layer.scoring[2] = 0.01  # the highest, by less than the noise
    monitor = RoutingMonitor(dsts)
    dsts(torch.rand(64, 4, 2, 3, 3))
    found = monitor.statistics()
    assert found.usage_without_noise.tolist() == [[0, 0, 1, 0]] and found.entropy_without_noise.tolist() == [0]
    assert found.dead_without_noise.tolist() == [3] and found.dead[0] == 0 and found.entropy[0] > 1.5
    monitor.reset()
    dsts.eval()(torch.rand(64, 4, 2, 3, 3))
    found = monitor.statistics()
    assert torch.equal(found.usage, found.usage_without_noise) and found.dead.tolist() == [3]


def test_choices_without_noise_are_centred():
    """Less the centre, where evaluation subtracts it."""
    dsts = FusedDSTS(4, num_layers=1, num_neurons=2, score_reduction="mean", score_center=True, gumbel_scale=0.0)
    layer = dsts.layers[0]
    with torch.no_grad():
        layer.scoring.zero_()
        layer.scoring[0], layer.scoring[1] = 1.0, 0.5  # the first is above on every sample
    monitor = RoutingMonitor(dsts)
    dsts(torch.rand(64, 1, 1, 1, 1).expand(64, 4, 2, 3, 3).contiguous())
    found = monitor.statistics()
    assert found.usage.tolist() == [[1, 0]] and 0.2 < found.usage_without_noise[0, 0] < 0.8


def test_gates_that_crossed():
    """Since the monitor was made, or since the start that a checkpoint brought."""
    dsts = FusedDSTS(4, num_layers=2, num_neurons=2)
    monitor = RoutingMonitor(dsts)
    assert monitor.statistics().flipped.tolist() == [[0, 0], [0, 0]]
    before = [gate.clone() for gate in monitor.start]
    with torch.no_grad():
        dsts.layers[1].gate[0].neg_()
        dsts.layers[0].gate[1, :1].neg_()
    assert monitor.statistics().flipped.tolist() == [[0, 0.25], [1, 0]]
    assert all(torch.equal(a, b) for a, b in zip(before, monitor.start, strict=True))
    monitor.start = [layer.gate for layer in dsts.layers]
    assert monitor.statistics().flipped.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="start: got"):
        monitor.start = before[:1]


def test_saturation_is_where_the_gradient_ends():
    q = torch.tensor([SATURATION + 1e-3, SATURATION - 1e-3, -SATURATION - 1e-3], dtype=torch.float64)
    assert [0 < r < 1 for r in saturating_sigmoid(q).tolist()] == [False, True, False]


def test_counting_survives_inference_mode():
    """An evaluation under ``torch.inference_mode`` comes first; training counts on."""
    dsts = FusedDSTS(4, num_neurons=2)
    monitor = RoutingMonitor(dsts)
    with torch.inference_mode():
        dsts.eval()(torch.randn(3, 4, 2, 3, 3))
    dsts.train()(torch.randn(3, 4, 2, 3, 3)).sum().backward()
    with torch.inference_mode():
        dsts.eval()(torch.randn(3, 4, 2, 3, 3))
    assert monitor.statistics().samples.tolist() == [9, 9, 9]


def test_balance_loss():
    """1 where all is even, N where one neuron takes all; its gradient lowers the crowded neuron's scores."""
    even = Routing(torch.arange(4), torch.zeros(4, 4), torch.empty(0))
    assert balance_loss(even).item() == pytest.approx(1.0)
    crowded = Routing(torch.zeros(2, 6, dtype=torch.int64), torch.tensor([50.0, 0, 0]).expand(2, 6, 3), torch.empty(0))
    assert balance_loss(crowded).item() == pytest.approx(3.0)
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.2]], requires_grad=True)
    balance_loss(Routing(torch.zeros(2, dtype=torch.int64), scores, torch.empty(0))).backward()
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1] < 0).all()
    assert balance_loss(crowded, tau=1e4).item() == pytest.approx(1.0, abs=1e-2)


def test_balance_of_a_model():
    """The monitor's term is differentiable: only scoring kernels and what lies before them get its gradient."""
    net = Net()
    monitor = RoutingMonitor(net, keep=True)
    net(*batch(5)[0])
    monitor.balance().backward()
    assert net.dsts.layers[0].scoring.grad.abs().sum() > 0 and net.head.weight.grad is None


def test_bad_input():
    with pytest.raises(ValueError, match="Linear without"):
        RoutingMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[2, 3\] neurons"):
        RoutingMonitor(nn.Sequential(DSTSLayer(2, num_neurons=2), DSTSLayer(2, num_neurons=3)))
    with pytest.raises(RuntimeError, match="keep"):
        RoutingMonitor(FusedDSTS(2)).balance()
    with pytest.raises(ValueError, match="tau"):
        balance_loss(Routing(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2), torch.empty(0)), tau=0)


@pytest.mark.parametrize("options", [{}, {"score_center": True}, {"score_center": True, "center_in_training": True}])
def test_balance_of_evaluation(options):
    """Of the choices that evaluation would make of the same samples, noise apart and less the centre."""
    dsts = FusedDSTS(6, num_layers=2, num_neurons=4, score_reduction="mean", dtype=torch.float64, **options)
    dsts.set_noise(gumbel_scale=100.0)
    x = torch.randn(40, 6, 2, 3, 3, dtype=torch.float64)
    monitor = RoutingMonitor(dsts, keep=True)
    dsts(x)
    noisy, quiet = monitor.balance(), monitor.balance(evaluation=True)
    expected = []
    for layer, routing in zip(dsts.layers, monitor.last, strict=True):
        scores = routing.scores
        if options and not layer.center_in_training:
            scores = scores - layer.center
        expected.append(balance_loss(Routing(scores.argmax(1), scores, routing.gate)))
    assert torch.equal(quiet, torch.stack(expected).mean()) and quiet != noisy
    (gradient,) = torch.autograd.grad(quiet, dsts.layers[0].scoring)
    assert gradient.norm() > 0
    alone = dsts.layers[0]
    before = None if alone.center is None else alone.center.clone()
    with torch.no_grad():
        chosen = alone.evaluation_scores(monitor.last[0].scores).argmax(1)
        if not options:  # the centre goes on moving with each pass
            assert torch.equal(chosen, alone.eval()(x, return_routing=True)[1].neuron)
    assert before is None or torch.equal(before, alone.center)
