"""A few frames of a video with PyAV: which ones (`frame_indices`), and the decoding of just those (`decode`).

Containers often give no frame count, or a wrong one. So the packets of the stretch are listed first (demuxed, not
decoded), their times say which frames there are, and one decoding pass from the key frame before keeps the chosen ones.
Where packets carry no usable times, two decoding passes do the same: one counts, one keeps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise
from os import PathLike
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["VideoError", "decode", "frame_indices", "probe"]

_ROUNDING = 1e-3  # s; Matroska stores times in milliseconds
_LOST = 0.05  # share of a stretch that may be missing, as containers are not exact about their length
_FAR = 60.0  # s; what seeking does not find further into a video is not looked for from its beginning
_SEEK_BACK = (0.0, 2.0, 20.0)  # s before the start, for containers whose index is off; then the file's beginning


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and the reason."""


class _Cut(NamedTuple):
    start: float | None
    end: float | None
    first: int | None
    last: int | None


def frame_indices(
    count: int, frames: int, *, mode: str = "uniform", generator: torch.Generator | None = None
) -> Tensor:
    """One index from each of ``frames`` equal segments of a video.

    Args:
        count: frames in the video, at least 1; with fewer than ``frames`` some repeat.
        frames: how many to choose.
        mode: ``"uniform"`` takes the middle of each segment, ``"random"`` a random place in it.
        generator: of the random places; torch's own by default.

    Returns:
        ``(frames,)`` int64, ascending, each in ``[0, count)``.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 1 or frames < 1:
        raise ValueError(f"count and frames: wanted at least 1 of each, got {count} and {frames}")
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
) -> Tensor:
    """``frames`` frames of a video, or of a stretch of it, chosen by :func:`frame_indices`.

    Args:
        path: the video.
        frames: how many to choose; frames repeat where the stretch has fewer.
        start: first moment of the stretch, in seconds from the start of the video.
        end: moment after the last; an ``end`` somewhat past the video's own is the video's own.
        first_frame: index of the first frame of the stretch, instead of ``start``.
        last_frame: index of its last frame, itself included; past the end of the video it is the video's last.
        mode, generator: of :func:`frame_indices`.
        size: shorter side of the result in pixels; larger videos are scaled down to it, smaller ones stay as they are.

    Returns:
        ``(frames, H, W, 3)`` uint8, RGB.

    Raises:
        VideoError: the file is missing, corrupt, cut off, or holds nothing of the stretch.
        ValueError: an argument is out of its range.
        ImportError: PyAV is not installed.
    """
    cut = _checked(frames, start, end, first_frame, last_frame, mode, size)
    choose = partial(frame_indices, frames=frames, mode=mode, generator=generator)
    listed = 0
    with _opened(path) as (container, stream):
        times = _packet_times(container, stream, cut)
        if times:
            span = _within(path, stream, times, cut)
            listed = len(span)
            chosen = [span[index] for index in choose(listed).tolist()]
            for _ in islice(_seeks(container, stream, chosen[0]), len(_SEEK_BACK)):
                kept = _keep(((frame.pts, frame) for frame in _from_key(container, stream)), set(chosen), size)
                if len(kept) == len(set(chosen)):
                    return torch.from_numpy(np.stack([kept[pts] for pts in chosen]))
            if _seconds(stream, chosen[0]) > _FAR:
                raise VideoError(
                    f"{path}: damaged, not every frame at {_seconds(stream, chosen[0]):.2f} s can be decoded"
                )
    return _decode_counted(path, cut, choose, listed, size)


def probe(path: str | PathLike[str]) -> None:
    """Checks that a file opens, has a video stream, and that its first frame decodes; the rest is not read.

    Raises:
        VideoError: it does not.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        if next(container.decode(stream), None) is None:
            raise VideoError(f"{path}: holds no frame that can be decoded")


def _decode_counted(
    path: str | PathLike[str], cut: _Cut, choose: Callable[[int], Tensor], listed: int, size: int | None
) -> Tensor:
    """The same without packet times: one pass counts frames, a second keeps the chosen ones; ``listed`` if known."""
    with _opened(path) as (container, stream):
        times = _decoded_times(container, stream, cut)
        span = _within(path, stream, times, cut)
        if len(span) < listed - max(1, _LOST * listed):
            raise VideoError(f"{path}: damaged, only {len(span)} of {listed} frames can be decoded")
        first = times.index(span[0])
        chosen = [first + index for index in choose(len(span)).tolist()]
    with _opened(path) as (container, stream):
        kept = _keep(enumerate(container.decode(stream)), set(chosen), size)
    if len(kept) != len(set(chosen)):
        raise VideoError(f"{path}: decoded to {len(times)} frames once and to fewer the second time")
    return torch.from_numpy(np.stack([kept[index] for index in chosen]))


