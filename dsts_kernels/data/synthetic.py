"""A fine-grained task of known structure: short clips of a tumbling stick figure, drawn from a seed.

What separates dives is modelled: the class is a shape (how the straight body folds: pike, tuck, split, arch) times a
timing (one turn or two, folded early or late in the flight). Two classes of one timing differ only in space: single
frames tell them apart. Two of one shape differ only in time: the turn starts anywhere and is even, and *late* is
*early* played backwards, with a turn of random sense: a frame whose place in the clip is unknown is as likely under
either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .transforms import check_normalisation, normalised

__all__ = ["SHAPES", "TIMINGS", "SyntheticDives", "draw_figures", "fold", "joints"]

SHAPES = ("pike", "tuck", "split", "arch")
TIMINGS = ("one turn, early", "one turn, late", "two turns, early", "two turns, late")
# Folding angles in degrees: hip and knee of one leg, hip and knee of the other, shoulder, elbow. First at rest.
STRAIGHT = torch.tensor([8.0, 4.0, 8.0, 4.0, 172.0, 8.0], device="cpu")
POSES = torch.tensor(
    [
        [100.0, 8.0, 100.0, 8.0, 82.0, 8.0],
        [112.0, 112.0, 112.0, 112.0, 62.0, 50.0],
        [72.0, 6.0, -52.0, 24.0, 98.0, 12.0],
        [-62.0, 40.0, -62.0, 40.0, 226.0, -24.0],
    ],
    device="cpu",
)
SEGMENTS = ((0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (0, 6), (6, 7))  # torso, leg, leg, arm
LENGTHS = {"torso": 0.34, "thigh": 0.26, "shin": 0.26, "upper arm": 0.19, "forearm": 0.19}
CHUNK = 128  # clips drawn at a time
MEAN, STD = (0.5,) * 3, (64 / 255,) * 3  # of a pixel in [0, 1], roughly


def fold(time: Tensor, early: Tensor) -> Tensor:
    """How far the body is folded, 0 to 1, at times ``(F,)`` in ``[0, 1]`` for clips ``(B,)``: ``(B, F)``.

    The fold is held around a quarter of the flight (early) or three quarters (late): mirror images in time.
    """
    centre = torch.where(early, 0.25, 0.75)[:, None]
    return torch.sigmoid((0.2 - (time - centre).abs()) * 40.0)


def joints(angles: Tensor, turn: Tensor) -> Tensor:
    """Joints ``(..., 8, 2)`` of figures: folding angles ``(..., 6)`` and the turn of the body ``(...)``, in radians.

    Order: shoulder, hip, knee, foot, other knee, other foot, elbow, hand; the centre of the torso is the origin.
    """

    def along(direction: Tensor, length: float) -> Tensor:
        return torch.stack((torch.sin(direction), -torch.cos(direction)), -1) * length

    up = turn + math.pi
    shoulder = along(up, LENGTHS["torso"] / 2)
    hip = -shoulder
    points = [shoulder, hip]
    for leg in (0, 2):
        thigh = turn + angles[..., leg]
        knee = hip + along(thigh, LENGTHS["thigh"])
        points += [knee, knee + along(thigh - angles[..., leg + 1], LENGTHS["shin"])]
    arm = turn + angles[..., 4]
    elbow = shoulder + along(arm, LENGTHS["upper arm"])
    points += [elbow, elbow + along(arm - angles[..., 5], LENGTHS["forearm"])]
    return torch.stack(points, -2)


def draw_figures(points: Tensor, thickness: Tensor, size: int) -> Tensor:
    """Figures of joints ``(B, F, 8, 2)`` on planes of -1 to 1, as ``(B, F, size, size)`` in 0 to 1."""
    line = (torch.arange(size, device=points.device) + 0.5) * (2.0 / size) - 1.0
    pixel = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    near = torch.full((*points.shape[:2], size * size), math.inf, device=points.device)
    for a, b in SEGMENTS:
        start, along = points[:, :, a, None], (points[:, :, b] - points[:, :, a])[:, :, None]
        share = ((pixel - start) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-9)
        near = torch.minimum(near, (pixel - start - share.clamp(0, 1)[..., None] * along).norm(dim=-1))
    head = points[:, :, 0] * 1.55 - points[:, :, 1] * 0.55
    near = torch.minimum(near, (pixel - head[:, :, None]).norm(dim=-1) - 0.03)
    return torch.sigmoid((thickness[:, None, None] - near) * (1.2 * size)).unflatten(-1, (size, size))


class SyntheticDives(Dataset):
    """``count`` clips, classes in turn, the same for the same arguments on every machine of one torch version.

    Args:
        count: clips; 16 classes, ``class = 4 * shape + timing``.
        frames, size: ``T`` and ``H = W``.
        noise: standard deviation of the pixel noise, where a figure's contrast is 0.35 to 0.8.
        seed: another one is another draw of the same task: a test set.
        mean, std: of red, green and blue, for pixels from 0 to 1; clips are normalised by them.
        transform: applied to a clip when it is read.

    Items: ``(clip (3, T, H, W) float32, by default -2 to 2; label)``. Attributes: ``clips (count, T, H, W)`` uint8,
    ``labels (count,)``, ``attributes`` with ``"shape"`` and ``"timing"`` ``(count,)`` int64, ``attribute_names``,
    ``class_names``, ``num_classes``.

    Size, place, drift, thickness, contrast, lighting, sense and start of the turn, and how far the body folds, are
    random.
    """

    attribute_names: ClassVar = {"shape": list(SHAPES), "timing": list(TIMINGS)}
    class_names: ClassVar = [f"{shape}, {timing}" for shape in SHAPES for timing in TIMINGS]

    def __init__(
        self,
        count: int = 1024,
        *,
        frames: int = 8,
        size: int = 32,
        noise: float = 0.15,
        seed: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for name, value, least in (("count", count, 1), ("frames", frames, 2), ("size", size, 8)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an int of at least {least}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise: got {noise!r}, wanted a standard deviation of at least 0")
        mean, std = check_normalisation(mean, std)
        self.transform, self.mean, self.std = transform, [255 * m for m in mean], [255 * s for s in std]
        self.labels = torch.arange(count, device="cpu") % (len(SHAPES) * len(TIMINGS))
        self.attributes = {"shape": self.labels // len(TIMINGS), "timing": self.labels % len(TIMINGS)}
        generator = torch.Generator("cpu").manual_seed(seed)
        blocks = self.labels.split(CHUNK)
        self.clips = torch.cat([draw_clips(block, frames, size, noise, generator) for block in blocks])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clip = normalised(self.clips[index].float().expand(3, -1, -1, -1), self.mean, self.std)
        return (clip if self.transform is None else self.transform(clip)), int(self.labels[index])


def draw_clips(labels: Tensor, frames: int, size: int, noise: float, generator: torch.Generator) -> Tensor:
    """Clips ``(B, F, size, size)`` uint8 of classes ``(B,)``, on the CPU."""
    batch = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device="cpu") * (high - low) + low

    shape, timing = labels // len(TIMINGS), labels % len(TIMINGS)
    time = torch.arange(frames, device="cpu") / (frames - 1)
    sense = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    turns = torch.where(timing < 2, 1.0, 2.0)
    turn = uniform(0, 2 * math.pi)[:, None] + sense[:, None] * turns[:, None] * 2 * math.pi * time
    resting = STRAIGHT + uniform(-12, 12, 6)
    folded = resting + (POSES[shape] - STRAIGHT) * uniform(0.75, 1.05)[:, None]
    mirror = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)[:, None, None]
    amount = fold(time, timing % 2 == 0)[..., None]
    angles = (resting[:, None] + (folded - resting)[:, None] * amount) * mirror * (math.pi / 180)
    centre = uniform(-0.2, 0.2, 1, 2) + uniform(-0.25, 0.25, 1, 2) * (time[:, None] - 0.5)
    points = joints(angles, turn) * uniform(0.8, 1.15)[:, None, None, None] + centre[:, :, None]
    figure = draw_figures(points, uniform(0.035, 0.07), size) * uniform(0.35, 0.8)[:, None, None, None]
    slope = uniform(-0.15, 0.15, 2) @ torch.stack(
        torch.meshgrid(*[torch.linspace(-1, 1, size, device="cpu")] * 2, indexing="ij")
    ).flatten(1)
    lighting = uniform(0.25, 0.5)[:, None, None, None] + slope.view(batch, 1, size, size)
    grain = torch.randn(batch, frames, size, size, generator=generator, device="cpu") * noise
    return ((lighting + figure - 0.15 + grain).clamp(0, 1) * 255).to(torch.uint8)
