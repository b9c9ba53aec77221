"""A few frames of a video with PyAV: which ones (`frame_indices`), and the decoding of just those (`decode`).

Containers often give no frame count, or a wrong one. So the packets of the stretch are listed first (demuxed, not
decoded), their times say which frames there are, and one decoding pass from the key frame before keeps the chosen ones.
Where packets carry no usable times, two decoding passes do the same: one counts, one keeps. A frame that is damaged is
replaced by its nearest neighbour, as long as few are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import islice, pairwise
from numbers import Real
from operator import index
from os import PathLike
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pictures import Picked, Screen, pick
from .streams import ROUNDING, SEEK_BACK, Listing, Source, VideoError, opened

__all__ = ["Extent", "VideoError", "decode", "extent", "frame_indices", "probe"]

_LOST = 0.05  # share of a stretch that may be missing, as containers are not exact about their length
_FAR = 60.0  # s; what seeking does not find further into a video is not looked for from its beginning
_LONGEST = 1e9  # s; no video lasts 31 years, and clocks of 64 bits still count it in nanoseconds


class Extent(NamedTuple):
    """When a video has pictures, in seconds as players count them.

    Attributes:
        start: the moment of its first frame.
        end: the moment at which its last frame ends, as the container states it; where it does not, as packets tell.
        step: from frame to frame, or 0 where that is not known.
    """

    start: float
    end: float
    step: float


class _Cut(NamedTuple):
    start: float | None
    end: float | None
    first: int | None
    last: int | None


def frame_indices(
    count: int,
    frames: int,
    *,
    mode: str = "uniform",
    generator: torch.Generator | None = None,
    stride: int | None = None,
) -> Tensor:
    """One index from each of ``frames`` equal segments of a video, or every ``stride``-th of a stretch of it.

    Args:
        count: frames in the video, at least 1; with fewer than ``frames`` some repeat.
        frames: how many to choose.
        mode: ``"uniform"`` takes the middle of each segment, ``"random"`` a random place in it. With ``stride`` the
            stretch lies in the middle of the video, or at a random place.
        generator: of the random places; torch's own by default.
        stride: from index to index, in a stretch of ``frames * stride``; a video with no more than that is the stretch.

    Returns:
        ``(frames,)`` int64, ascending, each in ``[0, count)``.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 1 or frames < 1:
        raise ValueError(f"count and frames: wanted at least 1 of each, got {count} and {frames}")
    if stride is not None:
        if stride < 1:
            raise ValueError(f"stride: wanted at least 1 frame, got {stride}")
        span = min(count, frames * stride)
        first = (count - span) // 2
        if mode == "random":
            first = int(torch.randint(count - span + 1, (), generator=generator, device="cpu"))
            mode = "uniform"
        return first + frame_indices(span, frames, mode=mode)
    if mode == "uniform":
        return (2 * torch.arange(frames, device="cpu") + 1) * count // (2 * frames)
    if mode != "random":
        raise ValueError(f"mode: wanted 'uniform' or 'random', got {mode!r}")
    jitter = torch.rand(frames, generator=generator, dtype=torch.float64, device="cpu")
    places = torch.arange(frames, device="cpu") + jitter
    return (places * count / frames).long().clamp(max=count - 1)


