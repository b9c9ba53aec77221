"""Small videos for the tests: the frame number is written in a picture as eight black or white bars, its bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

RATE = 20
WIDTH, HEIGHT = 64, 48
_BITS = 1 << np.arange(8)


def write_video(
    path: Path,
    frames: int,
    *,
    codec: str | None = None,
    faststart: bool = False,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """``frames`` frames, a key frame every ten, in a codec there is; ``faststart`` puts an mp4's index first."""
    flags = {"movflags": "faststart"} if faststart and path.suffix in (".mp4", ".mov") else {}
    settings = {"codec": codec, "pixels": pixels, "options": options, "container": flags}
    return write_pictures(path, [numbered(number) for number in range(frames)], **settings)


def numbered(number: int) -> np.ndarray:
    """A picture with its number in it."""
    bars = np.where(number & _BITS, 235, 20).astype(np.uint8).repeat(WIDTH // 8)
    return np.ascontiguousarray(np.broadcast_to(bars[None, :, None], (HEIGHT, WIDTH, 3)))


def write_pictures(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    codec: str | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    times: Sequence[float] | None = None,
    delay: float = 0.0,
    sound: float | None = None,
    change: Callable[[list[Any]], None] = lambda packets: None,
) -> Path:
    """A video of ``(H, W, 3)`` uint8 pictures.

    Args:
        path: its suffix says which container.
        pictures: shown one after another at ``RATE``, or at ``times`` in seconds.
        codec, pixels, options: of the encoder; ``container``: of the muxer.
        prepare: what else the stream needs before it is encoded.
        delay: seconds that the video begins late.
        sound: as many seconds of silence begin at 0.
        change: what is done to the video's packets.
    """
    import av

    tick = Fraction(1, RATE) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec or _encoder(), rate=RATE, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 10
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = tick
        if "crf" not in (options or {}):
            stream.bit_rate = 2_000_000
        prepare(stream)
        packets = []
        silence = None if sound is None else out.add_stream("aac", rate=48_000, layout="mono")
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number if times is None else round(times[number] / tick), tick
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in packets:
            packet.pts += round(delay / packet.time_base)
            packet.dts += round(delay / packet.time_base)
        change(packets)
        if silence is not None:
            packets += _silence(silence, sound)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return path


def _silence(stream: Any, seconds: float) -> list[Any]:
    import av

    packets = []
    for start in range(0, round(seconds * 48_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        packets += stream.encode(frame)
    return [*packets, *stream.encode()]


def packet_places(path: Path) -> list[tuple[int, int, bool]]:
    """Where each packet of the video lies: first byte, bytes, whether it is a key frame."""
    import av

    with av.open(str(path)) as container:
        return [(packet.pos, packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


def damage(path: Path, *places: int, codec_header: int = 8) -> Path:
    """Turns the bits of these packets, counted in the order of the file, after ``codec_header`` bytes of each."""
    content = bytearray(path.read_bytes())
    packets = packet_places(path)
    for place in places:
        start, size, _ = packets[place]
        content[start + codec_header : start + size] = bytes(
            byte ^ 0x5A for byte in content[start + codec_header : start + size]
        )
    path.write_bytes(content)
    return path


def frame_numbers(clip: Tensor) -> list[int]:
    """Which frame each picture of ``(T, H, W, 3)`` uint8 is."""
    bars = clip.double().mean((1, 3)).view(len(clip), 8, -1).mean(2)
    return [int(_BITS[row > 128].sum()) for row in bars.numpy()]


def truncate(path: Path, share: float) -> Path:
    """Keeps the first ``share`` of a file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def _encoder() -> str:
    import av

    return "mpeg4" if "mpeg4" in av.codecs_available else "libx264"
