"""The DSTS module as a good engineer writes it in plain PyTorch: the baseline worth beating.

Both variants use the exact algebra of the design and nothing outside torch's public interface: scores from
summed features and summed kernels, hard gates as channel lists, samples grouped by neuron. They cover the
paper's own configuration (1x1x1 scoring and mixing kernels, ``routing_gradient="selected"``).

:class:`HandwrittenEval` folds all that can be folded when it is built and keeps data channels-last
throughout, the layout in which oneDNN's and cuDNN's forward convolutions are fastest.
:class:`HandwrittenTrain` runs on the reference's own parameters through one ``autograd.Function`` a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from ..reference import DSTS, DSTSLayer, score_dtype

__all__ = ["HandwrittenEval", "HandwrittenTrain"]


def require_paper_configuration(layer: DSTSLayer) -> None:
    kernels = (*layer.scoring.shape[3:], *layer.mixing.shape[3:])
    if any(n != 1 for n in kernels) or layer.routing_gradient != "selected":
        raise ValueError("reference: wanted 1x1x1 scoring and mixing kernels and routing_gradient='selected'")


def collapsed_scores(sums: Tensor, layer: DSTSLayer, scoring: Tensor, positions: int) -> Tensor:
    """``v (B, N)`` from features summed over positions ``(B, C)`` and kernels summed over outputs ``(N,
    C)``."""
    v = sums @ scoring.t()
    return v / (layer.scoring.shape[1] * positions) if layer.score_reduction == "mean" else v


class FoldedNeuron:
    """One neuron with a hard gate, its mixing and the layer's BatchNorm folded in, weights stored
    channels-last."""

    def __init__(self, layer: DSTSLayer, index: int, scale: Tensor) -> None:
        outputs = layer.mixing.shape[1]
        spatial_side = layer.gate[index] > 0
        self.spatial_channels = spatial_side.nonzero()[:, 0]
        self.temporal_channels = (~spatial_side).nonzero()[:, 0]
        mixing = layer.mixing[index].flatten(1) * scale[:, None]
        spatial = layer.spatial[index, :, spatial_side].flatten(1)
        temporal = layer.temporal[index, :, ~spatial_side].flatten(1)
        spatial = (mixing @ spatial).view(outputs, -1, 3, 3)
        temporal = (mixing @ temporal).view(outputs, -1, 3, 1)
        self.spatial = spatial.contiguous(memory_format=torch.channels_last)
        self.temporal = temporal.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x (B, T, H, W, C)`` to the neuron's normalised output ``(B, T, H, W, O)``."""
        batch, frames, height, width, _ = x.shape
        z = bias.expand(batch, frames, height, width, -1)
        if self.spatial_channels.numel():
            panel = x[..., self.spatial_channels].contiguous().flatten(0, 1).permute(0, 3, 1, 2)  # (BT, C', H, W)
            z = F.conv2d(panel, self.spatial, bias, padding=1)
            z = z.permute(0, 2, 3, 1).unflatten(0, (batch, frames))
        if self.temporal_channels.numel():
            panel = x[..., self.temporal_channels].contiguous().flatten(2, 3).permute(0, 3, 1, 2)  # (B, C', T, HW)
            t = F.conv2d(panel, self.temporal, padding=(1, 0))
            t = t.permute(0, 2, 3, 1).unflatten(2, (height, width))
            z = z.add_(t) if self.spatial_channels.numel() else z + t
        return z


class FoldedLayer:
    """One layer in evaluation: choose a neuron a sample, run each neuron once on its samples."""

    def __init__(self, layer: DSTSLayer) -> None:
        require_paper_configuration(layer)
        norm, outputs = layer.norm, layer.mixing.shape[1]
        scale, bias = layer.mixing.new_ones(outputs), layer.mixing.new_zeros(outputs)
        if norm is not None:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            bias = norm.bias - norm.running_mean * scale
        self.source, self.bias = layer, bias
        self.scoring = layer.scoring.flatten(2).sum(1, dtype=score_dtype(layer.scoring.dtype))
        self.neurons = [FoldedNeuron(layer, i, scale) for i in range(layer.num_neurons)]

    def __call__(self, x: Tensor) -> Tensor:
        sums = x.sum((1, 2, 3), dtype=self.scoring.dtype)
        chosen = collapsed_scores(sums, self.source, self.scoring, x[0, ..., 0].numel()).argmax(1).tolist()
        if len(set(chosen)) == 1:
            z = self.neurons[chosen[0]](x, self.bias)
        else:
            z = x.new_empty(*x.shape[:4], self.bias.numel())
            for i in set(chosen):
                samples = torch.tensor([b for b, j in enumerate(chosen) if j == i], device=x.device)
                z[samples] = self.neurons[i](x[samples], self.bias)
        return z.relu_() if self.source.activation == "relu" else z


