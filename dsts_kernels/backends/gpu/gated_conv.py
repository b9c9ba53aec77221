"""Gated convolution on a GPU: which kernels run, in which order, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import tile_channels
from . import features, switches
from .kernels import Kernels
from .lists import READ_BY_SPATIAL, READ_BY_TEMPORAL, Groups, Lists, panel_width

SPATIAL_TAPS, TAPS = 9, 12  # of the spatial operator, whose taps come first, and of both


class Kept(NamedTuple):
    """What a backward pass takes from its forward pass; autograd saves it as plain tensors.

    Filters are a copy: ``12*C*O`` numbers for each slot, 201 MB a layer at the paper's size in half precision.
    """

    groups: Groups | None = None
    lists: Lists | None = None  # of samples
    filters: Tensor | None = None  # (S * 12, C, O), rows perhaps padded

    def tensors(self, needs: Sequence[bool]) -> list[Tensor]:
        """What a backward pass uses that computes gradients of ``needs`` (x, gate, neuron, spatial, temporal)."""
        if not (any(needs) and switches.current().keep_lists):
            return []
        return [*self.groups, self.lists.order, self.lists.plans, *([self.filters] if keeps_filters(needs) else [])]

    @classmethod
    def read(cls, tensors: Sequence[Tensor]) -> Kept:
        """Of what :meth:`tensors` gave."""
        if not tensors:
            return cls()
        count = len(Groups._fields)
        order, plans, *filters = tensors[count:]
        return cls(Groups(*tensors[:count]), Lists(order, plans, None), *filters)


def keeps_filters(needs: Sequence[bool]) -> bool:
    """Whether a backward pass for gradients of ``needs`` takes the filters of its forward pass."""
    switch = switches.current()
    return any(needs) and switch.keep_lists and switch.keep_filters and (needs[0] or needs[1])


class GatedConv:
    """The op and its gradient, for a backend with launchers."""

    kernels: Kernels

    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        return self.gated_conv3d_keeping(x, gate, neuron, spatial, temporal, ())[0]

    def gated_conv3d_keeping(
        self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The op, and what its backward pass is given as ``kept``; ``needs`` says which inputs want a gradient."""
        kernels, (neurons, outputs, channels) = self.kernels, spatial.shape[:3]
        out = features.empty_features(x, outputs)
        if not out.numel():
            return out, ()
        gate, neuron, block_k = gate.contiguous(), neuron.contiguous(), tile_channels(x.dtype)
        width = panel_width(channels, x.dtype, True)
        with features.on_device(x):
            groups = kernels.group_samples(neuron, neurons)
            lists = kernels.list_channels(gate, groups, False, block_k)
            panel = kernels.gather_panel(x, gate, neuron, neurons, None, lists, width)
            whole = keeps_filters(needs) or not switches.current().read_filters  # a data gradient reads every channel
            read = None if whole else (gate, groups)
            filters = kernels.pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True, read)
            grid = kernels.conv_grid(x, outputs, channels + block_k, TAPS, 0)
            kernels.conv(panel, filters, "listed", lists.plans, out, grid, order=lists.order, k_channels=channels)
        return out, Kept(groups, lists, filters).tensors(needs)

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
        kernels, (need_x, need_gate, need_spatial, need_temporal) = self.kernels, needs
        if not grad.numel():
            inputs = zip((x, gate, spatial, temporal), needs, strict=True)
            return tuple(torch.zeros_like(t) if need else None for t, need in inputs)
        gate, neuron, neurons = gate.contiguous(), neuron.contiguous(), spatial.shape[0]
        with features.on_device(x):
            groups, lists, filters = Kept.read(kept)
            groups, grad_ndhwc = groups or kernels.group_samples(neuron, neurons), features.as_ndhwc(grad)
            dx = dgate = dspatial = dtemporal = None
            if need_x or need_gate:
                lists = lists or kernels.list_channels(gate, groups, False, tile_channels(x.dtype))
                if filters is None:
                    filters = kernels.pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
                dx, dgate = kernels.data_gradient(grad_ndhwc, x, gate, lists, filters, need_x, need_gate)
            if need_spatial or need_temporal:
                wanted = spatial if need_spatial else None, temporal if need_temporal else None
                dspatial, dtemporal = operator_gradients(
                    kernels, grad_ndhwc, x, gate, neuron, groups, spatial.shape, wanted
                )
        return dx, dgate, dspatial, dtemporal


def operator_gradients(
    kernels: Kernels,
    grad_ndhwc: Tensor,  # (B, T, H, W, O)
    x: Tensor,  # (B, C, T, H, W)
    gate: Tensor,  # (B, C)
    neuron: Tensor,  # (B,)
    groups: Groups,
    shape: torch.Size,
    wanted: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients like the filters that are ``wanted``, of operators of ``shape (N, O, C, ...)``."""
    neurons, outputs, channels = shape[:3]
    dtype = next(weight.dtype for weight in wanted if weight is not None)
    lists = kernels.list_channels(gate, groups, True, tile_channels(x.dtype))
    panel = kernels.gather_panel(x, gate, neuron, neurons, groups.slots, lists, panel_width(channels, x.dtype, True))
    by_slot = (groups.neuron_of.shape[0] * TAPS, channels, outputs)
    gradients = kernels.weight_gradient(
        panel, grad_ndhwc, lists, groups, channels, features.SPATIAL, True, 1, by_slot, dtype
    )
    readers, firsts = (READ_BY_SPATIAL, READ_BY_TEMPORAL), (0, SPATIAL_TAPS)
    return tuple(
        None
        if weight is None
        else kernels.unpack_filters(gradients, weight, groups, lists.listed, reader, first, TAPS, True)
        for weight, reader, first in zip(wanted, readers, firsts, strict=True)
    )
