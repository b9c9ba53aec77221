"""Samples that share a convolution: each is in one group, whose lists have all of its channels and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends.groups import CALL_POSITIONS, DIRECT_COSTS, WINOGRAD_COSTS, Costs, group_samples

COSTS = pytest.mark.parametrize("costs", [DIRECT_COSTS, WINOGRAD_COSTS], ids=["direct", "winograd"])


def gates(batch: int, neurons: int, channels: int, flipped: float) -> tuple[Tensor, Tensor]:
    """Gates of random neurons, of which each sample has some flipped, and the neurons."""
    neuron = torch.randint(neurons, (batch,))
    gate = (torch.rand(neurons, channels) < 0.5).float()[neuron]
    return torch.where(torch.rand(batch, channels) < flipped, 1 - gate, gate), neuron


def price(count: int, spatial: int, temporal: int, positions: int, outputs: int, costs: Costs) -> float:
    taps = costs.spatial * spatial + costs.temporal * temporal
    return taps * (count * positions + costs.weight_positions) + costs.call / outputs


@COSTS
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(
    ("batch", "neurons", "channels", "flipped", "soft"),
    [
        (1, 3, 9, 0.3, False),
        (7, 2, 20, 0.0, False),
        (32, 4, 33, 0.05, False),
        (32, 4, 64, 0.4, True),
        (9, 1, 1, 0, True),
    ],
)
def test_groups(costs, limited, batch, neurons, channels, flipped, soft):
    gate, neuron = gates(batch, neurons, channels, flipped)
    if soft:
        gate[torch.rand(batch, channels) < 0.2] = 0.3
        gate[0, 0] = float("nan")  # in both lists
    positions, seen, spent = 1500, [], 0.0
    for group in group_samples(gate, neuron, neurons, positions, channels, costs, limited):
        samples = torch.arange(batch) if group.samples is None else group.samples
        assert torch.equal(samples, samples.sort().values) and (neuron[samples] == group.neuron).all()
        assert not limited or len(samples) <= max(1, CALL_POSITIONS // positions)
        sides = (gate[samples] != 0).any(0), (gate[samples] != 1).any(0)
        for listed, side in zip((group.spatial, group.temporal), sides, strict=True):
            assert listed.dtype == torch.int32 and listed.tolist() == side.nonzero()[:, 0].tolist()
        assert group.scaled == bool((sides[0] & sides[1]).any())
        spent += price(len(samples), group.spatial.numel(), group.temporal.numel(), positions, channels, costs)
        seen += samples.tolist()
    assert sorted(seen) == list(range(batch))
    lists = [(int((gate[b] != 0).sum()), int((gate[b] != 1).sum())) for b in range(batch)]
    assert spent <= 1.0001 * sum(price(1, *sizes, positions, channels, costs) for sizes in lists)


@COSTS
def test_samples_with_the_same_gates_share_calls(costs):
    """As in evaluation: a call a neuron, or as few as the limit allows, whatever the order of the samples."""
    gate, neuron = gates(64, 4, 48, 0.0)
    chosen = neuron.bincount(minlength=4)
    groups = group_samples(gate, neuron, 4, 100, 48, costs)
    assert [len(group.samples) for group in groups] == chosen[chosen > 0].tolist()
    most = CALL_POSITIONS // 500
    limited = group_samples(gate, neuron, 4, 500, 48, costs, limited=True)
    assert len(limited) == sum(-(-count // most) for count in chosen.tolist())
    (whole,) = group_samples(gate[:1].expand(8, -1), neuron[:1].expand(8), 4, 100, 48, costs)
    assert whole.samples is None


def test_a_neuron_out_of_range():
    gate, neuron = gates(3, 2, 4, 0.0)
    with pytest.raises(ValueError, match="neuron: got index 5, wanted 0 <= index < 2"):
        group_samples(gate, neuron * 0 + 5, 2, 10, 4, DIRECT_COSTS)
