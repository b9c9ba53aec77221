"""Models whose answer is known: weights set by code, so that routing and gates are worth what their builder knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsts_kernels import FusedDSTS
from dsts_kernels.data.cells import CUES, GLYPHS, GROUPS, GlyphDetector

CHANNELS = GLYPHS + CUES
ACROSS, ALONG = torch.tensor([-1.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, 1.0])
FILTERS = {
    "rows": torch.outer(ACROSS, ALONG),
    "columns": torch.outer(ALONG, ACROSS),
    "checker": torch.outer(ACROSS, ACROSS),
    "fast": ACROSS,
    "slow or half": torch.tensor([1.0, 0.0, -1.0]),
}
PLACE = {name: place for place, name in enumerate(FILTERS)}
GAIN = 10.0  # of an operator's answer, beside what the skip connection adds to it
# What speaks for the first of a group's classes: weights of the answers.
TOLD = (
    {"rows": 1.0, "columns": -1.0},
    {"checker": 1.0, "columns": -1.0},
    {"fast": 1.0, "slow or half": -3.0},
    {"fast": 1.0, "slow or half": -3.0},
)


@torch.no_grad()
def built_by_hand(spatial_glyphs: list[Tensor] | None = None, **options) -> FusedDSTS:
    """One layer that solves ``SyntheticCells`` behind :class:`GlyphDetector`.

    Neuron 0 looks along space in all channels and neuron 1 along time; the cue chooses. ``spatial_glyphs`` gives, for
    every neuron, which glyphs' channels are spatial instead ``(GLYPHS,)`` bool; each neuron then has all filters.
    """
    neurons = 2 if spatial_glyphs is None else len(spatial_glyphs)
    dsts = FusedDSTS(CHANNELS, num_layers=1, num_neurons=neurons, **options)
    layer = dsts.layers[0]
    for weight in (layer.scoring, layer.spatial, layer.temporal, layer.mixing):
        weight.zero_()
    layer.mixing[:] = torch.eye(CHANNELS).view(CHANNELS, CHANNELS, 1, 1, 1)
    for neuron in range(neurons):
        for name, taps in FILTERS.items():
            operator = layer.spatial if taps.dim() == 2 else layer.temporal
            shaped = taps.view(1, 1, 3, 3) if taps.dim() == 2 else taps.view(1, 3, 1, 1)
            operator[neuron, PLACE[name], :GLYPHS] = GAIN * shaped
        if spatial_glyphs is None:
            layer.gate[neuron] = 3.0 if neuron == 0 else -3.0
        else:
            layer.gate[neuron] = -3.0
            layer.gate[neuron, :GLYPHS][spatial_glyphs[neuron]] = 3.0
    if neurons == 2:
        for group, (what, _) in enumerate(GROUPS):
            layer.scoring[0 if what == "space" else 1, :, GLYPHS + group] = 1.0
    return dsts


class Head(nn.Module):
    """The linear classifier that reads it: the cue names the group, answers of the filters its member."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.zeros(2 * CUES, CHANNELS)
        for group, told in enumerate(TOLD):
            for member, sign in enumerate((1.0, -1.0)):
                weight[2 * group + member, GLYPHS + group] = 1000.0
                for name, share in told.items():
                    weight[2 * group + member, PLACE[name]] = sign * share
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((2, 3, 4)) @ self.weight.T


class Solved(nn.Module):
    """Clips to logits: detector, DSTS, head."""

    def __init__(self, dsts: nn.Module | None = None) -> None:
        super().__init__()
        self.detector = GlyphDetector(threshold=0.15)  # noise that falls short of it is off
        self.dsts, self.head = built_by_hand() if dsts is None else dsts, Head()

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.dsts(self.detector(clips)))
