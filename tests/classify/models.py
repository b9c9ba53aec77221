"""Checkpoints of small classifiers with lively DSTS, written as the recipe writes them, and models that note clips."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dsts_kernels.classify import ClassifierConfig
from dsts_kernels.data import ClipSampling
from dsts_kernels.learning import save_checkpoint
from dsts_kernels.modules import FusedDSTS

CLASSES = ("pike", "tuck", "split")
SAMPLING = ClipSampling(frames=4, size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
DSTS = {"num_neurons": 3, "num_layers": 2, "score_reduction": "mean"}


def config(**changes: object) -> ClassifierConfig:
    given = {"backbone": "tiny", "class_names": CLASSES, "sampling": SAMPLING, "options": {"width": 4}, "dsts": DSTS}
    return ClassifierConfig(**(given | changes))


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Logits that differ, gates on both sides, statistics that are not those of a fresh norm."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_()
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, FusedDSTS):
            for layer in module.layers:
                layer.gate.normal_()
    return model.eval()


def write_checkpoint(path: Path, **changes: object) -> nn.Module:
    """A checkpoint at ``path``; the model that is in it."""
    about = config(**changes)
    model = lively(about.build())
    save_checkpoint(path, {"classifier": about.to_dict(), "model": model.state_dict(), "epoch": 0, "options": {}})
    return model


class Noting(nn.Module):
    """A model of three classes that keeps the clips that it saw; the brighter to the right, the surer of class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.clips: list[Tensor] = []

    def forward(self, clips: Tensor) -> Tensor:
        self.clips += list(clips)
        bright = (clips * torch.linspace(0, 0.01, clips.shape[-1])).mean((1, 2, 3, 4))
        return torch.stack([torch.zeros_like(bright), -bright, bright], 1)