def _checked(
    frames: int,
    start: float | None,
    end: float | None,
    first_frame: int | None,
    last_frame: int | None,
    mode: str,
    size: int | None,
) -> _Cut:
    if frames < 1:
        raise ValueError(f"frames: wanted at least 1, got {frames}")
    if mode not in ("uniform", "random"):
        raise ValueError(f"mode: wanted 'uniform' or 'random', got {mode!r}")
    if size is not None and size < 1:
        raise ValueError(f"size: wanted at least 1 pixel, got {size}")
    in_seconds, in_frames = (start, end) != (None, None), (first_frame, last_frame) != (None, None)
    if in_seconds and in_frames:
        raise ValueError("give start and end (seconds) or first_frame and last_frame, not both")
    if in_seconds and not 0 <= (start or 0.0) < (float("inf") if end is None else end):
        raise ValueError(f"start, end: wanted 0 <= start < end in seconds, got {start} and {end}")
    if in_frames and not 0 <= (first_frame or 0) <= (float("inf") if last_frame is None else last_frame):
        raise ValueError(f"first_frame, last_frame: wanted 0 <= first <= last, got {first_frame} and {last_frame}")
    return _Cut(start, end, first_frame, last_frame)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'dsts_kernels[train]'") from error
    return av


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video and its stream, decoded by one thread; errors of FFmpeg inside become :class:`VideoError`."""
    av = _import_av()
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(f"{path}: has no video stream")
            if stream.codec_context is None:
                raise VideoError(f"{path}: this FFmpeg has no decoder for its video stream")
            stream.codec_context.thread_type = "SLICE"
            stream.codec_context.thread_count = 1  # loaders already run one process a core
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error


def _origin(stream: VideoStream) -> int:
    return stream.start_time or 0


def _seconds(stream: VideoStream, pts: int) -> float:
    return float((pts - _origin(stream)) * stream.time_base)


def _seeks(container: InputContainer, stream: VideoStream, pts: int) -> Iterator[None]:
    """Moves before ``pts``, further back each time it is resumed, last to the beginning; ends early if it cannot."""
    origin = _origin(stream)
    targets = [pts - round(back / stream.time_base) for back in _SEEK_BACK]
    # MPEG-TS seeks by dts, which begin before the first pts; FLV refuses to go there.
    for target in [*(target for target in targets if target > origin), origin, origin - round(1 / stream.time_base)]:
        try:
            container.seek(target, stream=stream, backward=True)
        except _import_av().FFmpegError:
            return
        yield


def _from_key(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Frames from the next key frame on: MPEG-TS seeks to any frame, and what comes before a key frame is rubbish."""
    keyed = False
    for packet in container.demux(stream):
        keyed = keyed or packet.is_keyframe or packet.size == 0
        if keyed:
            yield from packet.decode()


def _packet_times(container: InputContainer, stream: VideoStream, cut: _Cut) -> list[int] | None:
    """Ascending pts of the frames from before the cut to past its end, or ``None`` where packets do not tell."""
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        return None  # AVI has no pts, and those made up by FFmpeg are out of order
    if cut.start is None:
        return _listed(container, stream, cut.end)
    start = max(_origin(stream), _origin(stream) + round((cut.start - _ROUNDING) / stream.time_base))
    for _ in _seeks(container, stream, start):
        times = _listed(container, stream, cut.end)
        if times is None or (times and times[0] <= start):
            return times
    return None


def _listed(container: InputContainer, stream: VideoStream, end: float | None) -> list[int] | None:
    """Ascending pts from the next key frame (what is shown before it cannot be decoded) to past ``end`` seconds."""
    times: list[int] = []
    key: int | None = None
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.pts is None:
            return None
        if key is None and packet.is_keyframe:
            key = packet.pts
        if key is not None and packet.pts >= key and not packet.is_discard and not packet.is_corrupt:
            times.append(packet.pts)
        # No later packet is shown before its own dts.
        if end is not None and packet.dts is not None and _seconds(stream, packet.dts) > end + _ROUNDING:
            break
    times.sort()
    return None if len(set(times)) < len(times) else times


