"""SlowOnly ResNet-50, TPN's backbone: a 2-d ResNet over frames whose last two stages also look along time.

A stage is a row of bottlenecks: 1x1x1 (in inflated stages 3x1x1), 1x3x3 with the stride, 1x1x1, beside a shortcut. No
stage strides in time, so all frames are kept. Names and shapes of the state are those of mmaction2's
``ResNet3dSlowOnly``: ``conv1``, ``layer1`` to ``layer4``, and within a convolution ``conv`` and ``bn``.

Source: *SlowFast Networks for Video Recognition* (ICCV 2019), the slow pathway alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import describe

__all__ = ["Bottleneck", "ConvNorm", "SlowOnly"]

EXPANSION = 4  # output channels of a bottleneck, in widths of its inner convolutions
INFLATED = (False, False, True, True)  # stages whose first 1x1x1 convolution is a 3x1x1 one


class ConvNorm(nn.Module):
    """A convolution without bias, then BatchNorm and ReLU; either of these can be left out. Padding keeps the size.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: ``(T, H, W)``, odd sides.
        stride: in rows and columns; never in time.
        groups: of the convolution.
        norm: with BatchNorm.
        relu: with ReLU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int, int] = (1, 1, 1),
        *,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = tuple(side // 2 for side in kernel)
        self.conv = nn.Conv3d(inputs, outputs, kernel, (1, stride, stride), padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm3d(outputs) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x, inplace=True) if self.relu else x


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the middle one strides.

    Args:
        inputs: channels in.
        width: channels of the inner convolutions; four times as many come out.
        stride: in rows and columns.
        inflated: the first convolution is 3x1x1.
    """

    def __init__(self, inputs: int, width: int, *, stride: int, inflated: bool) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = ConvNorm(inputs, width, (3, 1, 1) if inflated else (1, 1, 1))
        self.conv2 = ConvNorm(width, width, (1, 3, 3), stride=stride)
        self.conv3 = ConvNorm(width, outputs, relu=False)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = ConvNorm(inputs, outputs, stride=stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class SlowOnly(nn.Module):
    """``(B, 3, T, H, W)`` clips to the features of stages 3 and 4.

    At ``width`` 64 these are ``(B, 1024, T, H / 16, W / 16)`` and ``(B, 2048, T, H / 32, W / 32)``, sizes rounded up.

    Args:
        width: channels of the stem, at least 1.
        blocks: bottlenecks of each of the four stages.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, *, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: got {width}, wanted at least 1")
        if len(blocks) != len(INFLATED) or min(blocks) < 1:
            raise ValueError(f"blocks: got {tuple(blocks)}, wanted at least 1 for each of {len(INFLATED)} stages")
        self.conv1 = ConvNorm(3, width, (1, 7, 7), stride=2)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        inputs = width
        for index, (count, inflated) in enumerate(zip(blocks, INFLATED, strict=True)):
            inner = width * 2**index
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if index and not block else 1
                stage.append(Bottleneck(inputs, inner, stride=stride, inflated=inflated))
                inputs = EXPANSION * inner
            self.add_module(f"layer{index + 1}", stage)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's normal weights by fan-out; a block's last norm starts at 0, so that the block is its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.bn.weight)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Features of stage 3 and of stage 4.

        Raises:
            TypeError, ValueError: ``clips`` is no floating ``(B, 3, T, H, W)``.
        """
        check_clips(clips)
        x = self.layer2(self.layer1(self.maxpool(self.conv1(clips))))
        middle = self.layer3(x)
        return middle, self.layer4(middle)


def check_clips(clips: Tensor) -> None:
    """Refuse what is no batch of clips."""
    if not isinstance(clips, Tensor) or not clips.is_floating_point():
        raise TypeError(f"clips: got {describe(clips)}, wanted a floating tensor (B, 3, T, H, W)")
    if clips.dim() != 5 or clips.shape[1] != 3 or 0 in clips.shape[2:]:
        hint = "; unsqueeze(0) makes one clip a batch" if clips.dim() == 4 and clips.shape[0] == 3 else ""
        if clips.dim() == 5 and clips.shape[2] == 3:
            hint = "; if these are (B, T, 3, H, W), transpose(1, 2) makes them so"
        elif clips.dim() == 5 and clips.shape[4] == 3:
            hint = "; if these are (B, T, H, W, 3), permute(0, 4, 1, 2, 3) makes them so"
        raise ValueError(f"clips: got {describe(clips)}, wanted shape (B, 3, T, H, W), no side 0{hint}")
