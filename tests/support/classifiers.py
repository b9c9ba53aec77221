"""A classifier of clips small enough to compile: what is deployed in tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsts_kernels import FusedDSTS

from .modules import enliven


class Classifier(nn.Module):
    """A 3-d convolution with BatchNorm, DSTS, a mean over positions, a linear head: ``(B, 3, T, H, W)`` to scores."""

    def __init__(self, channels: int = 8, classes: int = 5, **options: object) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, channels, 3, stride=(1, 2, 2), padding=1), nn.BatchNorm3d(channels))
        self.dsts: nn.Module = FusedDSTS(channels, **dict(num_neurons=3) | options)
        self.head = nn.Linear(channels, classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.dsts(torch.relu(self.stem(clips))).mean((2, 3, 4)))


def frozen_classifier(**options: object) -> Classifier:
    """One in evaluation, its DSTS frozen, with gates and scores that leave nothing trivial."""
    model = Classifier(**options)
    enliven(model.dsts)
    model.eval().dsts = model.dsts.freeze()
    return model.requires_grad_(False)
