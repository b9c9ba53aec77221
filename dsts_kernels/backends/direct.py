"""Gated convolution on gathered channels: what the CPU and the plain PyTorch backend have in common.

The work of an op goes through a handful of passes over memory (``gather_panel``, ``epilogue``, ``gate_merge``,
``tap_sums``), which a subclass supplies, and through :mod:`.convolution`. Samples are grouped on the host by
:mod:`.plan`. Panels are dense and channels-last, ``(b, T, H, W, c)``, unless their name ends in ``_first``.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from . import convolution
from .base import Backend, FrozenOptions, FrozenWeights
from .convolution import SPATIAL, TEMPORAL, Kernel
from .plan import Group, group_samples, samples_by_neuron

LAZY_ZEROS_BYTES = 1 << 20


def lazy_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages cost neither time nor memory until they are written.

    The gradient of a stack of neurons is zero but for the chosen ones; writing those zeros out would cost more
    than the gradient itself. ``numpy`` takes them from ``calloc``, which torch's own ``zeros`` does not.
    """
    size = torch.empty((), dtype=dtype).element_size()
    if device.type != "cpu" or shape.numel() * size < LAZY_ZEROS_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape.numel() * size, np.uint8)).view(dtype).view(shape)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Half precision on a CPU is a storage format: panels and products there are float32."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and tensor.device.type == "cpu" else tensor.dtype


def empty_rows(x: Tensor, channels: int) -> Tensor:
    """Channels-last room ``(B, T, H, W, channels)`` for a result of the batch and size of ``x``."""
    b, _, t, h, w = x.shape
    return torch.empty((b, t, h, w, channels), dtype=x.dtype, device=x.device)


def as_features(rows: Tensor) -> Tensor:
    """``(B, T, H, W, C)`` memory seen as channels-last features ``(B, C, T, H, W)``."""
    return rows.permute(0, 4, 1, 2, 3)