def decode(
    path: str | PathLike[str],
    frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    first_frame: int | None = None,
    last_frame: int | None = None,
    mode: str = "uniform",
    generator: torch.Generator | None = None,
    size: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """``frames`` frames of a video, or of a stretch of it, chosen by :func:`frame_indices`.

    Pictures are as a player shows them: turned as the file asks, their pixels square. Interlaced frames stay so, with
    a warning. A frame that cannot be decoded is replaced by its nearest neighbour where at most 5% of the stretch (or
    one frame) are lost.

    Args:
        path: the video, a file.
        frames: how many to choose; frames repeat where the stretch has fewer.
        start: first moment of the stretch, in seconds as players count them: from the moment at which the file starts,
            be it with a picture or with sound.
        end: moment after the last; an ``end`` somewhat past the video's own is the video's own. ``None`` for the end
            of the video.
        first_frame: index of the first frame of the stretch, instead of ``start``.
        last_frame: index of its last frame, itself included; past the end of the video it is the video's last.
        mode, generator, stride: of :func:`frame_indices`.
        size: shorter side of the result in pixels; larger videos are scaled down to it, smaller ones stay as they are.

    Returns:
        ``(frames, H, W, 3)`` uint8, RGB.

    Raises:
        VideoError: the file is missing, corrupt, cut off, or holds nothing of the stretch.
        ValueError: an argument is out of its range.
        TypeError: an argument is no number.
        ImportError: PyAV is not installed.
    """
    cut = _checked(start, end, first_frame, last_frame)
    frames = _whole("frames", frames, 1)
    size = None if size is None else _whole("size", size, 1, " pixel")
    if mode not in ("uniform", "random"):
        raise ValueError(f"mode: wanted 'uniform' or 'random', got {mode!r}")
    stride = None if stride is None else _whole("stride", stride, 1, " frame")
    choose = partial(frame_indices, frames=frames, mode=mode, generator=generator, stride=stride)
    listed = 0
    with opened(path) as source:
        listing = _listing(source, cut)
        if listing is not None and listing.times:
            span = _within(source, listing, cut)
            listed = len(span)
            chosen = [span[place] for place in choose(listed).tolist()]
            pictures = _sought(source, span, sorted(set(chosen)), size)
            if pictures is not None:
                return torch.from_numpy(np.stack([pictures[pts] for pts in chosen]))
            if source.seconds(chosen[0]) > _FAR:
                raise VideoError(
                    f"{path}: damaged, not every frame at {source.seconds(chosen[0]):.2f} s can be decoded"
                )
    return _decode_counted(path, cut, choose, listed, size)


def probe(path: str | PathLike[str], *, end: bool = False) -> None:
    """Checks that a file opens, has a video stream, and that a frame of it decodes.

    Args:
        path: the video, a file.
        end: check also that the video goes on to the end that its container states. Of the file only that end is read;
            all of it where it breaks off.

    Raises:
        VideoError: it does not.
        ImportError: PyAV is not installed.
    """
    with opened(path) as source:
        if next(source.frames(), None) is None:
            raise VideoError(f"{path}: holds no frame that can be decoded")
        if not end or source.end is None:
            return
        for _ in source.seeks(source.pts(source.end - 1.0)):
            listing = source.listed()
            if listing is None:
                return
            if listing.times:
                covered, step = _covered(source, listing)
                _check_end(source, covered, step, source.first, source.end)
                return


def extent(path: str | PathLike[str]) -> Extent:
    """When a video has pictures. Nothing is decoded where the container states its end, as most do.

    Args:
        path: the video, a file.

    Raises:
        VideoError: the file is missing, corrupt, or has no video.
        ImportError: PyAV is not installed.
    """
    with opened(path) as source:
        if source.end is not None and source.end > source.first:
            return Extent(source.first, source.end, source.step)
        listing = source.listed()
        if listing is not None and listing.times:
            return Extent(source.seconds(listing.times[0]), *_covered(source, listing))
    with opened(path) as source:
        listing = _decoded_times(source, _Cut(None, None, None, None))
        if not listing.times:
            raise VideoError(f"{path}: holds no frame that can be decoded")
        return Extent(source.seconds(listing.times[0]), *_covered(source, listing))


def _sought(source: Source, span: list[int], wanted: list[int], size: int | None) -> dict[int, np.ndarray] | None:
    """Pictures of the wanted frames of a stretch, by seeking to them; ``None`` where seeking does not get there.

    Raises:
        VideoError: it does, and too many are lost.
    """
    pictures = None
    for _ in islice(source.seeks(wanted[0]), len(SEEK_BACK)):
        frames = ((frame.pts, frame) for frame in source.frames(from_key=True))
        picked = pick(frames, wanted, span[0], span[-1], Screen(source.path, source.aspect, size))
        lost, among = _lost(picked, span, wanted)
        good = lost <= _may_be_lost(among) and len(picked.used) == len(wanted)
        pictures = picked.pictures if good else None
        # What was reached from before the stretch is as good as it gets; else the index may be off.
        reached = bool(picked.seen) and picked.seen[0] <= wanted[0]
        if reached and not good:
            raise VideoError(f"{source.path}: damaged, only {among - lost} of {among} frames can be decoded")
        if reached or lost == 0:
            break
    return pictures


def _lost(picked: Picked, span: list[int], wanted: list[int]) -> tuple[int, int]:
    """How many frames are missing among those of the stretch that were gone through, and how many those are."""
    low, high = min([*picked.used.values(), wanted[0]]), max([*picked.used.values(), wanted[-1]])
    through = span[bisect_left(span, low) : bisect_left(span, high + 1)]
    return len(set(through).difference(picked.seen)), len(through)


def _may_be_lost(frames: int) -> int:
    return max(1, int(_LOST * frames))


def _decode_counted(
    path: str | PathLike[str], cut: _Cut, choose: Callable[[int], Tensor], listed: int, size: int | None
) -> Tensor:
    """The same without packet times: one pass counts frames, a second keeps the chosen ones; ``listed`` if known."""
    with opened(path) as source:
        listing = _decoded_times(source, cut)
        span = _within(source, listing, cut)
        lost = max(listed - len(span), source.faults)
        if lost > _may_be_lost(len(span) + lost):
            raise VideoError(f"{path}: damaged, only {len(span)} of {len(span) + lost} frames can be decoded")
        first = listing.times.index(span[0])
        chosen = [first + place for place in choose(len(span)).tolist()]
    with opened(path) as source:
        wanted = sorted(set(chosen))
        picked = pick(enumerate(source.frames()), wanted, 0, wanted[-1], Screen(path, source.aspect, size))
    if list(picked.used.values()) != wanted:
        raise VideoError(f"{path}: decoded to {len(listing.times)} frames once and to fewer the second time")
    return torch.from_numpy(np.stack([picked.pictures[place] for place in chosen]))


def _checked(start: Any, end: Any, first_frame: Any, last_frame: Any) -> _Cut:
    """The stretch; refuses one that is none, by the name of the argument."""
    for name, value in (("start", start), ("end", end)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: wanted a number of seconds, got {type(value).__name__} {value!r}")
        open_end = "; leave it out for the end of the video" if name == "end" and value > 0 else ""
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name}: wanted a finite number of seconds, got {value}{open_end}")
        if value > _LONGEST:
            raise ValueError(f"{name}: wanted at most {_LONGEST:g} s, got {value}{open_end}")
    first = None if first_frame is None else _whole("first_frame", first_frame, 0)
    last = None if last_frame is None else _whole("last_frame", last_frame, 0)
    if (start, end) != (None, None) and (first, last) != (None, None):
        raise ValueError("give start and end (seconds) or first_frame and last_frame, not both")
    if start is not None and start < 0:
        raise ValueError(f"start: wanted at least 0 s, got {start}")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end: wanted more than start ({start or 0.0} s), got {end}")
    if last is not None and last < (first or 0):
        raise ValueError(f"last_frame: wanted at least first_frame ({first or 0}), got {last}")
    return _Cut(None if start is None else float(start), None if end is None else float(end), first, last)


def _whole(name: str, value: Any, least: int, unit: str = "") -> int:
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__} {value!r}")
    if number < least:
        raise ValueError(f"{name}: wanted at least {least}{unit}, got {number}")
    return number


