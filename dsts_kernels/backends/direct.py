"""Gated convolution on gathered channels by library convolutions (:mod:`.convolution`): for every shape and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from . import convolution
from .base import FrozenOptions, FrozenWeights
from .convolution import SPATIAL, TEMPORAL, Kernel
from .gated import GatedConvolution
from .groups import DIRECT_COSTS, Group
from .packing import Place, unpack_at, unpack_mixing
from .passes import Epilogue, GradientPanel, Passes, as_features, as_filters, compute_dtype, feature_panel, weight_panel


class DirectConvolution(GatedConvolution):
    """Gathers each operator's channels into a panel, convolves, and joins the results in an epilogue."""

    costs = DIRECT_COSTS

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def gated_conv(self, x: Tensor, gate: Tensor, group: Group, spatial: Tensor, temporal: Tensor, out: Tensor) -> None:
        operators = ((spatial, group.spatial, SPATIAL), (temporal, group.temporal, TEMPORAL))
        gather, epilogue = self.passes.gather_panel, Epilogue(out, group.samples)
        panels = []
        for _, channels, kernel in operators:
            listed = channels.numel() > 0
            panels.append(gather(x, group.samples, channels, **gating(x, gate, group, kernel)) if listed else None)
        for block in operator_blocks(out.shape[1], group.spatial.numel(), group.temporal.numel()):
            results = []
            for panel, (weight, channels, kernel) in zip(panels, operators, strict=True):
                result = None
                if panel is not None:
                    filters = as_filters(gather(weight[block], None, channels, dtype=compute_dtype(weight)), panel)
                    result = convolution.forward(panel, filters, kernel)
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
        for block in operator_blocks(x.shape[1], spatial.shape[0], spatial.shape[0]):
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
        grad_first = self.passes.gather_panel(grad, group.samples, channels_first=True, dtype=compute_dtype(grad))
        for total, channels, kernel in ((dspatial, group.spatial, SPATIAL), (dtemporal, group.temporal, TEMPORAL)):
            for block in convolution.gradient_blocks(channels.numel()) if total is not None else ():
                listed = channels[block]
                options = gating(x, gate, group, kernel)
                panel_first = self.passes.gather_panel(x, group.samples, listed, channels_first=True, **options)
                gradient = convolution.weight_gradient(panel_first, grad_first, kernel).to(total.dtype)
                listed = listed.to(total.device, torch.long)  # lists are on the CPU
                total.index_add_(1, listed, gradient) if add else total.index_copy_(1, listed, gradient)

    def frozen_neuron(
        self,
        x: Tensor,
        neuron: int,
        places: tuple[Place, Place],
        weights: FrozenWeights,
        options: FrozenOptions,
        epilogue: Epilogue,
    ) -> None:
        outputs = epilogue.out.shape[1]
        split = places[0].channels
        panels = []
        for listed in (weights.channels[neuron, :split], weights.channels[neuron, split:]):
            some, dtype = listed.numel() > 0, compute_dtype(x)
            panels.append(self.passes.gather_panel(x, epilogue.samples, listed, dtype=dtype) if some else None)
        filters = [
            unpack_at(weights.filters, place, options.packing, outputs, taps)
            for place, taps in zip(places, (9, 3), strict=True)
        ]

        def operate(block: slice) -> list[Tensor | None]:
            return [
                None if panel is None else convolution.forward(panel, flat[block].to(panel.dtype), kernel)
                for panel, flat, kernel in zip(panels, filters, (SPATIAL, TEMPORAL), strict=True)
            ]

        if weights.mixing is None:
            for block in operator_blocks(outputs, split, x.shape[1] - split):
                self.passes.epilogue(*operate(block), epilogue.of_outputs(block))
            return
        spatial, temporal = operate(slice(0, outputs))
        z = spatial if temporal is None else temporal if spatial is None else spatial.add_(temporal)
        kernel = tuple(options.mixing_kernel)
        taps = kernel[0] * kernel[1] * kernel[2]
        mixing = unpack_mixing(weights.mixing[neuron], options.packing, outputs, taps)
        self.passes.epilogue(convolution.forward(z, mixing.to(z.dtype), kernel), None, epilogue)

    def mix(self, z: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, out: Tensor) -> Tensor:
        panel = feature_panel(self.passes, z, samples)
        mixed = convolution.forward(panel, weight_panel(self.passes, weight, None, panel), kernel)
        return self._scatter(mixed, out, samples)

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
        dtype = compute_dtype(z)
        z_first = self.passes.gather_panel(z, samples, channels_first=True, dtype=dtype)
        grad_first = self.passes.gather_panel(grad, samples, channels_first=True, dtype=dtype)
        total.copy_(convolution.weight_gradient(z_first, grad_first, kernel))

    def _scatter(self, panel: Tensor, out: Tensor, samples: Tensor | None) -> Tensor:
        """``out`` with ``panel`` as its ``samples``; the panel itself where it is the whole of it."""
        if samples is None and panel.dtype == out.dtype:
            return as_features(panel)
        self.passes.epilogue(panel, None, Epilogue(out, samples))
        return out


def gating(x: Tensor, gate: Tensor, group: Group, kernel: Kernel) -> dict[str, object]:
    """How a gather makes the gated input of one operator."""
    scale = gate.to(x.dtype) if group.scaled else None
    return {"scale": scale, "complement": kernel == TEMPORAL, "dtype": compute_dtype(x)}


def operator_blocks(channels: int, spatial: int, temporal: int) -> list[slice]:
    """Blocks of ``channels`` for both operators, whose other side has so many channels."""
    return convolution.filter_blocks(channels, max(9 * spatial, 3 * temporal))


def within(channels: Tensor, block: slice) -> Tensor:
    """The listed channels that lie in a block, counted from its start."""
    return channels[(channels >= block.start) & (channels < block.stop)] - block.start
