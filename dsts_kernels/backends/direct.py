"""Gated convolution on gathered channels by library convolutions (:mod:`.convolution`): for every shape and dtype.

Panels are of the dtype that products are fast in: a half type's own where the processor multiplies it, else float32.
Frozen filters are then reordered for the library once (:mod:`.kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .base import FrozenOptions, FrozenWeights
from .convolution import SPATIAL, TEMPORAL, Kernel, Prepared, on_units, panel_width, taps_of
from .gated import GatedConvolution
from .groups import DIRECT_COSTS, Costs, Group
from .kept import kept
from .packing import Place, packed_size, unpack, unpack_mixing
from .passes import (
    Epilogue,
    GradientPanel,
    Passes,
    as_features,
    feature_panel,
    gradient_panel,
    kept_filters,
    listed_filters,
    weight_panel,
)

KEPT_ITEMSIZE = 2  # the widest dtype whose reordered filters are kept beside the packed ones


class FrozenFilter(NamedTuple):
    """A filter ``(O, taps, c)`` that ``unpack()`` makes of ``source``, which holds nothing else; ``key`` says how."""

    source: Tensor
    key: Hashable
    unpack: Callable[[], Tensor]
    kernel: Kernel

    def convolve(self, panel: Tensor) -> Tensor:
        """A panel's convolution; the library's order of a half type's filter is made once and kept."""

        def filters() -> Tensor:
            own = self.unpack().to(panel.dtype)
            return F.pad(own, (0, panel.shape[4] - own.shape[2]))

        def prepare() -> Prepared:
            return convolution.prepare(filters(), panel, self.kernel)

        kind = panel.dtype
        keep = kind == self.source.dtype and kind.itemsize <= KEPT_ITEMSIZE and panel.device.type == "cpu"
        return convolution.forward(panel, kept(self.source, self.key, prepare) if keep else filters(), self.kernel)


