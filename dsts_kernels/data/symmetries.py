"""Clips mirrored and turned at random: more of a data set whose labels do not depend on which way is up.

A quarter turn of a video of people is another video, so :class:`VideoClips` has mirror images alone; where nothing says
which way is up, as in :class:`SyntheticDives`, all eight symmetries of a square keep the label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Symmetries"]


class Symmetries(Dataset):
    """``dataset`` with every clip under one of the eight symmetries of a square, all frames alike.

    Which one depends on ``(seed, epoch, index)`` alone, whichever worker reads the clip: see :meth:`set_epoch`.

    Args:
        dataset: map-style, items ``(clip (C, T, S, S), label)``.
        turns: quarter turns, 0 to 3 of them; ``False`` leaves mirror images.
        seed: of the draws.

    Every other attribute is that of ``dataset``: classes, labels, attributes.

    Raises:
        ValueError: ``seed`` is no whole number; a clip that is not square, when it is read with turns.
    """

    def __init__(self, dataset: Dataset, *, turns: bool = True, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: got {seed!r}, wanted a whole number")
        self.dataset, self.turns, self.seed = dataset, turns, seed
        self.set_epoch(0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        found = getattr(self.dataset, name)
        if name == "read_among":  # another clip may be read instead, under the symmetry of this place
            return lambda index, others: self._turned(*found(index, others), int(self.drawn[index]))
        return found

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, the same for the same epoch."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch: got {epoch!r}, wanted an int of at least 0")
        mixed = (self.seed * 1_000_003 + epoch + 7) % 2**63
        generator = torch.Generator("cpu").manual_seed(mixed)
        self.drawn = torch.randint(8 if self.turns else 2, (len(self.dataset),), generator=generator, device="cpu")
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self._turned(*self.dataset[index], int(self.drawn[index]))

    def _turned(self, clip: Tensor, label: Any, drawn: int) -> tuple[Tensor, Any]:
        if self.turns and clip.shape[-1] != clip.shape[-2]:
            raise ValueError(f"clip: got {tuple(clip.shape)}, wanted squares, which a quarter turn leaves as large")
        clip = clip.flip(-1) if drawn % 2 else clip
        return torch.rot90(clip, drawn // 2, (-2, -1)).contiguous(), label
