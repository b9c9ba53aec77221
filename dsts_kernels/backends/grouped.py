"""Ops on the host side, a group of samples at a time: what the CPU and the plain PyTorch backend have in common.

Samples are grouped by their neuron (:mod:`.groups`); each group is one call of a :class:`.gated.GatedConvolution`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Backend, FrozenOptions, FrozenWeights, taps_of
from .convolution import POINT, Kernel
from .direct import DirectConvolution
from .gated import GatedConvolution
from .groups import group_samples, samples_by_neuron
from .memory import lazy_zeros
from .packing import BLOCKED, places
from .passes import Epilogue, Passes, as_features, empty_ndhwc, positions_of


class GroupedBackend(Backend, Passes):
    """Ops by groups of samples, on passes that a subclass supplies."""

    def __init__(self) -> None:
        self.direct = DirectConvolution(self)

    @abstractmethod
    def convolution(self, x: Tensor, outputs: int, step: str = "forward") -> GatedConvolution:
        """The way to convolve such features to so many outputs: what was asked for, or the cheapest that there is.

        ``step`` is ``"forward"``, or the gradient of the ``"data"`` or of the ``"weights"``.
        """

    def frozen_convolution(self, x: Tensor, outputs: int, packing: str) -> GatedConvolution:
        """The way of a frozen layer."""
        return self.convolution(x, outputs) if packing in BLOCKED else self.direct

    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        num_neurons, outputs = spatial.shape[:2]
        out = as_features(empty_ndhwc(x, outputs))
        if out.numel():
            way = self.convolution(x, outputs)
            for group in group_samples(gate, neuron, num_neurons, positions_of(x), outputs, way.costs, limited=True):
                way.gated_conv(x, gate, group, spatial[group.neuron], temporal[group.neuron], out)
        return out

    def gated_conv3d_backward(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        neuron: Tensor,
        spatial: Tensor,
        temporal: Tensor,
        needs: list[bool],
        kept: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        need_x, need_gate, need_spatial, need_temporal = needs
        dx = torch.empty_like(x) if need_x else None
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_gate else None
        num_neurons, outputs = spatial.shape[:2]
        back = self.convolution(x, outputs, "data") if need_x or need_gate else None
        learn = self.convolution(x, outputs, "weights") if need_spatial or need_temporal else None
        groups = []
        if grad.numel() and any(needs):
            costs = (back or learn).costs
            groups = group_samples(gate, neuron, num_neurons, positions_of(x), outputs, costs)
        whole = [{}, {}]  # by operator: which neurons' gradients are written, and whether all channels are listed
        for group in groups:
            for written, listed in zip(whole, (group.spatial, group.temporal), strict=True):
                written.setdefault(group.neuron, listed.numel() == x.shape[1])
        dspatial = lazy_zeros(spatial.shape, spatial.dtype, x.device, whole[0]) if need_spatial else None
        dtemporal = lazy_zeros(temporal.shape, temporal.dtype, x.device, whole[1]) if need_temporal else None
        written = set()
        for group in groups:
            n = group.neuron
            if back is not None:
                back.data_gradient(grad, x, gate, group, spatial[n], temporal[n], dx, dgate)
            if learn is not None:
                totals = [None if total is None else total[n] for total in (dspatial, dtemporal)]
                learn.weight_gradient(grad, x, gate, group, *totals, add=n in written)
                written.add(n)
        return dx, dgate, dspatial, dtemporal

    def mixing_way(self, z: Tensor, kernel: Kernel, step: str = "forward") -> GatedConvolution:
        """How to convolve with a mixing kernel: one of 1x1x1 leaves fast convolution nothing to save."""
        return self.direct if kernel == POINT else self.convolution(z, z.shape[1], step)

    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
        out, kernel = as_features(empty_ndhwc(z, mixing.shape[1])), tuple(mixing.shape[3:])
        if out.numel():
            way = self.mixing_way(z, kernel)
            for index, samples in samples_by_neuron(neuron, mixing.shape[0], positions_of(z)):
                out = way.mix(z, samples, mixing[index], kernel, out)
        return out

    def mixing_conv3d_backward(
        self, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        need_z, need_mixing = needs
        dz = as_features(empty_ndhwc(z, z.shape[1])) if need_z else None
        kernel = tuple(mixing.shape[3:])
        back = self.mixing_way(z, kernel, "data") if need_z else None
        learn = self.mixing_way(z, kernel, "weights") if need_mixing else None
        chosen = samples_by_neuron(neuron, mixing.shape[0]) if grad.numel() else []
        dmixing = None
        if need_mixing:
            dmixing = lazy_zeros(mixing.shape, mixing.dtype, z.device, {index: True for index, _ in chosen})
        for index, samples in chosen:
            if back is not None:
                dz = back.mix_data_gradient(grad, samples, mixing[index], kernel, dz)
            if learn is not None:
                learn.mix_weight_gradient(grad, z, samples, kernel, dmixing[index])
        return dz, dmixing

    def frozen_layer(
        self, x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = x.shape[0]
        num_neurons, outputs = w.bias.shape
        taps = taps_of(w.scoring)
        centered = w.scoring.shape[2] != taps
        sums = self.tap_sums(x, taps) if sums is None else sums
        scores = F.linear(sums.flatten(1), (w.scoring[:, :, :taps] if centered else w.scoring).flatten(1))
        divisor = options.score_divisor(x)
        if divisor != 1:
            scores = scores / divisor
        if centered:
            scores = scores + w.scoring[:, 0, taps]
        neuron = scores.argmax(dim=1)

        y = torch.empty_like(skip) if skip is not None else as_features(empty_ndhwc(x, outputs))
        next_sums = torch.empty((batch, outputs, options.next_taps), dtype=scores.dtype, device=x.device)
        if y.numel():
            way = self.frozen_convolution(x, outputs, options.packing)
            where = places(w.starts.tolist(), x.shape[1], outputs, options.packing, w.filters.dtype)
            taken = next_sums if options.next_taps else None
            for index, samples in samples_by_neuron(neuron, num_neurons, positions_of(x)):
                epilogue = Epilogue(y, samples, w.bias[index], options.relu, skip, taken)
                way.frozen_neuron(x, index, where[index], w, options, epilogue)
        return y, next_sums, neuron, scores
