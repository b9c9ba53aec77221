"""A video file as packets and frames, by PyAV: which stream is read, which moments its frames have, how to get to one.

Moments are those of the file: 0 s is where a player starts it. That is the first moment of any of its streams, as
containers state it, which need not be that of the first frame: sound may begin earlier, and MPEG-TS counts on from
anywhere. Packets and frames that are damaged cost themselves and no more.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from os import PathLike

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ROUNDING = 1e-3  # s; Matroska stores times in milliseconds
SEEK_BACK = (0.0, 2.0, 20.0)  # s before the start, for containers whose index is off; then the file's beginning
_MISTIMED = ("mpeg",)  # FFmpeg gives frames of an MPEG program stream wrong times after a seek into it
_UNREADABLE = 8  # reads that fail in a row end the file


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and the reason."""


class Listing(NamedTuple):
    """Which frames a stretch has.

    Attributes:
        times: their pts, ascending, each there once.
        hold: how long the last is shown, in the same unit; 0 where that is not known.
    """

    times: list[int]
    hold: int


class Source:
    """An open file and the stream that is read from it.

    Attributes:
        path: the file, as it was given.
        container, stream: PyAV's.
        first: moment of the stream's first frame in seconds, as the container states it.
        end: moment at which the stream ends in seconds, as the container states it, or ``None``.
        step: seconds from frame to frame by the stream's rate, or 0.
        aspect: of a pixel, width by height, or ``None``.
        timeless: the container has no times at which frames are shown: AVI with B-frames, for which FFmpeg makes up
            times that are a frame late or out of order.
        faults: packets that could not be decoded so far.
    """

    def __init__(self, path: str | PathLike[str], container: InputContainer, stream: VideoStream) -> None:
        self.path, self.container, self.stream, self.faults = path, container, stream, 0
        self._base = stream.time_base
        self.start_pts = stream.start_time or 0
        own = self.start_pts * self._base
        whole = own if container.start_time is None else Fraction(container.start_time, 1_000_000)
        # A container counts in microseconds; where the stream is what begins, its own clock is exact.
        self._origin = whole if own - whole > ROUNDING else own
        self._scale, self._shift = float(self._base), float(self._origin)
        self.first = self.seconds(self.start_pts)
        rate = stream.average_rate or stream.guessed_rate
        self.step = float(1 / rate) if rate else 0.0
        self.end = self._declared_end()
        self.aspect = stream.sample_aspect_ratio
        self.timeless = container.format.name == "avi" and bool(stream.codec_context.has_b_frames)

    def seconds(self, pts: int) -> float:
        """A moment of the stream's clock in seconds of the file."""
        return pts * self._scale - self._shift

    def pts(self, seconds: float) -> int:
        """The stream's clock at a moment in seconds of the file."""
        return round((seconds + self._shift) / self._scale)

    def packets(self) -> Iterator[Packet]:
        """Packets of the stream in the order of the file; those that cannot be read are passed over."""
        error = import_av().FFmpegError
        failed = 0
        while failed < _UNREADABLE:
            try:
                for packet in self.container.demux(self.stream):
                    failed = 0
                    yield packet
                return
            except error:
                failed += 1

    def frames(self, *, from_key: bool = False) -> Iterator[VideoFrame]:
        """Frames in the order in which they are shown, from the next packet on.

        Args:
            from_key: from the next key frame on. MPEG-TS seeks to any frame, and what comes before a key frame is
                rubbish.
        """
        error = import_av().FFmpegError
        keyed = not from_key
        for packet in self.packets():
            keyed = keyed or packet.is_keyframe or packet.size == 0
            if not keyed:
                continue
            try:
                frames = packet.decode()
            except error:
                self.faults += 1
                continue
            yield from frames

    def seeks(self, pts: int) -> Iterator[None]:
        """Moves before ``pts``, further back each time it is resumed, last to the beginning; ends if it cannot."""
        origin, error = self.start_pts, import_av().FFmpegError
        targets = [pts - round(back / self._scale) for back in SEEK_BACK]
        targets = [target for target in targets if target > origin]
        if self.container.format.name in _MISTIMED:
            targets = []
        # MPEG-TS seeks by dts, which begin before the first pts; FLV refuses to go there.
        for target in [*targets, origin, origin - round(1 / self._scale)]:
            try:
                self.container.seek(target, stream=self.stream, backward=True)
            except error:
                return
            yield

    def listed(self, end: float | None = None, count: int | None = None) -> Listing | None:
        """The frames from the next key frame on (what is shown before it cannot be decoded).

        Args:
            end: read on to past this moment in seconds.
            count: read on until the first ``count`` frames are sure.

        Returns:
            ``None`` where packets have no times, or two have the same.
        """
        times: list[int] = []
        unsure: list[int] = []  # a heap: frames before which another may still be shown
        key: int | None = None
        last = hold = 0
        limit = None if end is None else self.pts(end + ROUNDING)
        for packet in self.packets():
            if packet.size == 0:
                continue
            pts, dts = packet.pts, packet.dts
            if pts is None:
                return None
            if key is None and packet.is_keyframe:
                key = last = pts
            if key is not None and pts >= key and not packet.is_discard and not packet.is_corrupt:
                times.append(pts)
                if pts >= last:
                    last, hold = pts, packet.duration or 0
                if count is not None:
                    heapq.heappush(unsure, pts)
            # No later packet is shown before its own dts.
            if dts is not None:
                while unsure and unsure[0] < dts:
                    heapq.heappop(unsure)
                if (limit is not None and dts > limit) or (count is not None and len(times) - len(unsure) > count):
                    break
        times.sort()
        return None if len(set(times)) < len(times) else Listing(times, hold)

    def _declared_end(self) -> float | None:
        if self.stream.duration is not None and self.stream.duration > 0:
            return self.seconds(self.start_pts + self.stream.duration)
        try:  # Matroska, as FFmpeg writes it: when the last frame ends, HH:MM:SS.fraction
            hours, minutes, seconds = self.stream.metadata["DURATION"].split(":")
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds) - self._shift
        except (KeyError, ValueError):
            return None


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[Source]:
    """A video, decoded by one thread; errors of FFmpeg inside become :class:`VideoError`.

    Raises:
        VideoError: the file cannot be opened or has no video that can be decoded.
        ImportError: PyAV is not installed.
    """
    av = import_av()
    with ExitStack() as stack:
        try:
            container = stack.enter_context(av.open(_openable(path, stack), metadata_errors="replace"))
            stream = _best_stream(path, container)
            stream.codec_context.thread_type = "SLICE"
            stream.codec_context.thread_count = 1  # loaders already run one process a core
            yield Source(path, container, stream)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{path}: {error.strerror or error}") from error


