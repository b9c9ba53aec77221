"""Ops on the host side, a group of samples at a time: what the CPU and the plain PyTorch backend have in common.

Samples are grouped by their neuron (:mod:`.groups`); each group is one call of a :class:`.gated.GatedConvolution`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .base import Backend, FrozenOptions, FrozenWeights, taps_of
from .direct import DirectConvolution
from .gated import GatedConvolution
from .groups import group_samples, samples_by_neuron
from .memory import lazy_zeros
from .packing import places
from .passes import Epilogue, Passes, as_features, compute_dtype, empty_ndhwc, feature_panel, positions_of, weight_panel


class GroupedBackend(Backend, Passes):
    """Ops by groups of samples, on passes that a subclass supplies."""

    def __init__(self) -> None:
        self.direct = DirectConvolution(self)

    @abstractmethod
    def convolution(self, dtype: torch.dtype) -> GatedConvolution:
        """The way to convolve features of this dtype, the fastest that there is."""

    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        num_neurons, outputs = spatial.shape[:2]
        out = as_features(empty_ndhwc(x, outputs))
        if out.numel():
            way = self.convolution(x.dtype)
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
        dspatial = lazy_zeros(spatial.shape, spatial.dtype, x.device) if need_spatial else None
        dtemporal = lazy_zeros(temporal.shape, temporal.dtype, x.device) if need_temporal else None
        if grad.numel():
            way, written = self.convolution(x.dtype), set()
            num_neurons, outputs = spatial.shape[:2]
            for group in group_samples(gate, neuron, num_neurons, positions_of(x), outputs, way.costs):
                n = group.neuron
                if need_x or need_gate:
                    way.data_gradient(grad, x, gate, group, spatial[n], temporal[n], dx, dgate)
                if need_spatial or need_temporal:
                    totals = [None if total is None else total[n] for total in (dspatial, dtemporal)]
                    way.weight_gradient(grad, x, gate, group, *totals, add=n in written)
                    written.add(n)
        return dx, dgate, dspatial, dtemporal

    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
        out = as_features(empty_ndhwc(z, mixing.shape[1]))
        kernel = tuple(mixing.shape[3:])
        if out.numel():
            for index, samples in samples_by_neuron(neuron, mixing.shape[0], positions_of(z)):
                panel = feature_panel(self, z, samples)
                mixed = convolution.forward(panel, weight_panel(self, mixing[index], None, panel), kernel)
                out = self._scatter(mixed, out, samples)
        return out

    def _scatter(self, panel: Tensor, out: Tensor, samples: Tensor | None) -> Tensor:
        """``out`` with ``panel`` as its ``samples``; the panel itself where it is the whole of it."""
        if samples is None and panel.dtype == out.dtype:
            return as_features(panel)
        self.epilogue(panel, None, Epilogue(out, samples))
        return out

    def mixing_conv3d_backward(
        self, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        need_z, need_mixing = needs
        dz = as_features(empty_ndhwc(z, z.shape[1])) if need_z else None
        dmixing = lazy_zeros(mixing.shape, mixing.dtype, z.device) if need_mixing else None
        kernel = tuple(mixing.shape[3:])
        for index, samples in samples_by_neuron(neuron, mixing.shape[0]) if grad.numel() else ():
            if need_z:
                grad_ndhwc = feature_panel(self, grad, samples)
                filters = weight_panel(self, mixing[index], None, grad_ndhwc)
                dz = self._scatter(convolution.data_gradient(grad_ndhwc, filters, kernel), dz, samples)
            if need_mixing:
                dtype = compute_dtype(z)
                z_first = self.gather_panel(z, samples, channels_first=True, dtype=dtype)
                grad_first = self.gather_panel(grad, samples, channels_first=True, dtype=dtype)
                dmixing[index].copy_(convolution.weight_gradient(z_first, grad_first, kernel))
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
            way = self.convolution(x.dtype) if options.packing == "blocked" else self.direct
            where = places(w.starts.tolist(), x.shape[1], outputs, options.packing, w.filters.dtype)
            taken = next_sums if options.next_taps else None
            for index, samples in samples_by_neuron(neuron, num_neurons, positions_of(x)):
                epilogue = Epilogue(y, samples, w.bias[index], options.relu, skip, taken)
                way.frozen_neuron(x, index, where[index], w, options, epilogue)
        return y, next_sums, neuron, scores
