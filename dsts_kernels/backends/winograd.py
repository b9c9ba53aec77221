"""Fast convolution: Winograd's minimal filtering in place of the library's direct convolution (DESIGN 2.4).

One native pass gathers channels, transforms, multiplies, transforms back, sums both operators and finishes, so no
panel is written. It runs in float32, half precision being a storage format, and takes every shape:
a tile's size is chosen for each dimension, down to 1 for a dimension that only ever meets the middle tap.
Float64 stays with the direct path.
"""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .base import FrozenOptions, FrozenWeights
from .convolution import SPATIAL, TEMPORAL, Kernel
from .direct import DirectBackend, as_features, empty_rows, positions_of, within
from .packing import BLOCK, Place
from .plan import WINOGRAD_COSTS, Costs, Group, in_calls

TILES = (1, 2, 4)  # outputs of a tile along the height and the width
TEMPORAL_TILES = (*TILES, 8)


# What a point of a tile costs besides its product: its filter's transform, in rows of the product. On a 2-core AVX-512
# machine the transform of 46 points took 1.25 ms where the product of 7168 rows in all took 16.
FILTER_ROWS = 12


def points(tile: int) -> int:
    """Multiplications a tile takes in one dimension."""
    return 1 if tile == 1 else tile + 2


def tiles_of(size: int, tiles: tuple[int, ...]) -> tuple[int, ...]:
    """The tiles to choose from: 1 for a size of 1, else the others."""
    return tiles[:1] if size == 1 else tiles[1:]


