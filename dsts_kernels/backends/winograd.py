"""Fast convolution: Winograd's minimal filtering in place of the library's direct convolution (docs/design.md).

One native pass gathers channels, transforms, multiplies, transforms back, sums both operators and ends in the epilogue,
so no panel is written. It runs in float32, half precision being a storage format, and takes every shape:
a tile's size is chosen for each dimension, down to 1 for a dimension that only ever meets the middle tap.
Float64 stays with :mod:`.direct`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .base import FrozenOptions, FrozenWeights
from .build import _C
from .convolution import SPATIAL, TEMPORAL, Kernel, taps_of
from .gated import GatedConvolution
from .groups import WINOGRAD_COSTS, Group, in_calls
from .packing import Place
from .passes import Epilogue, GradientPanel, as_features, empty_ndhwc, positions_of

if TYPE_CHECKING:
    from .cpu import CpuBackend

# Multiplications along one dimension, by the outputs of a tile: the kernels' own table, csrc/cpu/winograd_tiles.h.
SPATIAL_TILES: dict[int, int] = {} if _C is None else _C.winograd_tiles["spatial"]
TEMPORAL_TILES: dict[int, int] = {} if _C is None else _C.winograd_tiles["temporal"]


@functools.cache
def tile_sizes(batch: int, t: int, h: int, w: int) -> tuple[int, int, int]:
    """Tiles ``(t, h, w)`` for a call on ``batch`` samples of ``t`` frames of ``h`` by ``w``.

    Large tiles save multiplications, small ones transforms of filters: the cheaper sum, the larger of equals.
    """
    return tuple(_C.tile_sizes(batch, t, h, w))


class Operator(NamedTuple):
    """One operator as the native kernels take it: the channels it reads, and its filter where it lies.

    The weight of output ``o``, listed channel ``k`` and tap is at ``weight_start + o_list[o]*stride_o +
    k_list[k]*stride_k + tap*stride_tap`` elements into ``weight``; a list of ``None`` counts 0, 1, ... ``blocked``
    filters lie as :func:`.packing.pack` leaves them, and need neither lists nor strides.
    """

    weight: Tensor
    k_channels: int  # that it sums over
    channels: Tensor | None = None  # int32, of the features; None: 0, 1, ...
    channels_start: int = 0  # where in `channels` the list begins
    weight_start: int = 0
    o_list: Tensor | None = None  # (O,) int32
    k_list: Tensor | None = None  # (k_channels,) int32
    strides: tuple[int, int, int] = (0, 0, 0)  # of outputs, channels, taps
    scale: Tensor | None = None  # (B, C), gates in the dtype of x
    complement: bool = False  # multiply by 1 - scale
    blocked: bool = False

    @classmethod
    def forward(cls, weight: Tensor, channels: Tensor | None, scale: Tensor | None, kernel: Kernel) -> Operator:
        """A live filter ``(O, C, *kernel)`` on its listed channels."""
        weight = weight.contiguous()
        return cls(
            weight,
            k_channels=weight.shape[1] if channels is None else channels.numel(),
            channels=channels,
            k_list=channels,
            strides=(weight.stride(0), taps_of(kernel), 1),
            scale=scale,
            complement=kernel == TEMPORAL,
        )

    @classmethod
    def data_gradient(cls, weight: Tensor, inputs: Tensor | None, kernel: Kernel) -> Operator:
        """Its transpose: a gradient ``(B, O, ...)`` to the listed inputs of the filter, taps reversed."""
        weight = weight.contiguous()
        taps = taps_of(kernel)
        strides = (taps, weight.stride(0), -1)
        return cls(weight, weight.shape[0], weight_start=taps - 1, o_list=inputs, strides=strides)

    @classmethod
    def packed(cls, flat: Tensor, place: Place, channels: Tensor, channels_start: int) -> Operator:
        """A blocked filter that lies at ``place`` in a flat tensor, on the channels listed from there on."""
        return cls(flat, place.channels, channels, channels_start, place.start, blocked=True)


class WinogradConvolution(GatedConvolution):
    """Every gated convolution and weight gradient is one native call; a data gradient one for each operator."""

    costs = WINOGRAD_COSTS

    def __init__(self, kernels: CpuBackend) -> None:
        self.kernels = kernels

    @staticmethod
    def why_not(dtype: torch.dtype) -> str | None:
        """Why features of this dtype have no fast convolution; ``None`` where they have."""
        return "float64 is convolved directly" if dtype == torch.float64 else None

    def gated_conv(self, x: Tensor, gate: Tensor, group: Group, spatial: Tensor, temporal: Tensor, out: Tensor) -> None:
        operators = gated_operators(x, gate, group, spatial, temporal)
        self.kernels.winograd(x, *operators, Epilogue(out, group.samples), group.samples)

    def data_gradient(
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
        """A few samples at a time, whose panels stay in reach."""
        for samples in in_calls(group.samples, x.shape[0], positions_of(x)):
            count = x.shape[0] if samples is None else samples.numel()
            panels = []
            for weight, kernel, channels in ((spatial, SPATIAL, group.spatial), (temporal, TEMPORAL, group.temporal)):
                listed = None if dgate is not None else channels
                width = x.shape[1] if listed is None else listed.numel()
                panel = empty_ndhwc(x, width, batch=count, dtype=torch.float32) if width else None
                if width:
                    operator = Operator.data_gradient(weight, listed, kernel)
                    self.kernels.winograd(grad, *beside(operator, kernel), Epilogue(as_features(panel)), samples)
                panels.append(GradientPanel(panel, listed))
            self.kernels.gate_merge(*panels, samples, gate, x, dx, dgate)

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
        operators = gated_operators(x, gate, group, dspatial, dtemporal)
        if any(operators):
            self.kernels.winograd_weight_gradient(x, grad, group.samples, *operators, add)

    def frozen_neuron(
        self,
        x: Tensor,
        neuron: int,
        places: tuple[Place, Place],
        weights: FrozenWeights,
        options: FrozenOptions,
        epilogue: Epilogue,
    ) -> None:
        spatial, temporal = places
        start = neuron * x.shape[1]  # of the neuron's list: its spatial channels, then the others
        operators = (
            Operator.packed(weights.filters, spatial, weights.channels, start) if spatial.channels else None,
            Operator.packed(weights.filters, temporal, weights.channels, start + spatial.channels)
            if temporal.channels
            else None,
        )
        samples = epilogue.samples
        if weights.mixing is None:
            self.kernels.winograd(x, *operators, epilogue, samples)
            return
        count, outputs = x.shape[0] if samples is None else samples.numel(), weights.bias.shape[1]
        z = as_features(empty_ndhwc(x, outputs, batch=count, dtype=torch.float32))
        self.kernels.winograd(x, *operators, Epilogue(z), samples)
        mixing = Operator(weights.mixing[neuron], outputs, blocked=True)
        self.kernels.winograd(z, *beside(mixing, tuple(options.mixing_kernel)), epilogue)

    def mix(self, z: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, out: Tensor) -> Tensor:
        operators = beside(Operator.forward(weight, None, None, kernel), kernel)
        self.kernels.winograd(z, *operators, Epilogue(out, samples), samples)
        return out

    def mix_data_gradient(
        self, grad: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, dz: Tensor
    ) -> Tensor:
        for some in in_calls(samples, grad.shape[0], positions_of(grad)):
            operators = beside(Operator.data_gradient(weight, None, kernel), kernel)
            self.kernels.winograd(grad, *operators, Epilogue(dz, some), some)
        return dz

    def mix_weight_gradient(
        self, grad: Tensor, z: Tensor, samples: Tensor | None, kernel: Kernel, total: Tensor
    ) -> None:
        operators = beside(Operator.forward(total, None, None, kernel), kernel)
        self.kernels.winograd_weight_gradient(z, grad, samples, *operators)


def gated_operators(
    x: Tensor, gate: Tensor, group: Group, spatial: Tensor | None, temporal: Tensor | None
) -> list[Operator | None]:
    """A group's operators on live filters ``(O, C, *kernel)``; ``None`` where one has no channels, or no filter."""
    scale = gate.to(x.dtype).contiguous() if group.scaled else None
    return [
        None if weight is None or not channels.numel() else Operator.forward(weight, channels, scale, kernel)
        for weight, channels, kernel in ((spatial, group.spatial, SPATIAL), (temporal, group.temporal, TEMPORAL))
    ]


def beside(operator: Operator, kernel: Kernel) -> tuple[Operator | None, Operator | None]:
    """An operator in its place as the spatial or the temporal one, the other being absent."""
    return (operator, None) if kernel == SPATIAL else (None, operator)
