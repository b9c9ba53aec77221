"""A task that asks for specialised neurons: appearance says whether to look along space or along time.

A frame is a grid of cells, 4 x 4 pixels each. All cells of a clip show one of eight *glyphs*, and each shows it or its
negative. The signs are a pattern in space times one in time, ``sign(t, y, x) = time(t) * space(y, x)``:

    space   rows (+ - + - from row to row), columns, checker
    time    fast (+ - from frame to frame), slow (+ + - -), half (+ + + + - - - -)

Beneath lies one of four *cues*, the same in all cells and frames: it says which group of classes a clip belongs to.
Classes of the first two groups differ in space alone (rows or columns; checker or columns), whatever their pattern in
time; those of the others in time alone (fast or slow; fast or half), whatever their pattern in space. Which glyph is
shown, the signs, the shift in time and contrasts tell nothing.

What follows, by construction (noise, the rounding of pixels and padding at the border apart), for features that have
a channel a glyph and a cue (:class:`GlyphDetector`, what a model of single cells can see), pooled over all positions at
the end as a video classifier does:

- Features alone tell the group and no more: half of each pattern is positive. Accuracy 1/2.
- Behind a temporal operator a glyph's channel still says nothing of space: each position has the same values, as often,
  for rows, columns and checker. Behind a spatial one it says nothing of time. One neuron sends a glyph's channel to
  either: it answers one half of that glyph's clips by chance. Accuracy at most 3/4, whatever its weights are.
- A neuron for space and one for time, each with all glyphs' channels, chosen by the cue, reach everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .synthetic import MEAN, STD
from .transforms import check_normalisation, normalised

__all__ = ["CUES", "GLYPHS", "GROUPS", "SPACE", "TIME", "GlyphDetector", "SyntheticCells", "draw_cells"]

CELL, PERIOD = 4, 8  # pixels of a cell's side, frames of the longest pattern
GLYPHS, CUES = 8, 4
SPACE = ("rows", "columns", "checker")
TIME = ("fast", "slow", "half")
# Each group's classes: what tells them apart, and the two patterns.
GROUPS = (
    ("space", ("rows", "columns")),
    ("space", ("checker", "columns")),
    ("time", ("fast", "slow")),
    ("time", ("fast", "half")),
)
CHUNK = 512  # clips drawn at a time
CONTRAST, CUE_CONTRAST = 0.16, 0.1  # of a glyph and of a cue, where pixels are 0 to 1


def patterns() -> Tensor:
    """Glyphs, then cues: ``(GLYPHS + CUES, CELL, CELL)`` of 1 and -1, orthogonal and balanced (Walsh's functions)."""
    row = torch.tensor([[1.0]], device="cpu")
    while len(row) < CELL:
        row = torch.cat((torch.cat((row, row), 1), torch.cat((row, -row), 1)))
    found = torch.einsum("ay,bx->abyx", row, row).flatten(0, 1)
    return found[1 : 1 + GLYPHS + CUES]  # the first is even


def space_signs(side: int) -> Tensor:
    """Patterns of :data:`SPACE` on a grid: ``(3, side, side)`` of 1 and -1."""
    line = 1.0 - 2.0 * (torch.arange(side, device="cpu") % 2)
    rows, columns = line[:, None].expand(side, side), line[None].expand(side, side)
    return torch.stack((rows, columns, rows * columns))


def time_signs(frames: int) -> Tensor:
    """Patterns of :data:`TIME`: ``(3, frames)`` of 1 and -1."""
    index = torch.arange(frames, device="cpu")
    return torch.stack([1.0 - 2.0 * (index // half % 2) for half in (1, 2, 4)])


class SyntheticCells(Dataset):
    """``count`` clips, classes in turn, the same for the same arguments on every machine of one torch version.

    Args:
        count: clips; 8 classes, ``class = 2 * group + member``.
        frames: ``T``, a multiple of 8.
        size: ``H = W``, a multiple of 8.
        noise: standard deviation of the pixel noise, where a glyph's contrast is 0.12 to 0.2.
        seed: another one is another draw of the same task: a test set.
        mean, std: of red, green and blue, for pixels from 0 to 1; clips are normalised by them.
        transform: applied to a clip when it is read.

    Items and attributes are those of :class:`~dsts_kernels.data.SyntheticDives`; ``attributes`` are ``"group"``,
    ``"space"``, ``"time"`` and ``"glyph"``.
    """

    attribute_names: ClassVar = {
        "group": [f"{what}, {' or '.join(pair)}" for what, pair in GROUPS],
        "space": list(SPACE),
        "time": list(TIME),
        "glyph": [f"glyph {index}" for index in range(GLYPHS)],
    }
    class_names: ClassVar = [f"group {group}, {one}" for group, (_, pair) in enumerate(GROUPS) for one in pair]

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
        for name, value, unit in (("count", count, 1), ("frames", frames, PERIOD), ("size", size, 2 * CELL)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % unit:
                kind = "an int of at least 1" if unit == 1 else f"a multiple of {unit}"
                raise ValueError(f"{name}: got {value!r}, wanted {kind}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise: got {noise!r}, wanted a standard deviation of at least 0")
        mean, std = check_normalisation(mean, std)
        self.transform, self.mean, self.std = transform, [255 * m for m in mean], [255 * s for s in std]
        self.labels = torch.arange(count, device="cpu") % self.num_classes
        generator = torch.Generator("cpu").manual_seed(seed)
        self.attributes = draw_attributes(self.labels, generator)
        blocks = torch.arange(count, device="cpu").split(CHUNK)
        drawn = (
            draw_cells({k: v[block] for k, v in self.attributes.items()}, frames, size, noise, generator)
            for block in blocks
        )
        self.clips = torch.cat([(pixels * 255).round().to(torch.uint8) for pixels in drawn])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clip = normalised(self.clips[index].float().expand(3, -1, -1, -1), self.mean, self.std)
        return (clip if self.transform is None else self.transform(clip)), int(self.labels[index])


def draw_attributes(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Group, patterns and glyph of clips of classes ``(B,)``: what the class does not say is drawn."""

    def any_of(count: int) -> Tensor:
        return torch.randint(count, labels.shape, generator=generator, device="cpu")

    group, member = labels // 2, labels % 2
    drawn = {"space": any_of(len(SPACE)), "time": any_of(len(TIME))}
    for index, (what, pair) in enumerate(GROUPS):
        names = {"space": SPACE, "time": TIME}[what]
        told = torch.tensor([names.index(one) for one in pair], device="cpu")[member]
        drawn[what] = torch.where(group == index, told, drawn[what])
    return {"group": group, **drawn, "glyph": any_of(GLYPHS)}


def draw_cells(
    attributes: dict[str, Tensor], frames: int, size: int, noise: float, generator: torch.Generator
) -> Tensor:
    """Clips ``(B, frames, size, size)`` of attributes ``(B,)``, on the CPU: pixels of 0 to 1, not rounded."""
    batch, side = len(attributes["group"]), size // CELL

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, 1, 1, 1, generator=generator, device="cpu") * (high - low) + low

    shift = torch.randint(PERIOD, (batch, 1), generator=generator, device="cpu")
    sign = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    time = time_signs(frames)[attributes["time"][:, None], (torch.arange(frames, device="cpu") + shift) % frames]
    signs = time[:, :, None, None] * space_signs(side)[attributes["space"]][:, None] * sign
    shown = patterns()
    glyph, cue = shown[attributes["glyph"]], shown[GLYPHS + attributes["group"]]
    clips = torch.einsum("btyx,bij->btyixj", signs, glyph).reshape(batch, frames, size, size)
    clips = clips * uniform(0.75, 1.25) * CONTRAST
    clips = clips + cue.repeat(1, side, side)[:, None] * uniform(0.75, 1.25) * CUE_CONTRAST + uniform(0.4, 0.6)
    clips = clips + torch.randn(clips.shape, generator=generator, device="cpu") * noise
    return clips.clamp(0, 1)


class GlyphDetector(nn.Module):
    """What a model of single cells can see, written by hand: a channel a glyph, then a channel a cue.

    Clips ``(B, 3, T, H, W)`` to features ``(B, 12, T, H / 4, W / 4)``, not negative: how much of a glyph a cell shows
    beyond ``threshold``, 0 where it shows the negative or another one.

    Args:
        threshold: of the correlation with a pattern, in units of the normalised clip.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        weight = patterns()[:, None, None] / (3 * CELL**2)
        self.register_buffer("weight", weight.expand(-1, 3, -1, -1, -1).contiguous())
        self.threshold = threshold

    def forward(self, clips: Tensor) -> Tensor:
        return (F.conv3d(clips, self.weight, stride=(1, CELL, CELL)) - self.threshold).relu()
