"""Decoded frames as a player shows them: upright, with square pixels, in RGB; and a neighbour where one is lost.

What a file's pictures need beyond decoding stands beside them: the display matrix of a phone's camera, the aspect of a
pixel. Colours follow the matrix and range that the stream states (BT.601 where it states none), transparency is left
out, and more than 8 bits are rounded to 8.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from os import PathLike

    from av.video.frame import VideoFrame

_OBLIQUE = 0.02  # of the larger part of a display matrix; below, the rest is rounding
_ASPECTS = (Fraction(1, 10), Fraction(10))  # of a pixel; others are a mistake of the file
_SAID: set[str] = set()  # what this process has warned of, each once


class Turn(NamedTuple):
    """How a stored picture becomes the one shown: first swap its axes, then mirror rows and columns."""

    swap: bool
    upside_down: bool
    mirrored: bool

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` as stored to ``(H', W', 3)`` as shown; a view."""
        if self.swap:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


UPRIGHT = Turn(False, False, False)


class Picked(NamedTuple):
    """What a decoding pass found.

    Attributes:
        pictures: wanted key -> ``(H, W, 3)`` uint8, all of one shape.
        used: wanted key -> key of the frame that is shown for it: its own, or a neighbour's where it was lost.
        seen: keys of all frames that the pass decoded.
    """

    pictures: dict[int, np.ndarray]
    used: dict[int, int]
    seen: list[int]


class Screen:
    """Where the frames of one video are shown, all in the size of the first.

    Args:
        path: the video, for warnings.
        aspect: of a pixel, width by height, as the container states it; ``None`` for square.
        size: shorter side of the pictures in pixels; larger ones are scaled down to it. ``None`` leaves them.
    """

    def __init__(self, path: str | PathLike[str], aspect: Fraction | None, size: int | None) -> None:
        self._path, self._size, self._shape = path, size, None
        self._aspect = aspect if aspect else Fraction(1)
        if not _ASPECTS[0] <= self._aspect <= _ASPECTS[1]:
            say_once("aspect", f"{path}: its pixels are stated to be {aspect} times as wide as high; taken as square")
            self._aspect = Fraction(1)

    def picture(self, frame: VideoFrame) -> np.ndarray:
        """``(H, W, 3)`` uint8, RGB, as shown."""
        if frame.interlaced_frame:
            say_once(
                "interlaced",
                f"{self._path}: interlaced: each frame shows two moments, line by line, and is read "
                "so; deinterlace such videos first, e.g. ffmpeg -i IN -vf bwdif=send_frame OUT",
            )
        turn = self._turn(frame)
        if self._shape is None:
            self._shape = self._shown(frame, turn)
        width, height = self._shape if not turn.swap else self._shape[::-1]
        picture = frame.reformat(width, height, format="rgb24", interpolation="BILINEAR", threads=1)
        return np.ascontiguousarray(turn(picture.to_ndarray()))

    def _shown(self, frame: VideoFrame, turn: Turn) -> tuple[int, int]:
        """Width and height of the pictures: no side smaller than stored for the sake of square pixels."""
        width, height = Fraction(frame.width), Fraction(frame.height)
        if self._aspect > 1:
            width *= self._aspect
        else:
            height /= self._aspect
        shorter = min(round(width), round(height))
        if self._size is not None and self._size < shorter:
            scale = self._size / min(width, height)
            width, height = (max(self._size, round(side * scale)) for side in (width, height))
        return (round(height), round(width)) if turn.swap else (round(width), round(height))

    def _turn(self, frame: VideoFrame) -> Turn:
        turn, degrees = _display_turn(frame)
        if degrees:
            say_once(
                "turned",
                f"{self._path}: to be shown turned by {degrees:.0f} degrees, which is no multiple of "
                "90: read as it is stored",
            )
        return turn


def pick(
    frames: Iterator[tuple[int | None, VideoFrame]], wanted: list[int], first: int, last: int, screen: Screen
) -> Picked:
    """The wanted frames, or for one that does not come the nearest that does; reads no further than it must.

    Args:
        frames: keys and frames, keys ascending.
        wanted: ascending keys, each once.
        first, last: keys between which a neighbour may be taken, themselves included.
        screen: where pictures are shown.
    """
    picked = Picked({}, {}, [])
    before: tuple[int, VideoFrame] | None = None
    left = wanted[::-1]
    for key, frame in frames:
        if key is None:
            continue
        picked.seen.append(key)
        while left and left[-1] < key:
            _take_nearest(picked, left.pop(), before, (key, frame) if key <= last else None, screen)
        if left and left[-1] == key:
            _take_nearest(picked, left.pop(), (key, frame), None, screen)
        if not left:
            break
        if first <= key <= last:
            before = (key, frame)
    for want in reversed(left):
        _take_nearest(picked, want, before, None, screen)
    return picked


def _take_nearest(
    picked: Picked,
    want: int,
    before: tuple[int, VideoFrame] | None,
    after: tuple[int, VideoFrame] | None,
    screen: Screen,
) -> None:
    found = [neighbour for neighbour in (before, after) if neighbour is not None]
    if found:
        key, frame = min(found, key=lambda neighbour: abs(neighbour[0] - want))
        picked.pictures[want], picked.used[want] = screen.picture(frame), key


def _display_turn(frame: VideoFrame) -> tuple[Turn, float]:
    """How a frame is turned for display, and the degrees of a turn that is none of ours (else 0).

    A display matrix maps a stored point to ``x' = a x + c y``, ``y' = b x + d y``, in rows of three 32-bit numbers.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT, 0.0
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if straight and max(abs(b), abs(c)) <= _OBLIQUE * straight:
        return Turn(False, d < 0, a < 0), 0.0
    if crossed and max(abs(a), abs(d)) <= _OBLIQUE * crossed:
        return Turn(True, b < 0, c < 0), 0.0
    return UPRIGHT, math.degrees(math.atan2(b, a)) if a or b else 0.0


def say_once(kind: str, text: str) -> None:
    """Warns of the first file of a kind that this process meets."""
    if kind not in _SAID:
        _SAID.add(kind)
        warnings.warn(f"{text} (said once)", stacklevel=2)
