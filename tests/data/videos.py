"""Small videos for the tests: the frame number is written in a picture as eight black or white bars, its bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

RATE = 20
WIDTH, HEIGHT = 64, 48
_BITS = 1 << np.arange(8)


def write_video(path: Path, frames: int, *, codec: str | None = None, faststart: bool = False) -> Path:
    """``frames`` frames, a key frame every ten, in a codec there is; ``faststart`` puts an mp4's index first."""
    import av

    options = {"movflags": "faststart"} if faststart and path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec or _encoder(), rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 10
        stream.codec_context.thread_count = 1
        stream.bit_rate = 2_000_000
        for number in range(frames):
            bars = np.where(number & _BITS, 235, 20).astype(np.uint8).repeat(WIDTH // 8)
            picture = np.broadcast_to(bars[None, :, None], (HEIGHT, WIDTH, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
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
