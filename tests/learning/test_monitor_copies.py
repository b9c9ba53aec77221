"""Monitors and hooks beside copies: each counts for its own model, everything can be saved, nothing stays behind."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dsts_kernels import DSTSLayer, FusedDSTS
from dsts_kernels.learning import RoutingMonitor

from .support import Net, batch


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


COPIES = [copy.deepcopy, through_pickle, through_torch]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("copied", [*COPIES, AveragedModel])
def test_a_copy_counts_for_nobody(copied, keep):
    """Also after a training pass, whose graph a monitor may keep; the copy is free for a monitor of its own."""
    net = Net()
    monitor = RoutingMonitor(net, keep=keep)
    net(*batch(5)[0])
    other = copied(net)
    other(*batch(3)[0])
    assert monitor.statistics().samples.tolist() == [5, 5]
    mine = RoutingMonitor(other)
    other(*batch(4)[0])
    net(*batch(2)[0])
    assert mine.statistics().samples.tolist() == [4, 4]
    assert monitor.statistics().samples.tolist() == [7, 7]


def test_an_average_of_weights():
    """EMA of a model under a monitor: its updates and passes are as without."""
    net = Net()
    plain = AveragedModel(copy.deepcopy(net))
    monitor = RoutingMonitor(net, keep=True)
    average = AveragedModel(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    for one in (average, plain):
        one.update_parameters(net)
    for a, b in zip(average.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    x = batch(3)[0][:1]
    assert torch.equal(average.eval()(*x), plain.eval()(*x))
    assert monitor.statistics().samples.tolist() == [0, 0]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("copied", COPIES)
def test_model_and_monitor_in_one(copied, order):
    """The copy of the monitor watches the copy of the model, from the same counts, in either order and on request."""
    net = Net()
    monitor = RoutingMonitor(net, keep=True)
    net(*batch(5)[0])
    pair = copied((net, monitor) if order == 0 else (monitor, net))
    other, mine = pair[order], pair[1 - order]
    other(*batch(3)[0])
    assert mine.statistics().samples.tolist() == [8, 8] and monitor.statistics().samples.tolist() == [5, 5]
    assert len(mine.last) == 2 and mine.last[0].neuron.shape == (3,)
    assert all(a is b for a, b in zip(mine.layers.values(), other.dsts.layers, strict=True))
    mine.remove()
    assert hooks(other) == 0 and hooks(net) == 2
    other(*batch(3)[0])
    assert mine.statistics().samples.tolist() == [8, 8]
    mine.enabled = False
    with mine:
        other(*batch(3)[0])
    assert mine.statistics().samples.tolist() == [8, 8]


@pytest.mark.parametrize("copied", COPIES)
def test_a_monitor_by_itself(copied):
    """What it counted is there, also once it was removed; nothing of it reaches the original."""
    net = Net()
    monitor = RoutingMonitor(net)
    net(*batch(5)[0])
    for removed in (False, True):
        mine = copied(monitor)
        for found, expected in zip(mine.statistics(), monitor.statistics(), strict=True):
            assert torch.equal(found, expected)
        net(*batch(2)[0])
        mine.reset()
        assert monitor.statistics().samples.tolist() == [7, 7]
        if not removed:
            monitor.remove()


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", [FusedDSTS, DSTSLayer])
def test_a_model_that_holds_its_monitor(copied, kind):
    """As an attribute of the very module that it watches, whose copy is under construction meanwhile."""
    net = kind(6, num_neurons=3)
    net.monitor = RoutingMonitor(net)
    other = copied(net)
    other.eval()(torch.randn(2, 6, 2, 3, 3), return_routing=True)
    assert set(other.monitor.statistics().samples.tolist()) == {2}
    assert set(net.monitor.statistics().samples.tolist()) == {0}


def test_nothing_stays():
    """After ``remove``, after a block, after an error in it: the model is as before. A block puts hooks back."""
    net = Net()
    before = copy.deepcopy(net.__dict__["_forward_hooks"])
    monitor = RoutingMonitor(net)
    assert hooks(net) == 2
    monitor.remove()
    monitor.remove()
    assert hooks(net) == 0 and net._forward_hooks == before
    with pytest.raises(ZeroDivisionError), RoutingMonitor(net) as monitor:
        net(*batch(5)[0])
        assert hooks(net) == 2
        raise ZeroDivisionError
    assert hooks(net) == 0
    net(*batch(5)[0])
    assert monitor.statistics().samples.tolist() == [5, 5]
    with monitor:
        net(*batch(1)[0])
    assert hooks(net) == 0 and monitor.statistics().samples.tolist() == [6, 6]


def test_forget():
    net = Net()
    with RoutingMonitor(net, keep=True) as monitor:
        net(*batch(2)[0])
    assert monitor.last[0].scores.grad_fn is not None
    monitor.forget()
    with pytest.raises(RuntimeError, match="last"):
        monitor.last  # noqa: B018