class HandwrittenEval(nn.Module):
    """Inference only: folded and gathered when built from a reference in evaluation mode."""

    @torch.no_grad()
    def __init__(self, reference: DSTS) -> None:
        super().__init__()
        self.skip = reference.skip
        self.folded = [FoldedLayer(layer) for layer in reference.layers]

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """``x (B, C, T, H, W)`` to the same shape."""
        h = x.permute(0, 2, 3, 4, 1)
        for layer in self.folded:
            h = layer(h)
        h = h.permute(0, 4, 1, 2, 3)
        return h + x if self.skip else h


class Unit(NamedTuple):
    """Samples that run together: one hard sample on its channel lists, or a neuron's soft samples on all
    channels."""

    neuron: int
    samples: list[int]
    spatial_channels: Tensor | None
    temporal_channels: Tensor | None


def group_units(gate: Tensor, neuron: Tensor) -> list[Unit]:
    """Hard samples have gates of exactly 0 and 1; their lists differ by sample, soft ones share a dense
    pass."""
    hard = ((gate == 0) | (gate == 1)).all(1).tolist()
    units, soft = [], {}
    for b, i in enumerate(neuron.tolist()):
        if hard[b]:
            units.append(Unit(i, [b], gate[b].nonzero()[:, 0], (gate[b] == 0).nonzero()[:, 0]))
        else:
            soft.setdefault(i, []).append(b)
    return units + [Unit(i, samples, None, None) for i, samples in soft.items()]


def lazy_zeros(like: Tensor, device: torch.device) -> Tensor:
    """Zeros that cost nothing until written. ``torch.zeros`` writes every page, and a stacked gradient
    touches one neuron in ten; numpy takes pages the system has already zeroed (calloc). On a two-core virtual
    machine ``torch.zeros`` took 0.6 s for the 377 MB of one layer's spatial gradient."""
    if device.type != "cpu":
        return torch.zeros_like(like, device=device)
    flat = torch.from_numpy(np.zeros(like.numel() * like.element_size(), np.uint8))
    return flat.view(like.dtype).view(like.shape)


