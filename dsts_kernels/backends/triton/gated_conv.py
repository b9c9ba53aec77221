"""Gated convolution on a GPU: which kernels run, in which order, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import tile_channels
from . import launch
from .conv import conv, conv_problem
from .data_gradient import data_gradient
from .filters import pack_filters, unpack_filters
from .lists import Groups, group_samples, list_channels
from .route import pack_features, panel_width
from .schedule import PLAN
from .weight_gradient import filter_gradient


def gated_conv3d(x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    neurons, outputs, channels = spatial.shape[:3]
    out = launch.empty_features(x, outputs)
    if not out.numel():
        return out
    gate, neuron, block_k = gate.contiguous(), neuron.contiguous(), tile_channels(x.dtype)
    width = panel_width(channels, x.dtype, True)
    with launch.on_device(x):
        groups = group_samples(neuron, neurons)
        lists = list_channels(gate, groups, False, block_k)
        panel = pack_features(x, gate, neuron, neurons, lists.plans[:, 5:], lists, width)
        filters = pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
        problem = conv_problem(x, outputs, channels + block_k, 12, 0)
        conv(panel, filters, "listed", lists.plans, out, problem, order=lists.order, rows=channels)
    return out


def gated_conv3d_backward(
    grad: Tensor, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_gate, need_spatial, need_temporal = needs
    if not grad.numel():
        zeros = [
            torch.zeros_like(t) if need else None for t, need in zip((x, gate, spatial, temporal), needs, strict=True)
        ]
        return tuple(zeros)
    gate_rows, neuron, neurons = gate.contiguous(), neuron.contiguous(), spatial.shape[0]
    with launch.on_device(x):
        groups, rows = group_samples(neuron, neurons), launch.rows_of(grad)
        dx = dgate = dspatial = dtemporal = None
        if need_x or need_gate:
            dx, dgate = data_gradient(rows, x, gate_rows, groups, spatial, temporal, need_x, need_gate)
        if need_spatial or need_temporal:
            dspatial, dtemporal = operator_gradients(rows, x, gate_rows, neuron, groups, spatial, temporal)
    return dx, dgate, dspatial if need_spatial else None, dtemporal if need_temporal else None


def operator_gradients(
    rows: Tensor, x: Tensor, gate: Tensor, neuron: Tensor, groups: Groups, spatial: Tensor, temporal: Tensor
) -> tuple[Tensor, Tensor]:
    neurons, outputs, channels = spatial.shape[:3]
    block_k = tile_channels(x.dtype)
    lists = list_channels(gate, groups, True, block_k)
    # Rows of a union are slots; a sample's slot stands where a plan has its first number.
    slots = torch.zeros((x.shape[0], PLAN), dtype=torch.int32, device=x.device)
    slots[:, 0] = groups.slots
    panel = pack_features(x, gate, neuron, neurons, slots, lists, panel_width(channels, x.dtype, True))
    shape = (groups.neuron_of.shape[0] * 12, channels, outputs)
    found = filter_gradient(panel, rows, lists, groups, channels, launch.SPATIAL, True, 1, shape, spatial.dtype)
    return (
        unpack_filters(found, spatial, groups, lists.listed, 1, 0, 12, True),
        unpack_filters(found, temporal, groups, lists.listed, 2, 9, 12, True),
    )
