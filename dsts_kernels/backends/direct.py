"""Gated convolution on gathered channels: what the CPU and the plain PyTorch backend have in common.

The work of an op goes through a handful of passes over memory (``gather_panel``, ``epilogue``, ``gate_merge``,
``tap_sums``), which a subclass supplies, and through :mod:`.convolution`. Samples are grouped on the host by
:mod:`.plan`. Panels are dense and channels-last, ``(b, T, H, W, c)``, unless their name ends in ``_first``.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .base import Backend, FrozenOptions, FrozenWeights
from .convolution import SPATIAL, TEMPORAL, Kernel
from .memory import lazy_zeros
from .packing import Place, places, unpack_at, unpack_mixing
from .plan import DIRECT_COSTS, Costs, Group, group_samples, samples_by_neuron


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
        lists: tuple[Tensor | None, Tensor | None],
        samples: Tensor | None,
        gate: Tensor,
        x: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        """``dx = gate*dxs + (1-gate)*dxt`` and ``dgate = <x, dxs - dxt>``, for some samples.

        ``dxs, dxt`` are panels ``(b, T, H, W, c)`` of the listed channels, spatial and temporal; a list of ``None``
        is all channels, a panel of ``None`` is zero. The other four are ``(B, C)`` or ``(B, C, T, H, W)``.
        """

    def groups(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, limited: bool = False) -> list[Group]:
        return group_samples(gate, neuron, spatial.shape[0], positions_of(x), spatial.shape[1], self.costs(x), limited)

    def costs(self, x: Tensor) -> Costs:
        """What :mod:`.plan` reckons with for these features."""
        return DIRECT_COSTS

    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        outputs = spatial.shape[1]
        out = as_features(empty_rows(x, outputs))
        for group in self.groups(x, gate, neuron, spatial, limited=True) if out.numel() else ():
            self.run_group(x, gate, group, spatial, temporal, out)
        return out

    def run_group(self, x: Tensor, gate: Tensor, group: Group, spatial: Tensor, temporal: Tensor, out: Tensor) -> None:
        """One group's samples of :meth:`gated_conv3d`."""
        panels = [
            self.gate_panel(x, gate, group, group.spatial, SPATIAL),
            self.gate_panel(x, gate, group, group.temporal, TEMPORAL),
        ]
        for block in operator_blocks(out.shape[1], group.spatial.numel(), group.temporal.numel()):
            zs = self.operate(panels[0], spatial[group.neuron, block], group.spatial, SPATIAL)
            zt = self.operate(panels[1], temporal[group.neuron, block], group.temporal, TEMPORAL)
            self.epilogue(zs, zt, out[:, block], samples=group.samples)

    def gate_panel(
        self, x: Tensor, gate: Tensor, group: Group, channels: Tensor, kernel: Kernel, first: bool = False
    ) -> Tensor | None:
        """The gated input of one operator on some of its channels; ``None`` where there are none."""
        if not channels.numel():
            return None
        return self.gather_panel(
            x,
            group.samples,
            channels,
            scale=gate.to(x.dtype) if group.scaled else None,
            complement=kernel == TEMPORAL,
            first=first,
            dtype=compute_dtype(x),
        )

    def operate(self, panel: Tensor | None, weight: Tensor, channels: Tensor, kernel: Kernel) -> Tensor | None:
        """One operator ``(O, C, *kernel)`` on the panel of its listed channels."""
        if panel is None:
            return None
        return convolution.forward(panel, self.weight_panel(weight, channels, panel), kernel)

    def weight_panel(self, weight: Tensor, channels: Tensor | None, like: Tensor) -> Tensor:
        """One neuron's filter ``(O, C, *kernel)`` as ``(O, taps, c)`` of its listed channels."""
        if channels is None and weight.shape[2:].numel() == 1 and weight.dtype == like.dtype:
            return weight.reshape(weight.shape[0], 1, -1)
        panel = self.gather_panel(weight, None, channels, dtype=compute_dtype(weight)).to(like.dtype)
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
        written: set[int] = set()
        for group in self.groups(x, gate, neuron, spatial) if grad.numel() else ():
            if need_x or need_gate:
                self.input_gradient(grad, x, gate, group, spatial, temporal, dx, dgate)
            if need_spatial or need_temporal:
                slabs = [None if total is None else total[group.neuron] for total in (dspatial, dtemporal)]
                self.weight_gradient(grad, x, gate, group, *slabs, add=group.neuron in written)
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
        """Both operators' data gradients, merged into ``dx`` and ``dgate``, a block of channels at a time.

        Gates that train need them for every channel; frozen gates need the listed channels only.
        """
        dz = self.rows(grad, group.samples)
        for block in operator_blocks(x.shape[1], spatial.shape[1], spatial.shape[1]):
            lists, panels = [], []
            for weight, kernel, channels in (
                (spatial, SPATIAL, group.spatial),
                (temporal, TEMPORAL, group.temporal),
            ):
                own = None if dgate is not None else within(channels, block)
                lists.append(own)
                if own is not None and not own.numel():
                    panels.append(None)
                else:
                    filters = self.weight_panel(weight[group.neuron, :, block], own, dz)
                    panels.append(convolution.data_gradient(dz, filters, kernel))
            cut = [None if t is None else t[:, block] for t in (gate, x, dx, dgate)]
            self.gate_merge(*panels, tuple(lists), group.samples, *cut)

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
        """Gradients of one neuron's operators, over its listed channels, into slabs ``(O, C, *kernel)``."""
        grad_first = self.gather_panel(grad, group.samples, first=True, dtype=compute_dtype(grad))
        for slab, channels, kernel in ((dspatial, group.spatial, SPATIAL), (dtemporal, group.temporal, TEMPORAL)):
            if slab is not None:
                self.operator_gradient(grad_first, x, gate, group, slab, channels, kernel, add)

    def operator_gradient(
        self,
        grad_first: Tensor,
        x: Tensor,
        gate: Tensor,
        group: Group,
        slab: Tensor,
        channels: Tensor,
        kernel: Kernel,
        add: bool,
    ) -> None:
        """Gradient of one operator's listed channels, into the slab ``(O, C, *kernel)`` of its neuron."""
        for block in convolution.gradient_blocks(channels.numel()):
            own = channels[block]
            panel_first = self.gate_panel(x, gate, group, own, kernel, first=True)
            found = convolution.weight_gradient(panel_first, grad_first, kernel).to(slab.dtype)
            own = own.to(slab.device, torch.long)  # lists are on the CPU
            slab.index_add_(1, own, found) if add else slab.index_copy_(1, own, found)

    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
        out = as_features(empty_rows(z, mixing.shape[1]))
        kernel = tuple(mixing.shape[3:])
        if out.numel():
            for index, samples in samples_by_neuron(neuron, mixing.shape[0], positions_of(z)):
                panel = self.rows(z, samples)
                mixed = convolution.forward(panel, self.weight_panel(mixing[index], None, panel), kernel)
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
        for index, samples in samples_by_neuron(neuron, mixing.shape[0]) if grad.numel() else ():
            if need_z:
                rows = self.rows(grad, samples)
                filters = self.weight_panel(mixing[index], None, rows)
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
        batch = x.shape[0]
        num_neurons, outputs = w.bias.shape
        sums = self.tap_sums(x, w.scoring.shape[2]) if sums is None else sums
        scores = F.linear(sums.flatten(1), w.scoring.flatten(1))
        divisor = options.score_divisor(x)
        if divisor != 1:
            scores = scores / divisor
        neuron = scores.argmax(dim=1)

        y = torch.empty_like(skip) if skip is not None else as_features(empty_rows(x, outputs))
        next_sums = torch.empty((batch, outputs, options.next_taps), dtype=scores.dtype, device=x.device)
        if y.numel():
            where = places(w.starts.tolist(), x.shape[1], outputs, options.packing, w.filters.dtype)
            for index, samples in samples_by_neuron(neuron, num_neurons, positions_of(x)):
                self.frozen_neuron(x, samples, index, where[index], y, next_sums, skip, w, options)
        return y, next_sums, neuron, scores

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
        """Neuron ``n`` on its samples: packed operators, then mixing where it does not fold, then the epilogue."""
        outputs = w.bias.shape[1]
        split = where[0].channels
        lists = w.channels[n, :split], w.channels[n, split:]
        filters = (
            unpack_at(w.filters, where[0], options.packing, outputs, 9),
            unpack_at(w.filters, where[1], options.packing, outputs, 3),
        )
        panels = [self.gather_panel(x, samples, own, dtype=compute_dtype(x)) if own.numel() else None for own in lists]

        def operate(block: slice) -> list[Tensor | None]:
            return [
                None if panel is None else convolution.forward(panel, flat[block].to(panel.dtype), kernel)
                for panel, flat, kernel in zip(panels, filters, (SPATIAL, TEMPORAL), strict=True)
            ]

        def finish(zs: Tensor | None, zt: Tensor | None, block: slice) -> None:
            self.epilogue(
                zs,
                zt,
                y[:, block],
                samples=samples,
                bias=w.bias[n, block],
                relu=options.relu,
                skip=None if skip is None else skip[:, block],
                sums=next_sums[:, block] if options.next_taps else None,
            )

        if w.mixing is None:
            for block in operator_blocks(outputs, split, x.shape[1] - split):
                finish(*operate(block), block)
        else:
            whole = slice(0, outputs)
            zs, zt = operate(whole)
            z = zs if zt is None else zt if zs is None else zs.add_(zt)
            kernel = tuple(options.mixing_kernel)
            taps = kernel[0] * kernel[1] * kernel[2]
            mixing = unpack_mixing(w.mixing[n], options.packing, outputs, taps)
            finish(convolution.forward(z, mixing.to(z.dtype), kernel), None, whole)


def positions_of(x: Tensor) -> int:
    return x.shape[2] * x.shape[3] * x.shape[4]


def operator_blocks(rows: int, spatial: int, temporal: int) -> list[slice]:
    """Blocks of ``rows`` channels for both operators, whose other side has so many channels."""
    return convolution.filter_blocks(rows, max(9 * spatial, 3 * temporal))


def within(channels: Tensor, block: slice) -> Tensor:
    """The listed channels that lie in a block, counted from its start."""
    return channels[(channels >= block.start) & (channels < block.stop)] - block.start