class DirectBackend(Backend):
    """Ops by channel lists, panels and library convolutions."""

    @abstractmethod
    def gather_panel(
        self,
        src: Tensor,
        samples: Tensor | None = None,
        channels: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        complement: bool = False,
        first: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``src[samples][:, channels]`` times ``scale[samples][:, channels]``, or times 1 minus it, in one pass.

        ``src (B, C, T, H, W)`` in any strides, ``scale (B, C)``, ``samples`` int64, ``channels`` int32. Returns
        a dense channels-last panel, or with ``first`` a channels-first one ``(b, c, T, H, W)``.
        """

    @abstractmethod
    def epilogue(
        self,
        zs: Tensor | None,
        zt: Tensor | None,
        out: Tensor,
        *,
        samples: Tensor | None = None,
        bias: Tensor | None = None,
        relu: bool = False,
        skip: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """``out[samples] = relu(zs + zt + bias) + skip[samples]``, and the tap sums of what was written.

        ``zs, zt (b, T, H, W, O)`` panels; ``out, skip (B, O, T, H, W)`` in any strides; ``bias (O,)``;
        ``sums (B, O, taps)``.
        """

    @abstractmethod
    def gate_merge(
        self,
        dxs: Tensor | None,
        dxt: Tensor | None,
        group: Group,
        gate: Tensor,
        x: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        """``dx = gate*dxs + (1-gate)*dxt`` and ``dgate = <x, dxs - dxt>`` for the samples of ``group``.

        With ``dgate``, the panels ``(b, T, H, W, C)`` hold all channels; without, those the group lists.
        """

    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        outputs = spatial.shape[1]
        out = as_features(empty_rows(x, outputs))
        if out.numel():
            for group in self.groups(x, gate, neuron, spatial):
                zs = self.operate(x, gate, group, spatial, SPATIAL)
                zt = self.operate(x, gate, group, temporal, TEMPORAL)
                self.epilogue(zs, zt, out, samples=group.samples)
        return out

    def groups(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor) -> list[Group]:
        positions = x.shape[2] * x.shape[3] * x.shape[4]
        return group_samples(gate, neuron, spatial.shape[0], positions, spatial.shape[1])

    def operate(self, x: Tensor, gate: Tensor, group: Group, weight: Tensor, kernel: Kernel) -> Tensor | None:
        """One operator on its gathered channels, ``None`` when it has none."""
        channels, count = listed(group, kernel)
        if not count:
            return None
        panel = self.gate_panel(x, gate, group, kernel)
        return convolution.forward(panel, self.weight_panel(weight, group.neuron, channels, panel), kernel)

    def gate_panel(self, x: Tensor, gate: Tensor, group: Group, kernel: Kernel, first: bool = False) -> Tensor:
        """The gated input of one operator: its listed channels."""
        return self.gather_panel(
            x,
            group.samples,
            listed(group, kernel)[0],
            scale=gate.to(x.dtype) if group.scaled else None,
            complement=kernel == TEMPORAL,
            first=first,
            dtype=compute_dtype(x),
        )

    def weight_panel(self, weight: Tensor, neuron: int, channels: Tensor | None, like: Tensor) -> Tensor:
        """One neuron's filter ``(O, c, *kernel)`` as ``(O, taps, c)`` of its listed channels."""
        panel = self.gather_panel(weight[neuron], None, channels, dtype=compute_dtype(weight)).to(like.dtype)
        return panel.view(panel.shape[0], -1, panel.shape[-1])

    def rows(self, features: Tensor, samples: Tensor | None) -> Tensor:
        """Samples of ``(B, C, T, H, W)`` as a channels-last panel, without a copy where they are one."""
        whole = features.permute(0, 2, 3, 4, 1)
        dtype = compute_dtype(features)
        if samples is None and whole.is_contiguous() and features.dtype == dtype:
            return whole
        return self.gather_panel(features, samples, dtype=dtype)

    def gated_conv3d_backward(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        neuron: Tensor,
        spatial: Tensor,
        temporal: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        need_x, need_gate, need_spatial, need_temporal = needs
        dx = torch.empty_like(x) if need_x else None
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if need_gate else None
        dspatial = lazy_zeros(spatial.shape, spatial.dtype, x.device) if need_spatial else None
        dtemporal = lazy_zeros(temporal.shape, temporal.dtype, x.device) if need_temporal else None
        if grad.numel() == 0:
            return dx, dgate, dspatial, dtemporal
        written: set[int] = set()
        for group in self.groups(x, gate, neuron, spatial):
            if need_x or need_gate:
                self.input_gradient(grad, x, gate, group, spatial, temporal, dx, dgate)
            if need_spatial or need_temporal:
                grad_first = self.gather_panel(grad, group.samples, first=True, dtype=compute_dtype(grad))
                add = group.neuron in written
                self.operator_gradient(grad_first, x, gate, group, dspatial, SPATIAL, add)
                self.operator_gradient(grad_first, x, gate, group, dtemporal, TEMPORAL, add)
                written.add(group.neuron)
        return dx, dgate, dspatial, dtemporal

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
        """Both operators' data gradients, merged into ``dx`` and ``dgate``.

        Gates that train need them for every channel; frozen gates need the listed channels only.
        """
        dz = self.rows(grad, group.samples)
        panels = []
        for weight, kernel in ((spatial, SPATIAL), (temporal, TEMPORAL)):
            channels, count = (None, x.shape[1]) if dgate is not None else listed(group, kernel)
            filters = self.weight_panel(weight, group.neuron, channels, dz) if count else None
            panels.append(convolution.data_gradient(dz, filters, kernel) if count else None)
        self.gate_merge(*panels, group, gate, x, dx, dgate)

    def operator_gradient(
        self,
        grad_first: Tensor,
        x: Tensor,
        gate: Tensor,
        group: Group,
        dweight: Tensor | None,
        kernel: Kernel,
        add: bool,
    ) -> None:
        """Gradient of one operator's listed channels, into the slab of its neuron."""
        channels, count = listed(group, kernel)
        if dweight is None or not count:
            return
        panel_first = self.gate_panel(x, gate, group, kernel, first=True)
        found = convolution.weight_gradient(panel_first, grad_first, kernel).to(dweight.dtype)
        slab = dweight[group.neuron]
        if channels is None:
            slab.add_(found) if add else slab.copy_(found)
        else:
            slab.index_add_(1, channels, found) if add else slab.index_copy_(1, channels.long(), found)

    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
        out = as_features(empty_rows(z, mixing.shape[1]))
        kernel = tuple(mixing.shape[3:])
        if out.numel():
            for index, samples, _ in samples_by_neuron(neuron, mixing.shape[0]):
                panel = self.rows(z, samples)
                mixed = convolution.forward(panel, self.weight_panel(mixing, index, None, panel), kernel)
                out = self.scatter(mixed, out, samples)
        return out

    def scatter(self, panel: Tensor, out: Tensor, samples: Tensor | None) -> Tensor:
        """``out`` with ``panel`` as its ``samples``; the panel itself where it is the whole of it."""
        if samples is None and panel.dtype == out.dtype:
            return as_features(panel)
        self.epilogue(panel, None, out, samples=samples)
        return out

    def mixing_conv3d_backward(
        self, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        need_z, need_mixing = needs
        dz = as_features(empty_rows(z, z.shape[1])) if need_z else None
        dmixing = lazy_zeros(mixing.shape, mixing.dtype, z.device) if need_mixing else None
        kernel = tuple(mixing.shape[3:])
        for index, samples, _ in samples_by_neuron(neuron, mixing.shape[0]) if grad.numel() else ():
            if need_z:
                rows = self.rows(grad, samples)
                filters = self.weight_panel(mixing, index, None, rows)
                dz = self.scatter(convolution.data_gradient(rows, filters, kernel), dz, samples)
            if need_mixing:
                dtype = compute_dtype(z)
                z_first = self.gather_panel(z, samples, first=True, dtype=dtype)
                grad_first = self.gather_panel(grad, samples, first=True, dtype=dtype)
                dmixing[index].copy_(convolution.weight_gradient(z_first, grad_first, kernel))
        return dz, dmixing

    def frozen_layer(
        self, x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, channels = x.shape[:2]
        num_neurons, outputs = w.bias.shape
        sums = self.tap_sums(x, w.scoring.shape[2]) if sums is None else sums
        scores = (sums.flatten(1) @ w.scoring.flatten(1).t()) / options.score_divisor
        neuron = scores.argmax(dim=1)

        y = torch.empty_like(skip) if skip is not None else as_features(empty_rows(x, outputs))
        next_sums = torch.empty((batch, outputs, options.next_taps), dtype=scores.dtype, device=x.device)
        if y.numel():
            starts = [0, *w.split.cumsum(0).tolist()]
            for index, samples, _ in samples_by_neuron(neuron, num_neurons):
                zs, zt = self.frozen_operators(x, samples, index, starts, channels, w)
                if w.mixing is not None:
                    z = zs if zt is None else zt if zs is None else zs.add_(zt)
                    kernel = tuple(options.mixing_kernel)
                    zs, zt = convolution.forward(z, w.mixing[index].to(z.dtype), kernel), None
                self.epilogue(
                    zs,
                    zt,
                    y,
                    samples=samples,
                    bias=w.bias[index],
                    relu=options.relu,
                    skip=skip,
                    sums=next_sums if options.next_taps else None,
                )
        return y, next_sums, neuron, scores

    def frozen_operators(
        self, x: Tensor, samples: Tensor | None, n: int, starts: list[int], channels: int, w: FrozenWeights
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both operators of neuron ``n`` on its packed panels."""
        start, stop = starts[n], starts[n + 1]
        split, outputs = stop - start, w.bias.shape[1]
        results = []
        for flat, kernel, taps, begin, listed_channels in (
            (w.spatial, SPATIAL, 9, start, w.channels[n, :split]),
            (w.temporal, TEMPORAL, 3, n * channels - start, w.channels[n, split:]),
        ):
            count = listed_channels.numel()
            if not count:
                results.append(None)
                continue
            panel = self.gather_panel(x, samples, listed_channels, dtype=compute_dtype(x))
            size = outputs * taps
            weight = flat[begin * size : (begin + count) * size].view(outputs, taps, count)
            results.append(convolution.forward(panel, weight.to(panel.dtype), kernel))
        return results[0], results[1]


def listed(group: Group, kernel: Kernel) -> tuple[Tensor | None, int]:
    """A group's channel list for one operator, and its length."""
    if kernel == SPATIAL:
        return group.spatial, group.num_spatial
    return group.temporal, group.num_temporal
