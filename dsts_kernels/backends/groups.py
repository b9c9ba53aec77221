"""Which samples share a convolution: samples of one neuron, with their gates turned into channel lists.

A hard gate is a channel list, so a sample on its own pays only for its taps; samples that share a call pay for
the union of their lists but fewer calls and fewer passes over the weights. The cheaper of the two is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Costs(NamedTuple):
    """What a call costs, in multiply-adds: estimates from a 2-core AVX-512 machine, at 200 a nanosecond."""

    spatial: float  # a position, listed channel and output
    temporal: float
    weight_positions: float  # what bringing in a filter costs, in positions of work on it
    call: float  # one more call


# Gathering 4.7 M weights took 2.8 ms, rounded up for the library's own reordering, and a small convolution 52 us.
DIRECT_COSTS = Costs(spatial=9, temporal=3, weight_positions=160, call=12e6)
# F(4x4, 3x3) and F(4, 3); transforming both filters took 2.4 ms where the products of 2048 positions took 16.
WINOGRAD_COSTS = Costs(spatial=2.25, temporal=1.5, weight_positions=300, call=1e6)
# In half types on a matrix unit: its times in the multiply-adds that fast convolution does meanwhile. Fitted to what
# passes and products of a layer took on an Intel machine with AMX (docs/log/cpu.md).
MATRIX_COSTS = Costs(spatial=1.1, temporal=0.7, weight_positions=450, call=20e6)
MATRIX_POSITIONS = 256  # of a sample: smaller ones were not measured, and of a 1x1 plane fast convolution skips taps
# Beyond this a call has nothing left to share, and its results outgrow the memory that malloc reuses.
CALL_POSITIONS = 4096


def matrix_is_cheaper(positions: int, channels: int, outputs: int) -> bool:
    """Whether a matrix unit convolves a sample of this size directly for less than fast convolution in float32 does."""
    size = (positions, channels, outputs)
    return positions >= MATRIX_POSITIONS and layer_cost(MATRIX_COSTS, *size) < layer_cost(WINOGRAD_COSTS, *size)


def layer_cost(costs: Costs, positions: int, channels: int, outputs: int) -> float:
    """Multiply-adds for each output of one sample whose channels are half spatial, half temporal."""
    taps = (costs.spatial + costs.temporal) * channels / 2
    return taps * (positions + costs.weight_positions) + costs.call / outputs


@dataclass(frozen=True)
class Group:
    """Samples that share one call."""

    neuron: int
    samples: Tensor | None  # (nb,) int64; None for the whole batch in order
    spatial: Tensor  # (ns,) int32, channels that any sample sends to the spatial operator
    temporal: Tensor  # (nt,) int32
    scaled: bool  # whether gate values must multiply the panel (a soft gate, or a union of lists)


def check_neurons(neuron: Tensor, num_neurons: int) -> list[int]:
    """The chosen neurons on the host, refused when one is out of range."""
    chosen = neuron.tolist()
    for index in chosen:
        if not 0 <= index < num_neurons:
            raise ValueError(f"neuron: got index {index}, wanted 0 <= index < {num_neurons}")
    return chosen


def samples_by_neuron(neuron: Tensor, num_neurons: int, positions: int = 0) -> list[tuple[int, Tensor | None]]:
    """``(neuron, samples)`` of every chosen neuron; ``samples`` is ``None`` when it is all of them.

    With ``positions`` a sample, a neuron comes once for every :data:`CALL_POSITIONS` of them.
    """
    chosen: dict[int, list[int]] = {}
    for sample, index in enumerate(check_neurons(neuron, num_neurons)):
        chosen.setdefault(index, []).append(sample)
    batch = neuron.numel()
    most = max(1, CALL_POSITIONS // positions) if positions else max(1, batch)
    return [
        (index, None if len(samples) == batch <= most else torch.tensor(samples[start : start + most], device="cpu"))
        for index, samples in sorted(chosen.items())
        for start in range(0, len(samples), most)
    ]


def in_calls(samples: Tensor | None, batch: int, positions: int) -> Iterator[Tensor | None]:
    """Samples, ``None`` being the whole batch, in pieces of at most :data:`CALL_POSITIONS`."""
    most = max(1, CALL_POSITIONS // max(1, positions))
    if samples is None and batch <= most:
        yield None
        return
    yield from (torch.arange(batch, device="cpu") if samples is None else samples).split(most)


def group_samples(
    gate: Tensor,
    neuron: Tensor,
    num_neurons: int,
    positions: int,
    outputs: int,
    costs: Costs,
    limited: bool = False,
) -> list[Group]:
    """Groups of samples for a gated convolution over ``positions`` positions and ``outputs`` channels.

    ``limited`` groups stay within :data:`CALL_POSITIONS`; a weight gradient would have to be added up for each.
    """
    most = max(1, CALL_POSITIONS // positions) if limited else len(neuron)
    chosen = check_neurons(neuron, num_neurons)
    to_spatial = (gate != 0).cpu().numpy()  # (B, C); a NaN gate is in both lists
    to_temporal = (gate != 1).cpu().numpy()
    if len(chosen) == 1:
        return [_group(chosen[0], _Cluster([0], to_spatial[0], to_temporal[0]), 1)]
    clusters: dict[int, list[_Cluster]] = {}
    for sample, index in enumerate(chosen):
        single = _Cluster([sample], to_spatial[sample], to_temporal[sample])
        _place(clusters.setdefault(index, []), single, lambda cluster: cluster.cost(positions, outputs, costs), most)
    batch = len(chosen)
    return [_group(index, cluster, batch) for index in sorted(clusters) for cluster in clusters[index]]


@dataclass
class _Cluster:
    samples: list[int]
    spatial: np.ndarray  # (C,) bool
    temporal: np.ndarray

    def cost(self, positions: int, outputs: int, costs: Costs) -> float:
        taps = costs.spatial * np.count_nonzero(self.spatial) + costs.temporal * np.count_nonzero(self.temporal)
        return taps * (len(self.samples) * positions + costs.weight_positions) + costs.call / outputs

    def join(self, other: _Cluster) -> _Cluster:
        return _Cluster(self.samples + other.samples, self.spatial | other.spatial, self.temporal | other.temporal)


def _place(clusters: list[_Cluster], single: _Cluster, cost: Callable[[_Cluster], float], most: int) -> None:
    """Add a sample to the cluster where it costs least, or as a cluster of its own."""
    best, best_cost, best_joint = None, cost(single), None
    for index, cluster in enumerate(clusters):
        if len(cluster.samples) >= most:
            continue
        joint = cluster.join(single)
        extra = cost(joint) - cost(cluster)
        if extra < best_cost:
            best, best_cost, best_joint = index, extra, joint
    if best is None:
        clusters.append(single)
    else:
        clusters[best] = best_joint


def _group(neuron: int, cluster: _Cluster, batch: int) -> Group:
    return Group(
        neuron=neuron,
        samples=None if len(cluster.samples) == batch else torch.tensor(cluster.samples, device="cpu"),
        spatial=torch.from_numpy(cluster.spatial.nonzero()[0].astype(np.int32)),
        temporal=torch.from_numpy(cluster.temporal.nonzero()[0].astype(np.int32)),
        # Lists that partition the channels leave nothing to multiply: each gate on a list is exactly 1.
        scaled=bool((cluster.spatial & cluster.temporal).any()),
    )
