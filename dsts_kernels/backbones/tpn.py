"""TPN, the first of the paper's two backbones: SlowOnly ResNet-50, the temporal pyramid neck and its head.

    clips -> backbone -> middle (stage 3), top (stage 4)
        spatial modulation   middle to the size and the channels of top
        temporal modulation  of each: a grouped 3x1x1 convolution, then the maximum over ``temporal_pool`` frames
        top-down flow        middle + top, and top, fused                      level_fusion_1
        bottom-up flow       that sum, and top + its 3x1x1 convolution, fused  level_fusion_2
        both fused                                                             pyramid_fusion
    -> mean over positions -> dropout -> logits

In training an auxiliary head classifies ``middle`` by itself. Names, shapes and order of the state are those of
mmaction2's ``tpn-slowonly_r50_8x8x1``, so its files load: :func:`~dsts_kernels.backbones.load_mmaction2`.

Source: *Temporal Pyramid Network for Action Recognition* (CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .slowonly import EXPANSION, ConvNorm, SlowOnly

__all__ = ["TPN", "TPNOutput", "TemporalPyramid", "classification_loss", "tpn_slowonly_r50"]

FLOWS = ("cascade", "parallel")
GROUPS = 32  # of the neck's grouped convolutions
POSITIONS = (2, 3, 4)


class TPNOutput(NamedTuple):
    """What TPN with an auxiliary head returns in training: two times ``(B, num_classes)``."""

    logits: Tensor
    aux_logits: Tensor


class _Branch(nn.Module):
    """A convolution, then the maximum over each ``pool`` frames; the last window may be short."""

    def __init__(self, conv: ConvNorm, pool: int = 1) -> None:
        super().__init__()
        self.conv = conv
        self.pool = nn.MaxPool3d((pool, 1, 1), ceil_mode=True) if pool > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.pool is None else self.pool(x)


class LevelFusion(nn.Module):
    """A grouped 1x1x1 convolution of each level, then one of both together: ``channels`` each to twice as many."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(_Branch(ConvNorm(channels, channels, groups=GROUPS)) for _ in range(2))
        self.fusion_conv = ConvNorm(2 * channels, 2 * channels)

    def forward(self, middle: Tensor, top: Tensor) -> Tensor:
        first, second = self.downsamples
        return self.fusion_conv(torch.cat([first(middle), second(top)], 1))


class SpatialModulation(nn.Module):
    """The middle level at the size and with the channels of the top one; the top one as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        halving = nn.Sequential(ConvNorm(channels, 2 * channels, (1, 3, 3), stride=2))
        self.spatial_modulation = nn.ModuleList([halving, nn.Identity()])

    def forward(self, middle: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.spatial_modulation
        return first(middle), second(top)


class AuxHead(nn.Module):
    """Logits from the middle level alone: a strided 1x3x3 convolution, the mean, dropout, a linear layer."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, 2 * channels, (1, 3, 3), stride=2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * channels, num_classes)

    def forward(self, middle: Tensor) -> Tensor:
        return self.fc(self.dropout(self.conv(middle).mean(POSITIONS)))


class TemporalPyramid(nn.Module):
    """The neck: features of two stages to ``(B, 2 * channels, T / temporal_pool, H / 2, W / 2)``, sizes rounded up.

    Args:
        channels: of the middle level, a multiple of 32; the top one has twice as many.
        aux_classes: classes of the auxiliary head; ``None`` is none.
        temporal_pool: frames that one maximum is taken over.
        flow: where the bottom-up flow starts: with ``"cascade"`` from the top-down flow's sum, with ``"parallel"`` from
            the modulated middle level.
        dropout: of the auxiliary head.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        channels: int = 1024,
        *,
        aux_classes: int | None = None,
        temporal_pool: int = 8,
        flow: str = "cascade",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if channels < GROUPS or channels % GROUPS:
            raise ValueError(f"channels: got {channels}, wanted a multiple of {GROUPS}")
        if temporal_pool < 1:
            raise ValueError(f"temporal_pool: got {temporal_pool}, wanted at least 1 frame")
        if flow not in FLOWS:
            raise ValueError(f"flow: got {flow!r}, wanted one of {', '.join(map(repr, FLOWS))}")
        self.flow = flow
        along_time = {"kernel": (3, 1, 1), "norm": False, "relu": False}
        self.temporal_modulation_ops = nn.ModuleList(
            _Branch(ConvNorm(2 * channels, channels, groups=GROUPS, **along_time), temporal_pool) for _ in range(2)
        )
        self.downsample_ops = nn.ModuleList([_Branch(ConvNorm(channels, channels, **along_time))])
        self.level_fusion_1 = LevelFusion(channels)
        self.spatial_modulation = SpatialModulation(channels)
        self.level_fusion_2 = LevelFusion(channels)
        self.pyramid_fusion = ConvNorm(4 * channels, 2 * channels)
        self.aux_head = None if aux_classes is None else AuxHead(channels, aux_classes, dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform weights; the auxiliary head's linear layer is normal."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.BatchNorm3d):
                module.reset_parameters()
        if self.aux_head is not None:
            reset_classifier(self.aux_head.fc)

    def forward(self, middle: Tensor, top: Tensor) -> Tensor:
        """``(B, channels, T, H, W)`` and ``(B, 2 * channels, T, H / 2, W / 2)`` fused."""
        levels = self.spatial_modulation(middle, top)
        middle, top = (modulate(x) for modulate, x in zip(self.temporal_modulation_ops, levels, strict=True))
        summed = middle + top
        top_down = self.level_fusion_1(summed, top)
        start = summed if self.flow == "cascade" else middle
        bottom_up = self.level_fusion_2(start, top + self.downsample_ops[0](start))
        return self.pyramid_fusion(torch.cat([top_down, bottom_up], 1))


class Head(nn.Module):
    """The mean over positions, dropout, a linear layer."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc_cls = nn.Linear(channels, num_classes)
        reset_classifier(self.fc_cls)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_cls(self.dropout(x.mean(POSITIONS)))


