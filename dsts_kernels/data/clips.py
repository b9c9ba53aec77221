"""A torch data set over annotated videos: decode some frames, transform, and keep going where a file is broken.

What can be told beforehand is left out at construction: missing files, with ``check`` those that do not open, and for
evaluation every clip that does not decode. What only reading shows is warned of and counted. In training another clip,
drawn at random, is read instead; in evaluation none ever is, since it would count twice. The counts and the epoch are
in shared memory: a loader's workers, persistent ones too, write the same counts and see the same epoch as the process
that made them.
"""

from __future__ import annotations

import hashlib
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .records import Annotations, Clip
from .transforms import MEAN, STD, EvalTransform, TrainTransform
from .video import VideoError, decode, probe

__all__ = ["VideoClips"]

_Item = TypeVar("_Item")

_TRAIN_MARGIN = 1.3  # the side of the least crop, sqrt(0.6) of the picture's, is then not scaled up


class VideoClips(Dataset[tuple[Tensor, int]]):
    """Clips as network inputs.

    Item ``i`` is ``(clip, label)``: ``(3, frames, size, size)`` float32 around zero, and an int. In training its
    frames, crop, mirroring and jitter are random and depend on ``(seed, epoch, i)`` only, not on the worker or the
    order of reading; so does the clip that is read, with its own label, where clip ``i`` does not decode. That clip is
    drawn from all others, or from those of the same part where :func:`~dsts_kernels.learning.split_train_val` made two.

    In evaluation a clip that does not decode is left out, of ``len``, ``labels`` and all else, and counted. One that
    fails only later (``check=False``, or a file that went away) raises :class:`VideoError` by its index, and is left
    out of a ``DataLoader``'s batch, which is then smaller; a batch of which nothing is left raises too.

    A warning says so where more than half of the clips are left out.

    Args:
        annotations: of :func:`~dsts_kernels.data.annotations.read_diving48` or ``read_finegym``.
        frames: frames a clip, one from each of as many equal segments.
        size: side of the pictures in pixels.
        stride: from frame to frame; ``None`` spreads them over the clip. See
            :func:`~dsts_kernels.data.video.frame_indices`.
        mean, std: of red, green and blue, for pixels from 0 to 1; clips are normalised by them.
        train: random frames and :class:`TrainTransform`; else middle frames and :class:`EvalTransform`.
        seed: of all randomness.
        check: opens every file and decodes its first frame now. For evaluation a file that breaks off before its end
            is left out whole, and every clip is decoded, as it will be read: about as long as one pass over them by
            as many threads as there are cores (8 at most).

    Attributes:
        class_names: one a class.
        num_classes: how many.
        labels: ``(len,)`` int64.
        attributes: attribute -> ``(len,)`` int64, the value of each sample's class.
        attribute_names: attribute -> what its values are called.

    Raises:
        FileNotFoundError: every video is missing.
        VideoError: no file that is there can be read.
        ValueError: an argument is out of its range.
        TypeError: ``seed`` is no int.
        ImportError: PyAV is not installed (when a file is first opened).

    Example:
        >>> annotations = read_diving48("Diving48_V2_train.json", "Diving48_vocab.json", "rgb")  # doctest: +SKIP
        >>> clips = VideoClips(annotations, train=True)  # doctest: +SKIP
        >>> print(clips.report())  # doctest: +SKIP
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        frames: int = 8,
        size: int = 112,
        stride: int | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        train: bool,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        if frames < 1:
            raise ValueError(f"frames: wanted at least 1, got {frames}")
        if stride is not None and stride < 1:
            raise ValueError(f"stride: wanted at least 1 frame, got {stride}")
        if not hasattr(seed, "__index__"):
            raise TypeError(f"seed: wanted an int, got {type(seed).__name__} {seed!r}")
        self.frames, self.size, self.stride, self.train = frames, size, stride, train
        self.seed = operator.index(seed)
        self._transform = (TrainTransform if train else EvalTransform)(size, mean=mean, std=std)
        self._decode_size = round(size * _TRAIN_MARGIN) if train else size
        self.class_names = list(annotations.class_names)
        self.num_classes = len(self.class_names)
        self._total = len(annotations.clips)
        self._left_out: dict[str, list[str]] = {}
        self._fault = ""
        self._clips = self._readable(annotations.clips, check)
        self.labels = torch.tensor([clip.label for clip in self._clips], device="cpu")
        self.attributes = {
            name: torch.tensor(values, device="cpu")[self.labels]
            for name, values in annotations.class_attributes.items()
        }
        self.attribute_names = {name: list(names) for name, names in annotations.attribute_names.items()}
        files = {path: number for number, path in enumerate(dict.fromkeys(clip.path for clip in self._clips))}
        self._file = [files[clip.path] for clip in self._clips]
        self._unreadable = torch.zeros(len(self._clips), dtype=torch.bool, device="cpu").share_memory_()
        self._warned = torch.zeros(len(files), dtype=torch.bool, device="cpu").share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        if 2 * len(self._clips) < self._total:
            why = f"; {self._fault}" if self._fault else ""
            warnings.warn(
                f"only {len(self._clips)} of {self._total} clips are read; {self.report()}{why}", stacklevel=2
            )

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read_among(index)

    def read_among(self, index: int, others: Tensor | None = None) -> tuple[Tensor, int]:
        """Item ``index``, or in training, where it does not decode, one drawn from ``others``.

        Args:
            index: of the item.
            others: ``(N,)`` int64, indices of the part of the data set that may be read; all of it by default.

        Raises:
            IndexError: there is no such item.
            VideoError: it does not decode; in training, and neither does any of ``others``.
        """
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} of {length} clips")
        place = operator.index(index) % length  # an int of NumPy's or torch's would be another seed
        try:
            return self._read(place, _mixed(self.seed, int(self._epoch), place)), self._clips[place].label
        except VideoError as error:
            self._note(place, error)
            if not self.train:
                raise
        return self._another(place, torch.arange(length, device="cpu") if others is None else others)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """The items of a batch, as ``DataLoader`` asks for them; in evaluation without those that do not decode."""
        items = []
        for index in indices:
            try:
                items.append(self[index])
            except VideoError:
                if self.train:
                    raise
        if not items and len(indices):
            name = self._clips[indices[0]].name
            raise VideoError(
                f"none of the {len(indices)} clips of a batch can be decoded, e.g. {name}; check=True leaves such "
                "clips out before"
            )
        return items

    def set_epoch(self, epoch: int) -> None:
        """Other random frames, crops and colours from the next item on, in every worker; for ``train`` only."""
        self._epoch.fill_(epoch)

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Reason -> names of clips.

        Those ``"missing"``, ``"corrupt"`` (their file does not open, or breaks off) or ``"unreadable"`` (the clip does
        not decode) are not in the data set. Those that failed to decode later, in this process or in a worker, are in
        its length: in training they are ``"replaced"``, in evaluation they count as ``"unreadable"`` too.
        """
        failed = [self._clips[place].name for place in self._unreadable.nonzero().flatten().tolist()]
        found = {reason: list(names) for reason, names in self._left_out.items()}
        reason = "replaced" if self.train else "unreadable"
        return found | {reason: found.get(reason, []) + failed} if failed else found

    def report(self) -> str:
        """One line, e.g. ``12 of 500 clips left out: 10 missing, 2 corrupt (first: abc)``."""
        skipped = self.skipped
        count = sum(len(names) for names in skipped.values())
        if not count:
            return f"0 of {self._total} clips left out"
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in skipped.items())
        return f"{count} of {self._total} clips left out: {reasons} (first: {next(iter(skipped.values()))[0]})"

    def _readable(self, clips: Iterable[Clip], check: bool) -> list[Clip]:
        clips = list(clips)
        if not clips:
            raise ValueError("annotations: wanted at least one clip, got none")
        there = {path: path.is_file() for path in {clip.path for clip in clips}}
        present = [clip for clip in clips if there[clip.path]]
        if not present:
            raise FileNotFoundError(f"all {len(clips)} videos are missing, e.g. {clips[0].path}")
        if len(present) < len(clips):
            self._left_out["missing"] = [clip.name for clip in clips if not there[clip.path]]
        if not check:
            return present
        faults = _faults(partial(probe, end=not self.train), dict.fromkeys(clip.path for clip in present))
        good = [clip for clip in present if clip.path not in faults]
        if not good:
            raise VideoError(f"none of {len(faults)} videos can be read: {next(iter(faults.values()))}")
        if faults:
            self._fault = next(iter(faults.values()))
            self._left_out["corrupt"] = [clip.name for clip in present if clip.path in faults]
        if self.train:
            return good
        unreadable = _faults(self._decode, dict.fromkeys(good))
        if len(unreadable) == len(set(good)):
            raise VideoError(f"none of {len(good)} clips can be decoded: {next(iter(unreadable.values()))}")
        if unreadable:
            self._fault = self._fault or next(iter(unreadable.values()))
            self._left_out["unreadable"] = [clip.name for clip in good if clip in unreadable]
        return [clip for clip in good if clip not in unreadable]

    def _decode(self, clip: Clip, generator: torch.Generator | None = None) -> Tensor:
        return decode(
            clip.path,
            self.frames,
            start=clip.start,
            end=clip.end,
            first_frame=clip.first_frame,
            last_frame=clip.last_frame,
            mode="random" if self.train else "uniform",
            generator=generator,
            size=self._decode_size,
            stride=self.stride,
        )

    def _read(self, place: int, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        return self._transform(self._decode(self._clips[place], generator), generator)

    def _another(self, unread: int, others: Tensor) -> tuple[Tensor, int]:
        """A clip drawn for one that does not decode; what was unreadable elsewhere or before plays no part."""
        seed, epoch = self.seed, int(self._epoch)
        generator = torch.Generator("cpu").manual_seed(_mixed(seed, epoch, unread, "another"))
        for place in others[torch.randperm(len(others), generator=generator, device="cpu")].tolist():
            if place == unread:
                continue
            try:
                return self._read(place, _mixed(seed, epoch, unread, place)), self._clips[place].label
            except VideoError as error:
                self._note(place, error)
        raise VideoError(f"none of the {len(others)} clips can be decoded, e.g. {self._clips[unread].path}")

    def _note(self, place: int, error: VideoError) -> None:
        self._unreadable[place] = True
        if not self._warned[self._file[place]]:
            self._warned[self._file[place]] = True
            name = self._clips[place].name
            what = f"another clip is read instead of {name}" if self.train else f"{name} is left out"
            warnings.warn(f"{error}; {what}", stacklevel=4)


def _faults(read: Callable[[_Item], object], items: Iterable[_Item]) -> dict[_Item, str]:
    """What is wrong with each item that cannot be read."""

    def fault(item: _Item) -> str | None:
        try:
            read(item)
        except VideoError as error:
            return str(error)
        return None

    items = list(items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {item: text for item, text in zip(items, pool.map(fault, items), strict=True) if text is not None}


def _mixed(*numbers: int | str) -> int:
    """A seed in which near numbers are far apart."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
