"""The recipe's model: a small 3-d ResNet that keeps the frames, DSTS on its features, pooling, a classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dsts_kernels import FusedDSTS


class Block(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        steps = (1, stride, stride)  # frames are kept: what separates fine-grained actions may be a matter of time
        self.first = nn.Conv3d(inputs, outputs, 3, steps, 1, bias=False)
        self.first_norm = nn.BatchNorm3d(outputs)
        self.second = nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm3d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv3d(inputs, outputs, 1, steps, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ActionNet(nn.Module):
    """``(B, 3, T, H, W)`` clips to ``(B, classes)`` logits; features are ``(B, 4 * width, T, H / 8, W / 8)``.

    Args:
        classes: of the task.
        width: channels of the first stage; each of three doubles them.
        dsts: the DSTS module (any ``nn.Module`` on features), or ``None`` for the backbone alone.
    """

    def __init__(self, classes: int, *, width: int = 12, dsts: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (1, 5, 5), (1, 2, 2), (0, 2, 2), bias=False), nn.BatchNorm3d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.dsts = dsts
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.stages(self.stem(clips))
        if self.dsts is not None:
            x = self.dsts(x)
        return self.classifier(x.mean((2, 3, 4)))


def build_model(classes: int, *, width: int = 12, dsts: bool = True, **options: object) -> ActionNet:
    """The backbone with :class:`~dsts_kernels.FusedDSTS` of these options, or without it."""
    module = FusedDSTS(4 * width, **options) if dsts else None
    return ActionNet(classes, width=width, dsts=module)