def reset_classifier(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


class TPN(nn.Module):
    """Clips ``(B, 3, T, H, W)`` to logits ``(B, num_classes)``.

    ``backbone.layer3`` gives the paper's ``1024 x 8 x 16 x 16`` for 8 frames of 256x256 at ``width`` 64; the neck, the
    auxiliary head and stage 4 all read what comes out there, so DSTS behind it acts on all of them.

    Args:
        num_classes: of the task.
        width: channels of the stem, a multiple of 2.
        blocks: bottlenecks of each stage of the backbone.
        aux_logits: with the auxiliary head. In training the module then returns :class:`TPNOutput`, of which
            :func:`classification_loss` makes the loss; in evaluation it returns logits, and the head does not run.
        temporal_pool, flow: of :class:`TemporalPyramid`.
        dropout: before each linear layer.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        aux_logits: bool = False,
        temporal_pool: int = 8,
        flow: str = "cascade",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, wanted at least 1")
        if width < 2 or width % 2:
            raise ValueError(f"width: got {width}, wanted a multiple of 2, as the neck's convolutions have 32 groups")
        middle = 4 * EXPANSION * width
        self.backbone = SlowOnly(width=width, blocks=blocks)
        self.neck = TemporalPyramid(
            middle,
            aux_classes=num_classes if aux_logits else None,
            temporal_pool=temporal_pool,
            flow=flow,
            dropout=dropout,
        )
        self.cls_head = Head(2 * middle, num_classes, dropout)

    def forward(self, clips: Tensor) -> Tensor | TPNOutput:
        """Logits; in training with ``aux_logits`` those of both heads.

        Raises:
            TypeError, ValueError: ``clips`` is no floating ``(B, 3, T, H, W)``.
        """
        middle, top = self.backbone(clips)
        logits = self.cls_head(self.neck(middle, top))
        if self.training and self.neck.aux_head is not None:
            return TPNOutput(logits, self.neck.aux_head(middle))
        return logits


def classification_loss(output: Tensor | TPNOutput, targets: Tensor, *, aux_weight: float = 0.5) -> Tensor:
    """Cross-entropy of a classifier's output, with that of TPN's auxiliary head where there is one.

    Args:
        output: ``(B, num_classes)`` logits of any model, or :class:`TPNOutput`.
        targets: ``(B,)`` int64 labels, or ``(B, num_classes)`` probabilities.
        aux_weight: of the auxiliary head's; TPN's authors and mmaction2 take a half.

    Returns:
        A scalar: the mean over the batch.

    Raises:
        TypeError: ``output`` is something else.
    """
    if isinstance(output, TPNOutput):
        aux = F.cross_entropy(output.aux_logits, targets)
        return F.cross_entropy(output.logits, targets) + aux_weight * aux
    if not isinstance(output, Tensor):
        raise TypeError(f"output: got {type(output).__name__}, wanted logits (B, num_classes) or TPNOutput")
    return F.cross_entropy(output, targets)


def tpn_slowonly_r50(num_classes: int = 400, *, aux_logits: bool = False, dropout: float = 0.5) -> TPN:
    """TPN on SlowOnly ResNet-50 with random weights, as mmaction2's ``tpn-slowonly_r50_8x8x1``.

    >>> model = tpn_slowonly_r50(num_classes=48).eval()
    >>> model(torch.randn(1, 3, 8, 64, 64)).shape
    torch.Size([1, 48])

    Args:
        num_classes: of the task; mmaction2's files have the 400 of Kinetics.
        aux_logits: with the auxiliary head: see :class:`TPN`.
        dropout: before each linear layer.
    """
    return TPN(num_classes, aux_logits=aux_logits, dropout=dropout)
