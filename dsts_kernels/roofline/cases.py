"""A module, its features and a batch that uses it: what has to be computed and read, whoever does it.

Assumed throughout: half of a training batch has hard gates, neurons are chosen in turn, noise is independent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends.gpu.grids import cdiv
from ..backends.packing import tile_channels

SHAPES = {"tpn": (1024, (8, 16, 16)), "swin": (1024, (16, 7, 7))}
SPATIAL, TEMPORAL = 9, 3  # taps
FLOAT = 4  # bytes


class Case(NamedTuple):
    """A module and its features. ``kind`` of products: ``half``, ``tf32`` or ``ieee``, as in
    :mod:`..backends.triton.tuning`."""

    channels: int
    size: tuple[int, int, int]
    batch: int = 8
    layers: int = 3
    neurons: int = 10
    dtype: torch.dtype = torch.bfloat16
    kind: str = "half"
    share: float = 0.5  # of a neuron's channels that are spatial

    @property
    def positions(self) -> int:
        return self.size[0] * self.size[1] * self.size[2]

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    @property
    def features(self) -> int:
        """Bytes of ``(B, C, T, H, W)``."""
        return self.batch * self.channels * self.positions * self.element

    @property
    def slots(self) -> int:
        """Neurons the batch chose: sample ``b`` chose ``b % N``, so as many as can be, which reads the most filters."""
        return min(self.batch, self.neurons)

    @property
    def split(self) -> tuple[int, int]:
        """Channels that a hard gate lists: spatial, temporal."""
        spatial = round(self.channels * self.share)
        return spatial, self.channels - spatial

    def is_hard(self, b: int) -> bool:
        """Half of a training batch; a soft gate sends every channel through both operators."""
        return b < self.batch // 2

    def sample_lists(self) -> list[tuple[int, int]]:
        return [self.split if self.is_hard(b) else (self.channels, self.channels) for b in range(self.batch)]

    def slot_lists(self) -> list[tuple[int, int, int]]:
        """Channels that any of a slot's samples lists, noise being independent, and how many samples it has."""
        slots = []
        for slot in range(self.slots):
            hard = [self.is_hard(b) for b in range(slot, self.batch, self.neurons)]
            lists = [
                round(self.channels - self.channels * (1 - count / self.channels) ** len(hard))
                if all(hard)
                else self.channels
                for count in self.split
            ]
            slots.append((lists[0], lists[1], len(hard)))
        return slots


def literal_flop(case: Case) -> int:
    """Of an evaluation as the formulas are written: scores by convolution, both operators on all channels, mixing."""
    per_position = (case.neurons + SPATIAL + TEMPORAL + 1) * case.channels**2
    return 2 * case.layers * case.batch * case.positions * per_position


def folded_flop(case: Case) -> int:
    """Of a frozen evaluation: each channel through the operator that lists it, everything else folded into it."""
    taps = SPATIAL * case.split[0] + TEMPORAL * case.split[1]
    return 2 * case.layers * case.batch * case.positions * taps * case.channels


class Reduction(NamedTuple):
    """One sample's convolution: K blocks, rows of its filters, columns of its panel."""

    steps: int
    rows: int
    columns: int


def reduction(case: Case, spatial: int, temporal: int) -> Reduction:
    """Of a sample whose operators read so many channels."""
    block = tile_channels(case.dtype)
    blocks = cdiv(spatial, block), cdiv(temporal, block)
    rows = SPATIAL * spatial + TEMPORAL * temporal
    return Reduction(SPATIAL * blocks[0] + TEMPORAL * blocks[1], rows, block * sum(blocks))