def _listing(source: Source, cut: _Cut) -> Listing | None:
    """The frames from before the cut to past its end, or ``None`` where packets do not tell."""
    if source.timeless:
        return None
    if cut.start is None:
        return source.listed(cut.end, None if cut.last is None else cut.last + 1)
    start = max(source.start_pts, source.pts(cut.start - ROUNDING))
    for _ in source.seeks(start):
        listing = source.listed(cut.end)
        if listing is None or (listing.times and listing.times[0] <= start):
            return listing
    return None


def _decoded_times(source: Source, cut: _Cut) -> Listing:
    """Every frame from the beginning of the file to past the cut's end, by decoding them.

    Where frames have no times of their own, or those do not ascend, they are counted at the stream's rate.
    """
    step = max(1, round((source.step or 1 / 25) / float(source.stream.time_base)))
    times: list[int] = []
    counted: list[int] = []
    for frame in source.frames():
        counted.append(source.start_pts + len(counted) * step)
        if not source.timeless and len(times) == len(counted) - 1 and _ascends(times, frame.pts):
            times.append(frame.pts)
        latest = times[-1] if len(times) == len(counted) else counted[-1]
        if cut.end is not None and source.seconds(latest) > cut.end + ROUNDING:
            break
        if cut.last is not None and len(counted) > cut.last + 1:
            break
    return Listing(times if len(times) == len(counted) else counted, 0)


