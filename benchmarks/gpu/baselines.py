"""Baselines of evaluation as a good engineer runs them on a GPU: autocast to half, channels-last, lists padded.

The handwritten one is that of :mod:`dsts_kernels.bench.handwritten`, whose panels were laid out for a CPU. cuDNN's
kernels in half precision want channel counts that are multiples of 8 and few distinct shapes, so folded lists are
padded with channels of weight zero. It asks the host who chose which neuron; :class:`PickedEval` does not, so that
it can be captured as a CUDA graph. Training is in :mod:`benchmarks.gpu.handwritten`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.handwritten import MULTIPLE, SPATIAL, TEMPORAL, pick, side_by_side
from dsts_kernels.bench.handwritten import FoldedLayer, HandwrittenEval, collapsed_scores
from dsts_kernels.reference import DSTS

__all__ = ["AutocastDSTS", "PickedEval", "padded"]


class AutocastDSTS(DSTS):
    """The literal module on float32 parameters, its convolutions in half precision."""

    half = torch.bfloat16

    def forward(self, *args, **kwargs):
        with torch.autocast(args[0].device.type, self.half):
            return super().forward(*args, **kwargs)


def padded(module: HandwrittenEval) -> HandwrittenEval:
    """The same module with every channel list a multiple of :data:`MULTIPLE` long: channel 0 again, times zero."""
    for neuron in (neuron for layer in module.folded for neuron in layer.neurons):
        for side in ("spatial", "temporal"):
            channels, weight = getattr(neuron, f"{side}_channels"), getattr(neuron, side)
            extra = -channels.numel() % MULTIPLE
            if channels.numel() and extra:
                weight = F.pad(weight, (0, 0, 0, 0, 0, extra)).contiguous(memory_format=torch.channels_last)
                setattr(neuron, f"{side}_channels", F.pad(channels, (0, extra)))
                setattr(neuron, side, weight)
    return module


class PickedLayer:
    """A folded layer of which the device picks each sample's neuron: all lists are as long as the longest."""

    def __init__(self, layer: FoldedLayer) -> None:
        self.source, self.bias, self.scoring = layer.source, layer.bias, layer.scoring
        self.sides = []  # (N, S) channels, (N, O, kernel, S) weights
        for name in ("spatial", "temporal"):
            lists = [getattr(neuron, f"{name}_channels") for neuron in layer.neurons]
            longest = max(channels.numel() for channels in lists)
            if not longest:
                continue
            channels = torch.stack([F.pad(one, (0, longest - one.numel())) for one in lists])
            weights = [getattr(neuron, name).permute(0, 2, 3, 1) for neuron in layer.neurons]
            weights = torch.stack([F.pad(one, (0, longest - one.shape[-1])) for one in weights])
            self.sides.append((SPATIAL if name == "spatial" else TEMPORAL, channels, weights))

    def sample(self, h: Tensor, neuron: Tensor) -> Tensor:
        parts = []
        for side, channels, weights in self.sides:
            panel = h.index_select(-1, pick(channels, neuron))
            bias = None if parts else self.bias
            y = F.conv2d(side.view(panel), pick(weights, neuron).permute(0, 3, 1, 2), bias, padding=side.padding)
            parts.append(side.back(y, panel))
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    def __call__(self, h: Tensor) -> Tensor:
        """``h (B, T, H, W, C)`` to ``(B, T, H, W, O)``."""
        sums = h.sum((1, 2, 3), dtype=self.scoring.dtype)
        neuron = collapsed_scores(sums, self.source, self.scoring, h[0, ..., 0].numel()).argmax(1)
        tasks = [lambda b=b: self.sample(h[b : b + 1], neuron[b : b + 1]) for b in range(len(h))]
        z = torch.cat(side_by_side(tasks, h.device))
        return z.relu_() if self.source.activation == "relu" else z


class PickedEval(nn.Module):
    """Inference without the host, to be captured; made of :class:`HandwrittenEval`, lists padded."""

    @torch.no_grad()
    def __init__(self, reference: DSTS) -> None:
        super().__init__()
        self.skip = reference.skip
        self.picked = [PickedLayer(layer) for layer in padded(HandwrittenEval(reference)).folded]

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """``x (B, C, T, H, W)`` to the same shape."""
        h = x.permute(0, 2, 3, 4, 1).contiguous()
        for layer in self.picked:
            h = layer(h)
        h = h.permute(0, 4, 1, 2, 3)
        return h + x if self.skip else h
