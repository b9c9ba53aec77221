"""Gated convolution on a GPU: which kernels run, in which order, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import tile_channels
from . import features
from .kernels import Kernels
from .lists import Groups, panel_width


def gated_conv3d(
    kernels: Kernels, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor
) -> Tensor:
    neurons, outputs, channels = spatial.shape[:3]
    out = features.empty_features(x, outputs)
    if not out.numel():
        return out
    gate, neuron, block_k = gate.contiguous(), neuron.contiguous(), tile_channels(x.dtype)
    width = panel_width(channels, x.dtype, True)
    with features.on_device(x):
        groups = kernels.group_samples(neuron, neurons)
        lists = kernels.list_channels(gate, groups, False, block_k)
        panel = kernels.gather_panel(x, gate, neuron, neurons, None, lists, width)
        filters = kernels.pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
        grid = kernels.conv_grid(x, outputs, channels + block_k, 12, 0)
        kernels.conv(panel, filters, "listed", lists.plans, out, grid, order=lists.order, k_channels=channels)
    return out


def gated_conv3d_backward(
    kernels: Kernels,
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    neuron: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_gate, need_spatial, need_temporal = needs
    if not grad.numel():
        zeros = [
            torch.zeros_like(t) if need else None for t, need in zip((x, gate, spatial, temporal), needs, strict=True)
        ]
        return tuple(zeros)
    gate_rows, neuron, neurons = gate.contiguous(), neuron.contiguous(), spatial.shape[0]
    with features.on_device(x):
        groups, grad_ndhwc = kernels.group_samples(neuron, neurons), features.as_ndhwc(grad)
        dx = dgate = dspatial = dtemporal = None
        if need_x or need_gate:
            dx, dgate = kernels.data_gradient(grad_ndhwc, x, gate_rows, groups, spatial, temporal, need_x, need_gate)
        if need_spatial or need_temporal:
            wanted = spatial if need_spatial else None, temporal if need_temporal else None
            dspatial, dtemporal = operator_gradients(
                kernels, grad_ndhwc, x, gate_rows, neuron, groups, spatial.shape, wanted
            )
    return dx, dgate, dspatial, dtemporal


def operator_gradients(
    kernels: Kernels,
    grad_ndhwc: Tensor,
    x: Tensor,
    gate: Tensor,
    neuron: Tensor,
    groups: Groups,
    shape: torch.Size,
    wanted: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients like the filters that are ``wanted``, of operators of ``shape (N, O, C, ...)``."""
    neurons, outputs, channels = shape[:3]
    dtype = next(weight.dtype for weight in wanted if weight is not None)
    block_k = tile_channels(x.dtype)
    lists = kernels.list_channels(gate, groups, True, block_k)
    panel = kernels.gather_panel(x, gate, neuron, neurons, groups.slots, lists, panel_width(channels, x.dtype, True))
    room = (groups.neuron_of.shape[0] * 12, channels, outputs)
    found = kernels.weight_gradient(panel, grad_ndhwc, lists, groups, channels, features.SPATIAL, True, 1, room, dtype)
    return tuple(
        None if weight is None else kernels.unpack_filters(found, weight, groups, lists.listed, bit, first, 12, True)
        for weight, bit, first in zip(wanted, (1, 2), (0, 9), strict=True)
    )
