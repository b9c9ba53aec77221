"""TPN once more, step by step from its ``state_dict`` with plain functions: what ours is compared with.

Written from the formulas of *Temporal Pyramid Network for Action Recognition* and the published configuration; every
stride, padding and number of groups is stated where it is used, and nothing is shared with the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


class LiteralTPN:
    """``LiteralTPN(state, training, flow)(clips)`` is logits of the head and of the auxiliary one, without dropout."""

    def __init__(self, state: dict[str, Tensor], training: bool, flow: str = "cascade") -> None:
        self.state, self.training, self.flow = state, training, flow

    def conv(self, name: str, x: Tensor, stride=(1, 1, 1), padding=(0, 0, 0), groups: int = 1) -> Tensor:
        return F.conv3d(x, self.state[f"{name}.conv.weight"], None, stride, padding, 1, groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = self.state[f"{name}.bn.running_mean"], self.state[f"{name}.bn.running_var"]
        if self.training:
            mean, variance = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), correction=0)
        column = (None, slice(None), None, None, None)
        x = (x - mean[column]) / (variance[column] + 1e-5).sqrt()
        return x * self.state[f"{name}.bn.weight"][column] + self.state[f"{name}.bn.bias"][column]

    def bottleneck(self, name: str, x: Tensor, stride: int, looks_along_time: bool) -> Tensor:
        steps = (1, stride, stride)
        y = self.conv(f"{name}.conv1", x, padding=(1, 0, 0) if looks_along_time else (0, 0, 0))
        y = self.norm(f"{name}.conv1", y).relu()
        y = self.norm(f"{name}.conv2", self.conv(f"{name}.conv2", y, steps, (0, 1, 1))).relu()
        y = self.norm(f"{name}.conv3", self.conv(f"{name}.conv3", y))
        if f"{name}.downsample.conv.weight" in self.state:
            x = self.norm(f"{name}.downsample", self.conv(f"{name}.downsample", x, steps))
        return (x + y).relu()

    def stage(self, number: int, x: Tensor) -> Tensor:
        block = 0
        while f"backbone.layer{number}.{block}.conv1.conv.weight" in self.state:
            stride = 2 if number > 1 and block == 0 else 1
            x = self.bottleneck(f"backbone.layer{number}.{block}", x, stride, looks_along_time=number >= 3)
            block += 1
        return x

    def backbone(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm("backbone.conv1", self.conv("backbone.conv1", clips, (1, 2, 2), (0, 3, 3))).relu()
        frames = x.transpose(1, 2).flatten(0, 1)  # each frame by itself
        x = F.max_pool2d(frames, 3, 2, 1).unflatten(0, (len(clips), -1)).transpose(1, 2)
        middle = self.stage(3, self.stage(2, self.stage(1, x)))
        return middle, self.stage(4, middle)

    def along_time(self, name: str, x: Tensor, groups: int) -> Tensor:
        return self.conv(name, x, padding=(1, 0, 0), groups=groups)

    def fusion(self, name: str, levels: list[Tensor]) -> Tensor:
        parts = []
        for index, x in enumerate(levels):
            own = f"neck.{name}.downsamples.{index}.conv"
            parts.append(self.norm(own, self.conv(own, x, groups=GROUPS)).relu())
        own = f"neck.{name}.fusion_conv"
        return self.norm(own, self.conv(own, torch.cat(parts, 1))).relu()

    def neck(self, middle: Tensor, top: Tensor) -> Tensor:
        own = "neck.spatial_modulation.spatial_modulation.0.0"
        levels = [self.norm(own, self.conv(own, middle, (1, 2, 2), (0, 1, 1))).relu(), top]
        for index, x in enumerate(levels):
            x = self.along_time(f"neck.temporal_modulation_ops.{index}.conv", x, GROUPS)
            levels[index] = torch.stack([piece.amax(2) for piece in x.split(8, 2)], 2)
        first, second = levels
        top_down = self.fusion("level_fusion_1", [first + second, second])
        if self.flow == "cascade":
            first = first + second
        second = second + self.along_time("neck.downsample_ops.0.conv", first, 1)
        bottom_up = self.fusion("level_fusion_2", [first, second])
        own = "neck.pyramid_fusion"
        return self.norm(own, self.conv(own, torch.cat([top_down, bottom_up], 1))).relu()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def __call__(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        middle, top = self.backbone(clips)
        own = "neck.aux_head.conv"
        aux = self.norm(own, self.conv(own, middle, (1, 2, 2), (0, 1, 1))).relu()
        return self.linear("cls_head.fc_cls", self.neck(middle, top)), self.linear("neck.aux_head.fc", aux)