class DirectConvolution(GatedConvolution):
    """Gathers each operator's channels into a panel, convolves, and joins the results in an epilogue."""

    def __init__(self, passes: Passes, costs: Costs = DIRECT_COSTS) -> None:
        self.passes, self.costs = passes, costs

    def gated_conv(self, x: Tensor, gate: Tensor, group: Group, spatial: Tensor, temporal: Tensor, out: Tensor) -> None:
        operators = ((spatial, group.spatial, SPATIAL), (temporal, group.temporal, TEMPORAL))
        gather, epilogue = self.passes.gather_panel, Epilogue(out, group.samples)
        panels = []
        for _, channels, kernel in operators:
            listed = channels.numel() > 0
            options = self._gating(x, gate, group, channels, kernel) if listed else {}
            panels.append(gather(x, group.samples, channels, **options) if listed else None)
        lists = group.spatial.numel(), group.temporal.numel()
        for block in operator_blocks(out.shape[1], *lists, self._on_units(x)):
            results = []
            for panel, (weight, channels, kernel) in zip(panels, operators, strict=True):
                result = None
                if panel is not None:
                    given = (self.passes, weight[block], channels, panel)
                    result = convolution.forward(panel, kept_filters(*given, kernel) or listed_filters(*given), kernel)
                results.append(result)
            self.passes.epilogue(*results, epilogue.of_outputs(block))

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
        """A block of channels at a time."""
        grad_ndhwc = feature_panel(self.passes, grad, group.samples)
        for block in operator_blocks(x.shape[1], spatial.shape[0], spatial.shape[0], self._on_units(x)):
            panels = []
            for weight, channels, kernel in ((spatial, group.spatial, SPATIAL), (temporal, group.temporal, TEMPORAL)):
                listed = None if dgate is not None else within(channels, block)
                panel = None
                if listed is None or listed.numel():
                    filters = weight_panel(self.passes, weight[:, block], listed, grad_ndhwc)
                    panel = convolution.data_gradient(grad_ndhwc, filters, kernel)
                panels.append(GradientPanel(panel, listed))
            parts = (None if t is None else t[:, block] for t in (gate, x, dx, dgate))
            self.passes.gate_merge(*panels, group.samples, *parts)

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
        units, outward = self._on_units(x), gradient_panel(self.passes, grad, group.samples)
        for total, channels, kernel in ((dspatial, group.spatial, SPATIAL), (dtemporal, group.temporal, TEMPORAL)):
            for block in convolution.gradient_blocks(channels.numel(), units) if total is not None else ():
                listed = channels[block]
                options = self._gating(x, gate, group, listed, kernel)
                panel = self.passes.gather_panel(x, group.samples, listed, channels_first=not units, **options)
                gradient = convolution.weight_gradient(panel, outward, kernel)[:, : listed.numel()]
                put_listed(total, gradient, listed, add)

    def frozen_neuron(
        self,
        x: Tensor,
        neuron: int,
        places: tuple[Place, Place],
        weights: FrozenWeights,
        options: FrozenOptions,
        epilogue: Epilogue,
    ) -> None:
        outputs, dtype = epilogue.out.shape[1], self.passes.product_dtype(x)
        split, units = places[0].channels, on_units(dtype, x.device)
        lists = (weights.channels[neuron, :split], weights.channels[neuron, split:])
        panels = []
        for listed in lists:
            width, some = panel_width(listed.numel(), units), listed.numel() > 0
            gathered = self.passes.gather_panel(x, epilogue.samples, listed, dtype=dtype, width=width) if some else None
            panels.append(gathered)

        def operate(block: slice) -> list[Tensor | None]:
            results = []
            for panel, place, kernel in zip(panels, places, (SPATIAL, TEMPORAL), strict=True):
                if panel is None:
                    results.append(None)
                    continue
                taps = taps_of(kernel)
                size = packed_size(options.packing, outputs, taps, place.channels, weights.filters.dtype)
                own = weights.filters[place.start : place.start + size]

                def filters(own: Tensor = own, place: Place = place, taps: int = taps) -> Tensor:
                    return unpack(own, options.packing, outputs, taps, place.channels)[block]

                key = (kernel, options.packing, block.start, block.stop)
                results.append(FrozenFilter(own, key, filters, kernel).convolve(panel))
            return results

        if weights.mixing is None:
            for block in operator_blocks(outputs, split, x.shape[1] - split, units):
                self.passes.epilogue(*operate(block), epilogue.of_outputs(block))
            return
        spatial, temporal = operate(slice(0, outputs))
        z = spatial if temporal is None else temporal if spatial is None else spatial.add_(temporal)
        kernel = tuple(options.mixing_kernel)

        def mixing() -> Tensor:
            return unpack_mixing(weights.mixing[neuron], options.packing, outputs, taps_of(kernel))

        mixed = FrozenFilter(weights.mixing[neuron], (kernel, options.packing), mixing, kernel).convolve(z)
        self.passes.epilogue(mixed, None, epilogue)

    def mix(self, z: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, out: Tensor) -> Tensor:
        panel = feature_panel(self.passes, z, samples)
        small = convolution.small_product(panel, weight.shape[0], kernel)
        filters = None if small else kept_filters(self.passes, weight, None, panel, kernel)
        filters = filters or weight_panel(self.passes, weight, None, panel)
        return self._scatter(convolution.forward(panel, filters, kernel), out, samples)

    def mix_data_gradient(
        self, grad: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, dz: Tensor
    ) -> Tensor:
        panel = feature_panel(self.passes, grad, samples)
        filters = weight_panel(self.passes, weight, None, panel)
        return self._scatter(convolution.data_gradient(panel, filters, kernel), dz, samples)

    def mix_weight_gradient(
        self, grad: Tensor, z: Tensor, samples: Tensor | None, kernel: Kernel, total: Tensor
    ) -> None:
        if convolution.small_product(z, total.shape[0], kernel):
            z_panel, grad_panel = (feature_panel(self.passes, t, samples).flatten(0, 3) for t in (z, grad))
            total.copy_((grad_panel.t() @ z_panel).view_as(total))
            return
        panels = [gradient_panel(self.passes, features, samples) for features in (z, grad)]
        total.copy_(convolution.weight_gradient(*panels, kernel))

    def _scatter(self, panel: Tensor, out: Tensor, samples: Tensor | None) -> Tensor:
        """``out`` with ``panel`` as its ``samples``; the panel itself where it is the whole of it."""
        if samples is None and panel.dtype == out.dtype:
            return as_features(panel)
        self.passes.epilogue(panel, None, Epilogue(out, samples))
        return out

    def _on_units(self, x: Tensor) -> bool:
        return on_units(self.passes.product_dtype(x), x.device)

    def _gating(self, x: Tensor, gate: Tensor, group: Group, channels: Tensor, kernel: Kernel) -> dict[str, object]:
        """How a gather makes the gated input of one operator."""
        scale, dtype = gate.to(x.dtype) if group.scaled else None, self.passes.product_dtype(x)
        width = panel_width(channels.numel(), on_units(dtype, x.device))
        return {"scale": scale, "complement": kernel == TEMPORAL, "dtype": dtype, "width": width}


def put_listed(total: Tensor, gradient: Tensor, listed: Tensor, add: bool) -> None:
    """A gradient ``(O, c, ...)`` to its listed channels of ``total (O, C, ...)``, written or added."""
    gradient = gradient.to(total.dtype)
    if listed.numel() == total.shape[1]:
        total.add_(gradient) if add else total.copy_(gradient)
        return
    listed = listed.to(total.device, torch.long)  # lists are on the CPU
    total.index_add_(1, listed, gradient) if add else total.index_copy_(1, listed, gradient)


def operator_blocks(channels: int, spatial: int, temporal: int, units: bool) -> list[slice]:
    """Blocks of ``channels`` for both operators, whose other side has so many channels."""
    return convolution.filter_blocks(channels, max(9 * spatial, 3 * temporal), units)


def within(channels: Tensor, block: slice) -> Tensor:
    """The listed channels that lie in a block, counted from its start."""
    return channels[(channels >= block.start) & (channels < block.stop)] - block.start
