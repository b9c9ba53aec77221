"""Small backbones, one for each way to lay features out, in plain PyTorch, with the shapes of large ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsts_kernels import FusedDSTS, insert_dsts

CHANNELS, CLASSES = 6, 3
OPTIONS = {"num_neurons": 3, "num_layers": 2, "score_reduction": "mean"}


class Block(nn.Module):
    """A residual block, ``nn.Conv3d`` or ``nn.Conv2d``."""

    def __init__(self, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = conv(CHANNELS, CHANNELS, 3, padding=1), norm(CHANNELS), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


class Clips(nn.Module):
    """``(B, 3, T, H, W)`` through stages that are ``Sequential``, as torchvision's video ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, CHANNELS, 3, stride=(1, 2, 2), padding=1)
        self.stage1 = nn.Sequential(Block(nn.Conv3d, nn.BatchNorm3d), Block(nn.Conv3d, nn.BatchNorm3d))
        self.stage2 = nn.Sequential(Block(nn.Conv3d, nn.BatchNorm3d))
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3, 4)))


class Frames(nn.Module):
    """``(B*T, 3, H, W)`` through 2-d convolutions, as TSN and timm's backbones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.stage = nn.Sequential(Block(nn.Conv2d, nn.BatchNorm2d))
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


class ChannelsLast(nn.Module):
    """``(B, 3, T, H, W)`` to ``(B, T, H, W, C)`` and a norm, as torchvision's Video Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, CHANNELS, 2, stride=2)
        self.norm = nn.LayerNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.patches(x).permute(0, 2, 3, 4, 1)).mean((1, 2, 3)))


class Tokens(nn.Module):
    """``(B, 3, T, H, W)`` to tokens behind a class token, in layers that return tuples or not."""

    def __init__(self, returns: type | None = None) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, CHANNELS, 2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.layer = Returning(returns)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        out = self.layer(torch.cat((self.class_token.expand(x.shape[0], -1, -1), tokens), 1))
        return self.head((out if isinstance(out, Tensor) else self.layer.features(out)).mean(1))


class Returning(nn.Module):
    """A linear layer over tokens; ``made(tokens)`` says in what it returns them."""

    def __init__(self, made: object = None) -> None:
        super().__init__()
        self.linear, self.made = nn.Linear(CHANNELS, CHANNELS), made

    def forward(self, x: Tensor) -> object:
        x = self.linear(x)
        return x if self.made is None else self.made(x)

    @staticmethod
    def features(out: object) -> Tensor:
        return out["x"] if isinstance(out, dict) else out[0]


GRID = (2, 4, 4)  # of Tokens for clips of CLIP
CLIP, FRAMES = (2, 3, 4, 8, 8), (8, 3, 8, 8)  # FRAMES: two clips of 4 frames

KINDS = {
    "BCTHW": (Clips, "stage1", {}, CLIP),
    "TSN": (Frames, "stage", {"frames": 4}, FRAMES),
    "BTHWC": (ChannelsLast, "norm", {}, CLIP),
    "BNC": (Tokens, "layer", {"grid": GRID, "class_tokens": 1}, CLIP),
}


def inserted(kind: str, **options: object) -> tuple[nn.Module, FusedDSTS, Tensor]:
    """A model with lively DSTS behind its features, that DSTS, and clips for it."""
    make, where, known, shape = KINDS[kind]
    model = make()
    dsts = insert_dsts(model, where, example=shape, **known, **(OPTIONS | options))
    enliven(dsts)
    return model, dsts, torch.randn(shape)


@torch.no_grad()
def enliven(dsts: nn.Module) -> None:
    """Gates on both sides, so that DSTS is far from doing nothing."""
    for layer in dsts.layers:
        layer.gate.normal_()
