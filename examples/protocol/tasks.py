"""A seed's clips, its backbone, and the features behind it.

Everything here depends on the task and the seed alone, so that all arms of a seed share clips, backbone and features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsts_kernels.backbones import TinyNet
from dsts_kernels.data import Symmetries, SyntheticCells, SyntheticDives
from dsts_kernels.data.cells import CELL, CUES, GLYPHS

from .settings import Task

__all__ = [
    "Clips",
    "Features",
    "backbone_of",
    "batches",
    "branch_clips",
    "coloured",
    "draw",
    "draw_again",
    "features_of",
    "picked",
    "rate_share",
    "symmetries",
    "train_backbone",
    "turned",
]

SETS = {"dives": SyntheticDives, "cells": SyntheticCells}
PARTS = ("backbone", "branch", "test")
SYMMETRIES = 8  # of the square
# Of seed 0's test clips. Each seed has test clips of its own: on shared ones arms differ alike in all seeds by what
# these clips are like, which an interval over seeds does not see, and settings would be chosen on them.
TEST_SEED = 1_000_003
WARM_UP = 0.15  # of the steps, to the full learning rate


class Clips(NamedTuple):
    """Clips ``(B, 1, T, H, W)``, labels ``(B,)``, attributes, and names of both.

    Their three colours are the same: :func:`coloured` gives a backbone what it wants.
    """

    clips: Tensor
    labels: Tensor
    attributes: dict[str, Tensor]
    attribute_names: dict[str, list[str]]
    class_names: list[str]


class Features(NamedTuple):
    """Features ``(B, C, T, H, W)`` of clips, and labels ``(B,)``."""

    features: Tensor
    labels: Tensor


class CellNet(nn.Module):
    """A backbone without kernels in space or time: a cell at a time, a channel a glyph or cue.

    It is trained on what single cells show, each channel on its own glyph or cue, as a model of images is trained on
    objects; :attr:`classifier` comes with the task.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        step = (1, CELL, CELL)
        self.stages = nn.Sequential(nn.Conv3d(3, channels, step, step, bias=False), nn.BatchNorm3d(channels), nn.ReLU())
        self.gain, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.classifier = nn.Linear(channels, num_classes)

    def shown(self, clips: Tensor) -> Tensor:
        """Logits ``(B, channels)`` of the glyph and cue that a clip shows."""
        return self.stages(clips).mean((2, 3, 4)) * self.gain + self.bias

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.stages(clips).mean((2, 3, 4)))


def draw(task: Task, seed: int, part: str, epoch: int = 0) -> Clips:
    """Clips of a seed's part; those to train on are under a symmetry of the square where that keeps labels."""
    count = getattr(task, f"{part}_clips")
    own = TEST_SEED + seed if part == "test" else len(PARTS) * seed + PARTS.index(part)
    data = SETS[task.name](count, size=task.size, noise=task.noise, seed=own)
    items = data
    if part != "test" and task.name == "dives":
        items = Symmetries(data, seed=own)
        items.set_epoch(epoch)
    clips = torch.stack([items[index][0][:1] for index in range(len(data))])
    return Clips(clips, data.labels, dict(data.attributes), dict(data.attribute_names), list(data.class_names))


def coloured(clips: Tensor) -> Tensor:
    """``(B, 1, T, H, W)`` as ``(B, 3, T, H, W)``."""
    return clips.expand(-1, 3, -1, -1, -1)


def branch_clips(task: Task, seed: int) -> Clips:
    """What a seed's branches are trained on."""
    return draw(task, seed, "branch")


def rate_share(done: float) -> float:
    """Of the highest rate, where ``done`` of all steps are done: linear to 1, then half a cosine to 0."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + float(torch.cos(torch.tensor((done - WARM_UP) / (1 - WARM_UP) * torch.pi))))


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches, epoch by epoch in an order that the seed alone draws."""
    generator = torch.Generator("cpu").manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(count, generator=generator)
        for indices in order[: count - count % batch].split(batch):
            if done < steps:
                yield indices
            done += 1


def backbone_of(task: Task, num_classes: int) -> nn.Module:
    """At random."""
    if task.name == "dives":
        return TinyNet(num_classes, width=task.width)
    return CellNet(task.channels, num_classes)


def train_backbone(task: Task, seed: int) -> nn.Module:
    """A seed's backbone, in evaluation: dives on their classes, cells on what single cells show."""
    torch.manual_seed(seed)
    drawn = draw(task, seed, "backbone")
    net = backbone_of(task, len(drawn.class_names))
    optimizer = torch.optim.AdamW(net.parameters(), task.backbone_rate, weight_decay=task.weight_decay)
    steps = task.backbone_clips // task.batch * task.backbone_epochs
    each = task.backbone_clips // task.batch
    for step, indices in enumerate(batches(task.backbone_clips, task.batch, steps, seed)):
        if step and step % each == 0 and task.name == "dives":
            drawn = draw_again(drawn, seed + step)
        optimizer.param_groups[0]["lr"] = task.backbone_rate * rate_share((step + 1) / steps)
        if task.name == "dives":
            loss = F.cross_entropy(net(coloured(drawn.clips[indices])), drawn.labels[indices])
        else:
            loss = F.binary_cross_entropy_with_logits(
                net.shown(coloured(drawn.clips[indices])), shown_of(drawn, indices)
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), task.clip_norm)
        optimizer.step()
    return net.eval()


def symmetries(count: int, seed: int) -> Tensor:
    """Which of the square's eight symmetries each of so many clips is under: ``(count,)`` int64."""
    return torch.randint(SYMMETRIES, (count,), generator=torch.Generator("cpu").manual_seed(seed))


def turned(clips: Tensor, one: int) -> Tensor:
    """Clips ``(..., S, S)`` under a symmetry; 0 leaves them as they are."""
    found = torch.rot90(clips, one // 2, (-2, -1))
    return found.flip(-1) if one % 2 else found


def draw_again(drawn: Clips, seed: int) -> Clips:
    """The same clips, each under another symmetry of the square."""
    which = symmetries(len(drawn.labels), seed)
    return drawn._replace(clips=picked((turned(drawn.clips, one) for one in range(SYMMETRIES)), which))


def picked(views: Iterable[Tensor], which: Tensor) -> Tensor:
    """Row ``b`` of the result is that of ``views[which[b]]``, all of one shape ``(B, ...)``."""
    found = None
    for one, view in enumerate(views):
        found = torch.empty_like(view, memory_format=torch.contiguous_format) if found is None else found
        mine = which == one
        found[mine] = view[mine]
    return found


def shown_of(drawn: Clips, indices: Tensor) -> Tensor:
    """1 for the glyph and the cue of each clip: ``(B, GLYPHS + CUES)``."""
    wanted = torch.zeros(len(indices), GLYPHS + CUES)
    wanted.scatter_(1, drawn.attributes["glyph"][indices, None], 1.0)
    return wanted.scatter_(1, GLYPHS + drawn.attributes["group"][indices, None], 1.0)


@torch.no_grad()
def features_of(net: nn.Module, drawn: Clips, batch: int = 64) -> Features:
    """What DSTS is given: a frozen backbone's features of all clips."""
    stem = net.stem if isinstance(net, TinyNet) else nn.Identity()
    net.eval()
    found = [net.stages(stem(coloured(clips))) for clips in drawn.clips.split(batch)]
    return Features(torch.cat(found), drawn.labels)