def import_av() -> Any:
    """PyAV, with a word on where it comes from if it is not there."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'dsts_kernels[train]'") from error
    return av


def _openable(path: str | PathLike[str], stack: ExitStack) -> Any:
    """What FFmpeg opens as this file: an absolute path, since ``colon:1.mp4`` alone is a protocol to it."""
    name = os.path.abspath(os.fsdecode(path))
    try:
        name.encode()
    except UnicodeEncodeError:  # a name in bytes that are no UTF-8, which PyAV cannot pass on
        return stack.enter_context(open(name, "rb"))
    return name


def _best_stream(path: str | PathLike[str], container: InputContainer) -> VideoStream:
    """FFmpeg's choice among the streams that are no cover pictures and that can be decoded."""
    flags = import_av().stream.Disposition
    still = flags.attached_pic | flags.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & still]
    if not moving:
        cover = ", only a cover picture" if container.streams.video else ""
        kinds = ", ".join(sorted({stream.type for stream in container.streams if stream.type != "video"}))
        raise VideoError(f"{path}: has no video stream{cover}{f' ({kinds} only)' if kinds and not cover else ''}")
    decodable = [stream for stream in moving if stream.codec_context is not None]
    if not decodable:
        raise VideoError(f"{path}: this FFmpeg has no decoder for its video stream")
    best = container.streams.best("video")
    chosen = next((stream for stream in decodable if best is not None and stream.index == best.index), None)
    return chosen or next((stream for stream in decodable if stream.disposition & flags.default), decodable[0])