def _ascends(times: list[int], pts: int | None) -> bool:
    return pts is not None and (not times or pts > times[-1])


def _within(source: Source, listing: Listing, cut: _Cut) -> list[int]:
    """The times that are in the cut; at least one."""
    path, times = source.path, listing.times
    if not times:
        raise VideoError(f"{path}: holds no frame that can be decoded")
    _check_covered(source, listing, cut)
    if cut.first is not None or cut.last is not None:
        span = times[cut.first or 0 : None if cut.last is None else cut.last + 1]
        if not span:
            raise VideoError(f"{path}: has {len(times)} frames, wanted frames from {cut.first}")
        return span
    seconds = [source.seconds(pts) for pts in times]
    low = bisect_left(seconds, cut.start - ROUNDING) if cut.start is not None else 0
    high = bisect_left(seconds, cut.end - ROUNDING) if cut.end is not None else len(times)
    # A cut between two frames shows the one before it.
    return times[low:high] or [times[max(high - 1, 0)]]


def _check_covered(source: Source, listing: Listing, cut: _Cut) -> None:
    """Refuses a stretch that the video does not have: it ends or starts elsewhere, was cut off, is damaged."""
    path, times = source.path, listing.times
    covered, step = _covered(source, listing)
    begun, start = source.seconds(times[0]), cut.start or 0.0
    wanted = min((bound for bound in (cut.end, source.end) if bound is not None), default=covered)
    if cut.last is not None and len(times) > cut.last:
        wanted = covered
    spare = _check_end(source, covered, step, start, wanted)
    late = begun - max(start, source.first)
    if covered > start and late > spare:
        raise VideoError(f"{path}: damaged, the first frame that can be decoded is {late:.2f} s late")
    if covered <= start:
        raise VideoError(f"{path}: ends at {covered:.2f} s, before the start of the clip at {start:.2f} s")
    if cut.end is None:
        return
    middle = (start + cut.end) / 2
    if covered < middle:
        raise VideoError(f"{path}: ends at {covered:.2f} s, early in the clip {start:.2f} to {cut.end:.2f} s")
    if source.first > middle and begun > middle:
        raise VideoError(
            f"{path}: its first frame is at {begun:.2f} s, late in the clip {start:.2f} to {cut.end:.2f} s"
        )


def _covered(source: Source, listing: Listing) -> tuple[float, float]:
    """The moment at which the last listed frame ends, and the usual seconds from frame to frame."""
    unit = float(source.stream.time_base)
    steps = [after - before for before, after in pairwise(listing.times)]
    step = median(steps) * unit if steps else source.step
    return source.seconds(listing.times[-1]) + max(step, listing.hold * unit), step


def _check_end(source: Source, covered: float, step: float, start: float, wanted: float) -> float:
    """Refuses a stretch from ``start`` that should go on to ``wanted``; returns the seconds that it may lack."""
    spare = max(2 * step, _LOST * (wanted - start), 2 * ROUNDING)
    if wanted > start and covered < wanted - spare:
        raise VideoError(f"{source.path}: cut off after {covered:.2f} s, wanted frames up to {wanted:.2f} s")
    return spare
