"""How a network's input is made of a video: which frames, how large, how normalised; and long videos in windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, NamedTuple

from torch import Tensor

from .transforms import EvalTransform, check_normalisation
from .video import Extent, decode

__all__ = ["WINDOW", "ClipSampling", "Window"]

WINDOW = 10.0  # s; how long a window is, roughly, where nothing else is said: as long as clips of Kinetics


class Window(NamedTuple):
    """A stretch of a video, in seconds as players count them."""

    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """What clips a model was trained on.

    Attributes:
        frames: of a clip.
        size: side of a frame in pixels.
        mean, std: of red, green and blue, for pixels from 0 to 1: ``(pixel - mean) / std``.
        stride: frames from one to the next; ``None`` spreads them evenly over whatever a clip is.

    Raises:
        ValueError: a value out of its range; names it.
    """

    frames: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stride: int | None = None
    transform: EvalTransform = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("frames", "size", "stride"):
            value = getattr(self, name)
            optional = name == "stride" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least 1")
        mean, std = check_normalisation(self.mean, self.std)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        object.__setattr__(self, "transform", EvalTransform(self.size, mean=mean, std=std))

    def windows(self, video: Extent, length: float | None = None, hop: float | None = None) -> list[Window]:
        """Stretches that together cover a video, each to be read as a clip.

        Args:
            video: when it has pictures.
            length: of a window in seconds, roughly: a video is cut into equal parts of about that length
                (:data:`WINDOW`, 10 s), ``math.inf`` leaves it whole. With a ``stride`` a window is as long as the
                frames of a clip, and ``length`` must be left out.
            hop: seconds from the start of a window to that of the next, which then are as long as said; the last one
                ends where the video does. Left out, windows lie side by side.

        Returns:
            At least one, by start.

        Raises:
            ValueError: an argument is out of its range.
        """
        self.check(length, hop)
        duration = video.end - video.start
        whole = [Window(video.start, video.end)]
        if self.stride is not None:
            length = self.frames * self.stride * video.step
            count = math.ceil(duration / length - 1e-2) if length else 1
        else:
            length = WINDOW if length is None else length
            count = max(1, round(duration / length))
            length = duration / count if hop is None else length
        if duration <= length or (hop is None and count <= 1):
            return whole
        last = video.end - length
        if hop is not None:
            count = math.floor((last - video.start) / hop + 1e-6) + 1
            starts = [video.start + number * hop for number in range(count)]
            starts += [last] if last - starts[-1] > 1e-6 else []
        else:
            starts = [video.start + number * (last - video.start) / (count - 1) for number in range(count)]
        return [Window(start, start + length) for start in starts]

    def check(self, length: float | None, hop: float | None) -> None:
        """Refuses what :meth:`windows` cannot take, before there is a video."""
        if length is not None and self.stride is not None:
            raise ValueError(
                f"window: got {length} s for a model whose clips are {self.frames} frames at a stride of "
                f"{self.stride}, wanted none: that is how long a window is"
            )
        for name, value in (("window", length), ("hop", hop)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, wanted seconds above 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what makes the same one again."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def decode(self, path: str | PathLike[str], window: Window | None = None, size: int | None = None) -> Tensor:
        """The frames of a window, or of the whole video: ``(frames, H, W, 3)`` uint8.

        Their shorter side is ``size`` (by default that of a clip); a video of smaller pictures keeps its own.

        Raises:
            VideoError: the file is missing, corrupt, cut off, or holds nothing of the window.
            ImportError: PyAV is not installed.
        """
        start, end = (None, None) if window is None else window
        return decode(path, self.frames, start=start, end=end, size=size or self.size, stride=self.stride)
