"""Which samples share a convolution: samples of one neuron, with their gates turned into channel lists.

A hard gate is a channel list, so a sample on its own pays only for its taps; samples that share a call pay for
the union of their lists but fewer calls and fewer passes over the weights. The cheaper of the two is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    chosen, channels = check_neurons(neuron, num_neurons), gate.shape[1]
    sides = [(gate != other).cpu().numpy() for other in (0, 1)]  # (B, C); a NaN gate is in both lists
    if len(chosen) == 1:
        return [Group(chosen[0], None, *(_indices(side[0]) for side in sides), bool((sides[0] & sides[1]).any()))]
    alike: dict[tuple[int, bytes, bytes], list[int]] = {}  # in evaluation all samples of a neuron are
    for sample, one in enumerate(zip(chosen, *map(_bits, sides), strict=True)):
        alike.setdefault(one, []).append(sample)
    clusters: dict[int, list[_Cluster]] = {}
    for (index, *bits), samples in alike.items():
        spatial, temporal = (int.from_bytes(side, "big") for side in bits)
        for start in range(0, len(samples), most):
            single = _Cluster(samples[start : start + most], spatial, temporal, positions, outputs, costs)
            _place(clusters.setdefault(index, []), single, most)
    batch = len(chosen)
    return [_group(index, cluster, batch, channels) for index in sorted(clusters) for cluster in clusters[index]]


def _bits(side: np.ndarray) -> Iterator[bytes]:
    """Rows ``(B, C)`` of bool, eight channels a byte."""
    rows = np.packbits(side, axis=1)
    whole, width = rows.tobytes(), rows.shape[1]
    return (whole[start : start + width] for start in range(0, len(whole), width))


class _Cluster:
    """Samples, the channels that any of them sends to either operator, a bit each, and what their call costs."""

    def __init__(
        self, samples: list[int], spatial: int, temporal: int, positions: int, outputs: int, costs: Costs
    ) -> None:
        self.samples, self.spatial, self.temporal = samples, spatial, temporal
        self.size = (positions, outputs, costs)
        taps = costs.spatial * spatial.bit_count() + costs.temporal * temporal.bit_count()
        self.cost = taps * (len(samples) * positions + costs.weight_positions) + costs.call / outputs

    def join(self, other: _Cluster) -> _Cluster:
        samples = self.samples + other.samples
        return _Cluster(samples, self.spatial | other.spatial, self.temporal | other.temporal, *self.size)


def _place(clusters: list[_Cluster], single: _Cluster, most: int) -> None:
    """Add samples to the cluster where they cost least, or as a cluster of their own."""
    best, best_cost, best_joint = None, single.cost, None
    for index, cluster in enumerate(clusters):
        if len(cluster.samples) + len(single.samples) > most:
            continue
        joint = cluster.join(single)
        extra = joint.cost - cluster.cost
        if extra < best_cost:
            best, best_cost, best_joint = index, extra, joint
    if best is None:
        clusters.append(single)
    else:
        clusters[best] = best_joint


def _group(neuron: int, cluster: _Cluster, batch: int, channels: int) -> Group:
    packed = (one.to_bytes(-(-channels // 8), "big") for one in (cluster.spatial, cluster.temporal))
    return Group(
        neuron,
        None if len(cluster.samples) == batch else torch.tensor(sorted(cluster.samples), device="cpu"),
        *(_indices(np.unpackbits(np.frombuffer(one, np.uint8), count=channels)) for one in packed),
        # Lists that partition the channels leave nothing to multiply: each gate on a list is exactly 1.
        scaled=bool(cluster.spatial & cluster.temporal),
    )


def _indices(side: np.ndarray) -> Tensor:
    """Channels that are on a side ``(C,)``: ``(n,)`` int32."""
    return torch.from_numpy(side.nonzero()[0].astype(np.int32))
