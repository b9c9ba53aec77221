"""A small 3-d ResNet that keeps the frames: the training recipe's own backbone, trained in minutes on two cores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TinyNet"]


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


class TinyNet(nn.Module):
    """``(B, 3, T, H, W)`` clips to ``(B, num_classes)`` logits; ``stages`` gives ``(B, 4 * width, T, H / 8, W / 8)``.

    Args:
        num_classes: of the task.
        width: channels of the first stage; each of the two after it doubles them.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, num_classes: int, *, width: int = 12) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted at least 1")
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (1, 5, 5), (1, 2, 2), (0, 2, 2), bias=False), nn.BatchNorm3d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(clips)).mean((2, 3, 4)))