@functools.cache
def tile_sizes(batch: int, t: int, h: int, w: int) -> tuple[int, int, int]:
    """Tiles ``(t, h, w)`` for a call on ``batch`` samples of ``t`` frames of ``h`` by ``w``.

    Large tiles save multiplications, small ones transforms of filters: the cheaper sum, the larger of equals.
    """

    def spatial(tile: tuple[int, int]) -> tuple[int, int]:
        rows = batch * t * -(-h // tile[0]) * -(-w // tile[1])
        return points(tile[0]) * points(tile[1]) * (rows + FILTER_ROWS), -tile[0] * tile[1]

    def temporal(tile: int) -> tuple[int, int]:
        return points(tile) * (batch * h * w * -(-t // tile) + FILTER_ROWS), -tile

    plane = min(itertools.product(tiles_of(h, TILES), tiles_of(w, TILES)), key=spatial)
    return min(tiles_of(t, TEMPORAL_TILES), key=temporal), *plane


class Operator(NamedTuple):
    """One operator as the native kernel sees it: the channels it reads, and its filter where it lies.

    The weight of output ``o``, listed channel ``k`` and tap is at ``start + rows[o]*stride_o + columns[k]*stride_k +
    tap*stride_tap`` elements into ``weight``; a list of ``None`` counts 0, 1, ... ``blocked`` filters lie as
    :func:`.packing.pack` leaves them.
    """

    weight: Tensor
    count: int
    channels: Tensor | None = None  # int32
    first: int = 0  # of `channels`, where the list begins
    start: int = 0
    rows: Tensor | None = None
    columns: Tensor | None = None
    strides: tuple[int, int, int] = (0, 0, 0)  # of outputs, channels, taps
    scale: Tensor | None = None  # (B, C), gates in the dtype of x
    complement: bool = False  # multiply by 1 - scale
    blocked: bool = False

    @classmethod
    def forward(cls, weight: Tensor, channels: Tensor | None, scale: Tensor | None, kernel: Kernel) -> Operator:
        """A live filter ``(O, C, *kernel)`` on its listed channels."""
        weight = weight.contiguous()
        count = weight.shape[1] if channels is None else channels.numel()
        taps = weight[0, 0].numel()
        strides = (weight.stride(0), taps, 1)
        return cls(weight, count, channels, 0, 0, None, channels, strides, scale, kernel == TEMPORAL)

    @classmethod
    def data_gradient(cls, weight: Tensor, inputs: Tensor | None) -> Operator:
        """Its transpose: a gradient ``(B, O, ...)`` to the listed inputs of the filter, taps reversed."""
        weight = weight.contiguous()
        taps = weight[0, 0].numel()
        strides = (taps, weight.stride(0), -1)
        return cls(weight, weight.shape[0], start=taps - 1, rows=inputs, strides=strides)

    @classmethod
    def packed(cls, flat: Tensor, place: Place, channels: Tensor, first: int) -> Operator:
        """A blocked filter that lies at ``place`` in a flat tensor, on the channels listed from ``first`` on."""
        return cls(flat, place.channels, channels, first, place.start, blocked=True)


def gated_operators(
    group: Group, spatial: Tensor | None, temporal: Tensor | None, scale: Tensor | None
) -> list[Operator | None]:
    """A group's operators on live filters ``(O, C, *kernel)``; ``None`` where one has no channels, or no filter."""
    return [
        None if weight is None or not channels.numel() else Operator.forward(weight, channels, scale, kernel)
        for weight, channels, kernel in ((spatial, group.spatial, SPATIAL), (temporal, group.temporal, TEMPORAL))
    ]


class WinogradBackend(DirectBackend):
    """Gated convolutions by :meth:`winograd` wherever it applies, the rest as in :class:`DirectBackend`."""

    @abstractmethod
    def winograd(
        self,
        x: Tensor,
        spatial: Operator | None,
        temporal: Operator | None,
        out: Tensor,
        *,
        x_samples: Tensor | None = None,
        samples: Tensor | None = None,
        bias: Tensor | None = None,
        relu: bool = False,
        skip: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Both convolutions of ``x[x_samples]`` summed and finished: the rest as in :meth:`epilogue`."""

    @abstractmethod
    def winograd_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        spatial: Operator | None,
        temporal: Operator | None,
        *,
        samples: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """The gradients of both filters, written (or added) where an operator's ``weight`` is."""

    def fast(self, x: Tensor) -> bool:
        """Whether fast convolution runs these features."""
        return x.dtype != torch.float64

    def costs(self, x: Tensor) -> Costs:
        return WINOGRAD_COSTS if self.fast(x) else super().costs(x)

    def run_group(self, x: Tensor, gate: Tensor, group: Group, spatial: Tensor, temporal: Tensor, out: Tensor) -> None:
        if not self.fast(x):
            return super().run_group(x, gate, group, spatial, temporal, out)
        scale = gate.to(x.dtype).contiguous() if group.scaled else None
        operators = gated_operators(group, spatial[group.neuron], temporal[group.neuron], scale)
        self.winograd(x, *operators, out, x_samples=group.samples, samples=group.samples)

    def weight_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        group: Group,
        dspatial: Tensor | None,
        dtemporal: Tensor | None,
        add: bool,
    ) -> None:
        if not self.fast(x):
            return super().weight_gradient(grad, x, gate, group, dspatial, dtemporal, add)
        scale = gate.to(x.dtype).contiguous() if group.scaled else None
        operators = gated_operators(group, dspatial, dtemporal, scale)
        if any(operators):
            self.winograd_gradient(x, grad, *operators, samples=group.samples, add=add)

    def input_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        group: Group,
        spatial: Tensor,
        temporal: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        if not self.fast(x):
            return super().input_gradient(grad, x, gate, group, spatial, temporal, dx, dgate)
        whole = slice(0, x.shape[1])
        lists = [None if dgate is not None else within(own, whole) for own in (group.spatial, group.temporal)]
        for samples in in_calls(group.samples, x.shape[0], positions_of(x)):
            count = x.shape[0] if samples is None else samples.numel()
            panels = []
            for weight, kernel, own in ((spatial, SPATIAL, lists[0]), (temporal, TEMPORAL, lists[1])):
                channels = x.shape[1] if own is None else own.numel()
                if not channels:
                    panels.append(None)
                    continue
                operator = Operator.data_gradient(weight[group.neuron], own)
                panel = torch.empty((count, *x.shape[2:], channels), dtype=torch.float32, device=x.device)
                pair = (operator, None) if kernel == SPATIAL else (None, operator)
                self.winograd(grad, *pair, as_features(panel), x_samples=samples)
                panels.append(panel)
            self.gate_merge(*panels, tuple(lists), samples, gate, x, dx, dgate)

    def frozen_neuron(
        self,
        x: Tensor,
        samples: Tensor | None,
        n: int,
        where: tuple[Place, Place],
        y: Tensor,
        next_sums: Tensor,
        skip: Tensor | None,
        w: FrozenWeights,
        options: FrozenOptions,
    ) -> None:
        if not (options.packing == "blocked" and self.fast(x)):
            return super().frozen_neuron(x, samples, n, where, y, next_sums, skip, w, options)
        outputs = w.bias.shape[1]
        lists = n * x.shape[1], n * x.shape[1] + where[0].channels  # where the neuron's lists begin
        operators = [
            Operator.packed(w.filters, place, w.channels, first) if place.channels else None
            for place, first in zip(where, lists, strict=True)
        ]
        finish = {"bias": w.bias[n], "relu": options.relu, "skip": skip, "samples": samples}
        finish["sums"] = next_sums if options.next_taps else None
        if w.mixing is None:
            self.winograd(x, *operators, y, x_samples=samples, **finish)
            return
        count = x.shape[0] if samples is None else samples.numel()
        z = as_features(empty_rows(x.new_empty((count, 0, *x.shape[2:]), dtype=torch.float32), outputs))
        self.winograd(x, *operators, z, x_samples=samples)
        mixing = Operator(w.mixing[n], outputs, blocked=True)
        pair = (mixing, None) if tuple(options.mixing_kernel) == SPATIAL else (None, mixing)
        self.winograd(z, *pair, y, **finish)


__all__ = ["BLOCK", "Operator", "WinogradBackend", "points", "tile_sizes"]
