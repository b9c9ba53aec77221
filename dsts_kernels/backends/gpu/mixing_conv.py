"""A mixing kernel on a GPU: one convolution of all channels with each sample's own filters, and its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import features
from .kernels import Kernels


def mixing_filters(kernels: Kernels, mixing: Tensor, neuron: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """A mixing kernel ``(matrices, O, O)``, what indexes it by sample, and how many sets of taps it has.

    A 1x1x1 kernel serves as it is stored; of another the chosen neurons' are laid out tap by tap.
    """
    neurons, outputs = mixing.shape[:2]
    if mixing.shape[3:].numel() == 1:
        return mixing.to(dtype).reshape(neurons, outputs, outputs).contiguous(), neuron, neurons
    groups = kernels.group_samples(neuron, neurons)
    return kernels.pack_filters([mixing], groups.neuron_of, dtype, False), groups.slots, groups.neuron_of.shape[0]


def mix(kernels: Kernels, z: Tensor, neuron: Tensor, mixing: Tensor, form: str) -> Tensor:
    outputs, kernel = mixing.shape[1], tuple(mixing.shape[3:])
    out, neuron = features.empty_features(z, outputs), neuron.contiguous()
    if out.numel():
        with features.on_device(z):
            filters, index, slots = mixing_filters(kernels, mixing, neuron, z.dtype)
            taps = math.prod(kernel)
            grid = kernels.conv_grid(z, outputs, outputs, taps, 0)
            kernels.conv(
                features.as_ndhwc(z), filters, form, index, out, grid,
                kernel=kernel, with_temporal=False, sign=1 if form == "stored" else -1, k_channels=outputs, slots=slots,
            )  # fmt: skip
    return out


def mixing_conv3d(kernels: Kernels, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
    return mix(kernels, z, neuron, mixing, "stored")


def mixing_conv3d_backward(
    kernels: Kernels, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    dz = mix(kernels, grad, neuron, mixing, "transposed") if needs[0] else None
    if not needs[1]:
        return dz, None
    if not grad.numel():
        return dz, torch.zeros_like(mixing)
    neurons, outputs, kernel = mixing.shape[0], mixing.shape[1], tuple(mixing.shape[3:])
    taps = math.prod(kernel)
    with features.on_device(z):
        groups = kernels.group_samples(neuron.contiguous(), neurons)
        # A 1x1x1 kernel's gradient is written where it belongs; of another it is laid out afterwards.
        whole = torch.zeros(mixing.shape, dtype=mixing.dtype, device=z.device) if taps == 1 else None
        shape = (groups.neuron_of.shape[0] * taps, outputs, outputs)
        panels = features.as_ndhwc(grad), features.as_ndhwc(z)
        found = kernels.weight_gradient(*panels, None, groups, outputs, kernel, False, -1, shape, mixing.dtype, whole)
        return dz, found if taps == 1 else kernels.unpack_filters(found, mixing, groups, None, 3, 0, taps, False)
