"""A mixing kernel on a GPU: one convolution of all channels with each sample's own filters, and its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import features
from .kernels import Kernels


class MixingConv:
    """The op and its gradient, for a backend with launchers."""

    kernels: Kernels

    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor, form: str = "stored") -> Tensor:
        """``z (B, O, T, H, W)`` mixed; ``form`` "transposed" turns the filters round, which gives the gradient of it.

        A 1x1x1 kernel serves as it is stored; of another the chosen neurons' are laid out tap by tap.
        """
        kernels, (neurons, outputs), kernel = self.kernels, mixing.shape[:2], tuple(mixing.shape[3:])
        out, index, taps = features.empty_features(z, outputs), neuron.contiguous(), math.prod(kernel)
        if not out.numel():
            return out
        with features.on_device(z):
            if taps == 1:
                filters, slots = mixing.to(z.dtype).reshape(neurons, outputs, outputs).contiguous(), neurons
            else:
                groups = kernels.group_samples(index, neurons)
                filters = kernels.pack_filters([mixing], groups.neuron_of, z.dtype, False)
                index, slots = groups.slots, groups.neuron_of.shape[0]
            grid = kernels.conv_grid(z, outputs, outputs, taps, 0)
            kernels.conv(
                features.as_ndhwc(z), filters, form, index, out, grid,
                kernel=kernel, with_temporal=False, sign=1 if form == "stored" else -1, k_channels=outputs, slots=slots,
            )  # fmt: skip
        return out

    def mixing_conv3d_backward(
        self, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        dz = self.mixing_conv3d(grad, neuron, mixing, "transposed") if needs[0] else None
        if not needs[1]:
            return dz, None
        if not grad.numel():
            return dz, torch.zeros_like(mixing)
        with features.on_device(z):
            return dz, mixing_gradient(self.kernels, features.as_ndhwc(grad), features.as_ndhwc(z), neuron, mixing)


def mixing_gradient(
    kernels: Kernels,
    grad_ndhwc: Tensor,  # (B, T, H, W, O)
    z_ndhwc: Tensor,  # (B, T, H, W, O)
    neuron: Tensor,  # (B,)
    mixing: Tensor,  # (N, O, O, *kernel)
) -> Tensor:
    """Gradient of ``mixing``. That of a 1x1x1 kernel is written where it belongs; another is laid out afterwards."""
    neurons, outputs, kernel = mixing.shape[0], mixing.shape[1], tuple(mixing.shape[3:])
    taps, groups = math.prod(kernel), kernels.group_samples(neuron.contiguous(), neurons)
    whole = torch.zeros(mixing.shape, dtype=mixing.dtype, device=mixing.device) if taps == 1 else None
    by_slot = (groups.neuron_of.shape[0] * taps, outputs, outputs)
    gradients = kernels.weight_gradient(
        grad_ndhwc, z_ndhwc, None, groups, outputs, kernel, False, -1, by_slot, mixing.dtype, whole
    )
    if whole is not None:
        return gradients
    return kernels.unpack_filters(gradients, mixing, groups, None, 0, 0, taps, False)