def _decoded_times(container: InputContainer, stream: VideoStream, cut: _Cut) -> list[int]:
    """Ascending pts of every frame from the beginning of the file to past the cut's end, by decoding them.

    Where the frames' own do not ascend (B-frames in AVI) they are counted at the stream's rate.
    """
    rate = stream.average_rate or stream.guessed_rate or 25
    step = max(1, round(1 / (rate * stream.time_base)))
    times: list[int] = []
    counted: list[int] = []
    for frame in container.decode(stream):
        counted.append(_origin(stream) + len(counted) * step)
        if frame.pts is not None and len(times) == len(counted) - 1 and (not times or frame.pts > times[-1]):
            times.append(frame.pts)
        latest = times[-1] if len(times) == len(counted) else counted[-1]
        if cut.end is not None and _seconds(stream, latest) > cut.end + _ROUNDING:
            break
        if cut.last is not None and len(counted) > cut.last + 1:
            break
    return times if len(times) == len(counted) else counted


def _within(path: str | PathLike[str], stream: VideoStream, times: list[int], cut: _Cut) -> list[int]:
    """The times that are in the cut; at least one."""
    if not times:
        raise VideoError(f"{path}: holds no frame that can be decoded")
    steps = [after - before for before, after in pairwise(times)]
    step = float(median(steps) * stream.time_base) if steps else 0.0
    covered = _seconds(stream, times[-1]) + step
    start = cut.start or 0.0
    length = _declared_length(stream)
    wanted = min((bound for bound in (cut.end, length) if bound is not None), default=covered)
    if cut.last is not None and len(times) > cut.last:
        wanted = covered
    if wanted > start and covered < wanted - max(2 * step, _LOST * (wanted - start), 2 * _ROUNDING):
        raise VideoError(f"{path}: cut off after {covered:.2f} s, wanted frames up to {wanted:.2f} s")
    late = _seconds(stream, times[0]) - start
    if covered > start and late > max(2 * step, _LOST * (wanted - start), 2 * _ROUNDING):
        raise VideoError(f"{path}: damaged, the first frame that can be decoded is {late:.2f} s late")
    if covered <= start:
        raise VideoError(f"{path}: ends at {covered:.2f} s, before the start of the clip at {start:.2f} s")
    if cut.end is not None and covered < (start + cut.end) / 2:
        raise VideoError(f"{path}: ends at {covered:.2f} s, early in the clip {start:.2f} to {cut.end:.2f} s")
    if cut.first is not None or cut.last is not None:
        span = times[cut.first or 0 : None if cut.last is None else cut.last + 1]
        if not span:
            raise VideoError(f"{path}: has {len(times)} frames, wanted frames from {cut.first}")
        return span
    seconds = [_seconds(stream, pts) for pts in times]
    low = bisect_left(seconds, start - _ROUNDING) if cut.start is not None else 0
    high = bisect_left(seconds, cut.end - _ROUNDING) if cut.end is not None else len(times)
    # A cut between two frames shows the one before it.
    return times[low:high] or [times[max(high - 1, 0)]]


def _declared_length(stream: VideoStream) -> float | None:
    """What the container says of the stream's length in seconds, where it does."""
    if stream.duration is not None and stream.duration > 0:
        return float(stream.duration * stream.time_base)
    try:  # Matroska, as FFmpeg writes it: HH:MM:SS.fraction
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return None


def _keep(frames: Iterator[tuple[int | None, VideoFrame]], wanted: set[int], size: int | None) -> dict[int, np.ndarray]:
    """The frames whose key is wanted, as ``(H, W, 3)`` arrays of one shape; reads no further than the last."""
    kept: dict[int, np.ndarray] = {}
    shape: tuple[int, int] | None = None
    last = max(wanted)
    for key, frame in frames:
        if key in wanted:
            shape = shape or _scaled(frame, size)
            width, height = shape
            picture = frame.reformat(width, height, format="rgb24", interpolation="BILINEAR", threads=1)
            kept[key] = picture.to_ndarray()
        if key is not None and key >= last:
            break
    return kept


def _scaled(frame: VideoFrame, size: int | None) -> tuple[int, int]:
    shorter = min(frame.width, frame.height)
    if size is None or size >= shorter:
        return frame.width, frame.height
    return max(size, round(frame.width * size / shorter)), max(size, round(frame.height * size / shorter))
