"""Upstream or downstream, by name: a partition of the parameters whatever a user wraps around weights and model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel

from dsts_kernels import FusedDSTS, learning, reference
from dsts_kernels.learning import UpstreamDownstream
from dsts_kernels.viz.checkpoint import find_gates

OLD = pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")


class Scaled(nn.Module):
    """A parametrization with parameters of its own, one of which is called as ours are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.gate * weight


def each(dsts: nn.Module, wrap) -> None:
    """``wrap(layer, name)`` for the gate and the scoring kernels of the first layer, and for an operator of it."""
    for name in ("gate", "scoring", "spatial"):
        wrap(dsts.layers[0], name)


def tie(dsts: nn.Module) -> None:
    dsts.layers[1].gate = dsts.layers[0].gate


def tie_across(dsts: nn.Module) -> None:
    """Scoring and mixing kernels of 1x1x1 have one shape; where the first name is downstream it is upstream still."""
    dsts.layers[0].mixing = dsts.layers[1].scoring


def share(dsts: nn.Module) -> None:
    dsts.layers[1] = dsts.layers[0]


CHANGES = {
    "nothing": lambda dsts: None,
    "parametrization": lambda dsts: each(dsts, lambda m, n: parametrize.register_parametrization(m, n, Scaled())),
    "two parametrizations": lambda dsts: [
        each(dsts, lambda m, n: parametrize.register_parametrization(m, n, Scaled())) for _ in range(2)
    ],
    "weight norm": lambda dsts: each(dsts, parametrizations.weight_norm),
    "old weight norm": lambda dsts: each(dsts, old_weight_norm),
    "spectral norm": lambda dsts: each(dsts, parametrizations.spectral_norm),
    "old spectral norm": lambda dsts: each(dsts, old_spectral_norm),
    "pruning": lambda dsts: each(dsts, lambda m, n: prune.l1_unstructured(m, n, amount=0.5)),
    "shared layers": share,
    "tied gates": tie,
    "tied sides": tie_across,
}


def expected(dsts: nn.Module) -> set[str]:
    """Names of upstream parameters, told by other means: what a gradient of scores and gates alone reaches.

    Also through the ``state_dict``: names hold ``scoring`` or ``gate``, but for the parts of an operator.
    """
    return {
        name
        for name, _ in dsts.named_parameters(remove_duplicate=False)
        if ("scoring" in name or "gate" in name) and "spatial" not in name
    }


@OLD
@pytest.mark.parametrize("kind", [FusedDSTS, reference.DSTS])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_by_name(kind, change):
    dsts = kind(6, num_layers=2, num_neurons=3)
    change(dsts)
    names = expected(dsts)
    wanted = {id(p) for name, p in dsts.named_parameters(remove_duplicate=False) if name in names}
    for upstream, downstream in (
        (dsts.upstream_parameters(), dsts.downstream_parameters()),
        (learning.upstream_parameters(dsts), learning.downstream_parameters(dsts)),
    ):
        every = list(map(id, dsts.parameters()))
        assert [i for i in every if i in wanted] == list(map(id, upstream))
        assert [i for i in every if i not in wanted] == list(map(id, downstream))
        assert len(upstream) + len(downstream) == len(every)
        assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in upstream)
        torch.optim.SGD(upstream, 0.1), torch.optim.SGD(downstream, 0.1)


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.compile, AveragedModel, copy.deepcopy])
def test_within_other_modules(wrap):
    """A wrapper's names differ, its sides do not; inside and outside give the same parameters."""
    net = wrap(nn.Sequential(nn.Conv3d(3, 6, 1), FusedDSTS(6, num_layers=2, num_neurons=3)))
    inside = next(part for part in net.modules() if isinstance(part, FusedDSTS))
    assert len(inside.upstream_parameters()) == 4
    assert list(map(id, learning.upstream_parameters(net))) == list(map(id, inside.upstream_parameters()))
    assert len(learning.downstream_parameters(net)) == 2 + len(inside.downstream_parameters())


def test_a_layer_compiled_by_itself():
    for kind in (FusedDSTS, reference.DSTS):
        dsts = kind(6, num_layers=2, num_neurons=3)
        dsts.layers[0] = torch.compile(dsts.layers[0])
        assert len(dsts.upstream_parameters()) == 4


def test_another_implementation_says_itself():
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chooser, self.rest = nn.Linear(2, 2), nn.Linear(2, 2)

        def upstream_parameters(self) -> list:
            return list(self.chooser.parameters())

    net = nn.Sequential(Other())
    assert list(map(id, learning.upstream_parameters(net))) == list(map(id, net[0].chooser.parameters()))


@OLD
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_step_of_algorithm_1(change):
    """Every parameter moves, each by its side's optimizer."""
    dsts = FusedDSTS(6, num_layers=2, num_neurons=1, norm=None, score_reduction="mean")
    change(dsts)
    net = nn.Sequential(dsts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 4))
    up, down = learning.upstream_parameters(net), learning.downstream_parameters(net)
    before = [p.detach().clone() for p in net.parameters()]
    learner = UpstreamDownstream(
        net,
        F.cross_entropy,
        upstream_optimizer=torch.optim.SGD(up, 0.0),
        downstream_optimizer=torch.optim.SGD(down, 1.0),
    )
    batch = torch.randn(8, 6, 2, 4, 4), torch.arange(8) % 4
    learner.step(batch, batch)
    for (name, p), old in zip(net.named_parameters(), before, strict=True):
        assert torch.equal(p, old) == any(p is q for q in up), name


def test_gates_of_a_state_that_does_not_hold_them():
    """Figures of a checkpoint need the gates, not what they are computed from."""
    for change in ("parametrization", "pruning", "weight norm"):
        dsts = FusedDSTS(6, num_layers=2, num_neurons=3)
        CHANGES[change](dsts)
        with pytest.raises(ValueError, match=r"state: got .*gate.*wanted the gate itself"):
            find_gates(nn.Sequential(dsts).state_dict())