def unit_panels(unit: Unit, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """What each operator sees: gathered channels of a hard sample, scaled channels of soft ones."""
    if unit.spatial_channels is None:
        g = gate[unit.samples, :, None, None, None]
        spatial = g * x[unit.samples]
        return spatial, x[unit.samples] - spatial
    sample = x[unit.samples[0]][None]
    return sample.index_select(1, unit.spatial_channels), sample.index_select(1, unit.temporal_channels)


def flat_plane(x: Tensor) -> Tensor:
    """``(B, C, T, H, W)`` as ``(B, C, T, H*W)``: the temporal operator is a 3x1 image convolution."""
    return x.flatten(3)


def listed(weight: Tensor, channels: Tensor | None) -> Tensor:
    return weight if channels is None else weight.index_select(1, channels)


def store_listed(total: Tensor, part: Tensor, channels: Tensor | None, first: bool) -> None:
    """Writes a neuron's first share of a gradient and adds the later ones: no read of memory known to be
    zero."""
    if channels is None:
        total.copy_(part) if first else total.add_(part)
    else:
        total.index_copy_(1, channels, part) if first else total.index_add_(1, channels, part)


class NeuronOperators(torch.autograd.Function):
    """Every sample's ``z'`` through its neuron's operators and mixing, with the stacked weights as arguments.

    Taking the stacked weights whole lets the backward pass allocate each gradient once and write only the
    chosen neurons' part; indexing them under autograd zero-fills and adds the whole stack. Everything stays
    in the default layout: on AVX-512 oneDNN's temporal weight gradient is three times faster there than
    channels-last, and the other passes are within a tenth. A gate's gradient needs both operators' data
    gradients on every channel, so these run dense and only the forward pass and the weight gradients use the
    lists.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor, mixing: Tensor
    ) -> Tensor:
        units, mixed = group_units(gate, neuron), []
        out = x.new_empty(x.shape[0], mixing.shape[1], *x.shape[2:])
        for unit in units:
            i, (xs, xt) = unit.neuron, unit_panels(unit, x, gate)
            parts = []  # an operator without channels is left out
            if xs.shape[1]:
                parts.append(F.conv3d(xs, listed(spatial[i], unit.spatial_channels), padding=(0, 1, 1)))
            if xt.shape[1]:
                t = listed(temporal[i], unit.temporal_channels)[..., 0]
                parts.append(F.conv2d(flat_plane(xt), t, padding=(1, 0)).unflatten(3, x.shape[3:]))
            z = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
            out[unit.samples] = F.conv2d(flat_plane(z), mixing[i, ..., 0]).unflatten(3, x.shape[3:])
            mixed.append(z)
        ctx.units, ctx.mixed = units, mixed
        ctx.save_for_backward(x, gate, spatial, temporal, mixing)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, spatial, temporal, mixing = ctx.saved_tensors
        d_x, d_gate = torch.empty_like(x), torch.empty_like(gate)
        d_spatial, d_temporal, d_mixing = (lazy_zeros(w, w.device) for w in (spatial, temporal, mixing))
        written: set[int] = set()
        for unit, z in zip(ctx.units, ctx.mixed, strict=True):
            i, samples, first = unit.neuron, unit.samples, unit.neuron not in written
            written.add(i)
            d_out = flat_plane(grad[samples])
            w = mixing[i, ..., 0]
            store_listed(d_mixing[i, ..., 0], conv2d_weight(flat_plane(z), w.shape, d_out), None, first)
            d_z = conv2d_input(flat_plane(z).shape, w, d_out)  # (b, O, T, HW)
            d_volume = d_z.view_as(z)

            xs, xt = unit_panels(unit, x, gate)
            if xs.shape[1]:
                shape = (*spatial.shape[1:2], xs.shape[1], 1, 3, 3)
                part = conv3d_weight(xs, shape, d_volume, padding=(0, 1, 1))
                store_listed(d_spatial[i], part, unit.spatial_channels, first)
            if xt.shape[1]:
                shape = (*temporal.shape[1:2], xt.shape[1], 3, 1)
                part = conv2d_weight(flat_plane(xt), shape, d_z, padding=(1, 0))
                store_listed(d_temporal[i, ..., 0], part, unit.temporal_channels, first)

            inputs = x[samples]
            through_t = conv2d_input(flat_plane(inputs).shape, temporal[i, ..., 0], d_z, padding=(1, 0))
            through_t = through_t.view_as(inputs)
            difference = conv3d_input(inputs.shape, spatial[i], d_volume, padding=(0, 1, 1)).sub_(through_t)
            d_gate[samples] = (inputs * difference).flatten(2).sum(2)
            d_x[samples] = through_t.addcmul_(gate[samples, :, None, None, None], difference)
        return d_x, d_gate, None, d_spatial, d_temporal, d_mixing


class HandwrittenLayer(DSTSLayer):
    """A reference layer with its scoring and its operators replaced; gates, routing and norm are the
    reference's."""

    def scores(self, x: Tensor) -> Tensor:
        wide = score_dtype(self.scoring.dtype)
        scoring = self.scoring.flatten(2).sum(1, dtype=wide)
        return collapsed_scores(x.sum((2, 3, 4), dtype=wide), self, scoring, x[0, 0].numel())

    def run_chosen(self, x: Tensor, gate: Tensor, neuron: Tensor) -> Tensor:
        return NeuronOperators.apply(x, gate, neuron, self.spatial, self.temporal, self.mixing)


class HandwrittenTrain(DSTS):
    """Training on the reference's parameters (same ``state_dict``); arguments as
    :class:`dsts_kernels.FusedDSTS`."""

    def __init__(self, in_channels: int, *, num_layers: int = 3, num_neurons: int = 10, **options) -> None:
        super().__init__(in_channels, num_layers=0, num_neurons=num_neurons)
        self.layers = nn.ModuleList(
            HandwrittenLayer(in_channels, num_neurons=num_neurons, **options) for _ in range(num_layers)
        )
        for layer in self.layers:
            require_paper_configuration(layer)
