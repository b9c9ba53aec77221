"""Which samples share a convolution: samples of one neuron, with their gates turned into channel lists.

A hard gate is a channel list, so a sample on its own pays only for its taps; samples that share a call pay for
the union of their lists but fewer calls and fewer passes over the weights. The cheaper of the two is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPATIAL_TAPS, TEMPORAL_TAPS = 9, 3
# Estimates from a 2-core AVX-512 machine, where gathering 4.7 M weights took 2.8 ms, a small convolution 52 us and a
# large one 200 multiply-adds a nanosecond: what one gathered weight costs in positions of work on it (rounded up for
# the library's own reordering), and what one more call costs in multiply-adds.
WEIGHT_GATHER_POSITIONS = 160
CALL_MACS = 12e6
# Beyond this a call has nothing left to share, and its results outgrow the memory that malloc reuses.
CALL_POSITIONS = 4096


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
    rows: dict[int, list[int]] = {}
    for sample, index in enumerate(check_neurons(neuron, num_neurons)):
        rows.setdefault(index, []).append(sample)
    batch = neuron.numel()
    most = max(1, CALL_POSITIONS // positions) if positions else max(1, batch)
    return [
        (index, None if len(own) == batch <= most else torch.tensor(own[start : start + most]))
        for index, own in sorted(rows.items())
        for start in range(0, len(own), most)
    ]


def group_samples(
    gate: Tensor, neuron: Tensor, num_neurons: int, positions: int, outputs: int, limited: bool = False
) -> list[Group]:
    """Groups of samples for a gated convolution over ``positions`` positions and ``outputs`` channels.

    ``limited`` groups stay within :data:`CALL_POSITIONS`; a weight gradient would have to be added up for each.
    """
    most = max(1, CALL_POSITIONS // positions) if limited else len(neuron)
    chosen = check_neurons(neuron, num_neurons)
    to_spatial = (gate != 0).cpu().numpy()  # (B, C); a NaN gate is in both lists
    to_temporal = (gate != 1).cpu().numpy()
    clusters: dict[int, list[_Cluster]] = {}
    for sample, index in enumerate(chosen):
        single = _Cluster([sample], to_spatial[sample], to_temporal[sample])
        _place(clusters.setdefault(index, []), single, positions, outputs, most)
    batch = len(chosen)
    return [_group(index, cluster, batch) for index in sorted(clusters) for cluster in clusters[index]]


@dataclass
class _Cluster:
    samples: list[int]
    spatial: np.ndarray  # (C,) bool
    temporal: np.ndarray

    def cost(self, positions: int, outputs: int) -> float:
        taps = SPATIAL_TAPS * np.count_nonzero(self.spatial) + TEMPORAL_TAPS * np.count_nonzero(self.temporal)
        return taps * (len(self.samples) * positions + WEIGHT_GATHER_POSITIONS) + CALL_MACS / outputs

    def join(self, other: _Cluster) -> _Cluster:
        return _Cluster(self.samples + other.samples, self.spatial | other.spatial, self.temporal | other.temporal)


def _place(clusters: list[_Cluster], single: _Cluster, positions: int, outputs: int, most: int) -> None:
    """Add a sample to the cluster where it costs least, or as a cluster of its own."""
    best, best_cost, best_joint = None, single.cost(positions, outputs), None
    for index, cluster in enumerate(clusters):
        if len(cluster.samples) >= most:
            continue
        joint = cluster.join(single)
        extra = joint.cost(positions, outputs) - cluster.cost(positions, outputs)
        if extra < best_cost:
            best, best_cost, best_joint = index, extra, joint
    if best is None:
        clusters.append(single)
    else:
        clusters[best] = best_joint


def _group(neuron: int, cluster: _Cluster, batch: int) -> Group:
    return Group(
        neuron=neuron,
        samples=None if len(cluster.samples) == batch else torch.tensor(cluster.samples),
        spatial=torch.from_numpy(np.flatnonzero(cluster.spatial).astype(np.int32)),
        temporal=torch.from_numpy(np.flatnonzero(cluster.temporal).astype(np.int32)),
        # Lists that partition the channels leave nothing to multiply: each gate on a list is exactly 1.
        scaled=bool((cluster.spatial & cluster.temporal).any()),
    )
