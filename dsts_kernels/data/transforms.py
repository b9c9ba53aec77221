"""From decoded frames to a network's input, in plain torch: scaling, cropping, flipping, jitter and normalisation.

A transform treats all frames of a clip alike, so that nothing moves or flickers that did not in the video. Its
randomness comes from the generator that it is given and from nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["EvalTransform", "TrainTransform", "resize"]

MEAN, STD = (0.5,) * 3, (0.25,) * 3  # of a pixel in [0, 1], roughly, whatever the data set
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def resize(clip: Tensor, short_side: int) -> Tensor:
    """Scales a clip so that its shorter side is ``short_side``, bilinear with antialiasing.

    Args:
        clip: ``(T, H, W, 3)`` uint8.
        short_side: in pixels, at least 1.

    Returns:
        ``(T, H', W', 3)`` uint8 with ``min(H', W') == short_side``, in the same aspect ratio.

    Raises:
        ValueError: the clip is something else, or ``short_side`` is below 1.
    """
    _check_clip(clip)
    if short_side < 1:
        raise ValueError(f"short_side: wanted at least 1 pixel, got {short_side}")
    height, width = clip.shape[1:3]
    shorter = min(height, width)
    return _scale(clip, round(height * short_side / shorter), round(width * short_side / shorter))


class TrainTransform:
    """A random crop scaled to a square, a random mirror image, random brightness and contrast.

    Args:
        size: side of the result in pixels.
        scale: least and largest share of the picture's area in a crop, whose aspect ratio is from 3:4 to 4:3.
        flip: probability of the mirror image.
        jitter: brightness and contrast are multiplied by up to ``1 +- jitter``; 0 leaves both.
        mean, std: of red, green and blue, for pixels from 0 to 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.6, 1.0),
        flip: float = 0.5,
        jitter: float = 0.2,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: wanted at least 1 pixel, got {size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: wanted 0 < least <= largest <= 1, got {scale}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: wanted a probability, got {flip}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: wanted 0 <= jitter < 1, got {jitter}")
        self.size, self.scale, self.flip, self.jitter = size, scale, flip, jitter
        self.mean, self.std = check_normalisation(mean, std)

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``(T, H, W, 3)`` uint8 to ``(3, T, size, size)`` float32; torch's own generator by default."""
        _check_clip(clip)
        top, left, height, width = self._crop(clip.shape[1], clip.shape[2], generator)
        clip = _scale(clip[:, top : top + height, left : left + width], self.size, self.size)
        mirror, brighter, contrast = torch.rand(3, generator=generator, device="cpu").tolist()
        if mirror < self.flip:
            clip = clip.flip(2)
        pixels = _channels_first(clip)
        if self.jitter:
            pixels *= 1 + self.jitter * (2 * brighter - 1)
            gray = pixels.mean()
            pixels = ((pixels - gray) * (1 + self.jitter * (2 * contrast - 1)) + gray).clamp_(0, 1)
        return normalised(pixels, self.mean, self.std)

    def _crop(self, height: int, width: int, generator: torch.Generator | None) -> tuple[int, int, int, int]:
        """Top, left, height and width; the largest crop of an allowed aspect where no drawn one fits."""
        draws = torch.rand(_ATTEMPTS, 2, generator=generator, dtype=torch.float64, device="cpu")
        place = torch.rand(2, generator=generator, dtype=torch.float64, device="cpu").tolist()
        low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
        crop_height, crop_width = min(height, round(width / _ASPECT[0])), min(width, round(height * _ASPECT[1]))
        for share, shape in draws.tolist():
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + shape * (high - low))
            drawn_height, drawn_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 1 <= drawn_height <= height and 1 <= drawn_width <= width:
                crop_height, crop_width = drawn_height, drawn_width
                break
        top, left = int(place[0] * (height - crop_height + 1)), int(place[1] * (width - crop_width + 1))
        return top, left, crop_height, crop_width


class EvalTransform:
    """The square in the middle of a clip, scaled so that the picture's shorter side fits; nothing random.

    Args:
        size: side of the result in pixels.
        mean, std: of red, green and blue, for pixels from 0 to 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, size: int, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        if size < 1:
            raise ValueError(f"size: wanted at least 1 pixel, got {size}")
        self.size = size
        self.mean, self.std = check_normalisation(mean, std)

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``(T, H, W, 3)`` uint8 to ``(3, T, size, size)`` float32; the generator is not used."""
        clip = resize(clip, self.size)
        top, left = (clip.shape[1] - self.size) // 2, (clip.shape[2] - self.size) // 2
        square = clip[:, top : top + self.size, left : left + self.size]
        return normalised(_channels_first(square), self.mean, self.std)


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Three finite numbers each, those of ``std`` above 0.

    Raises:
        ValueError: something else; names the argument.
    """
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, Sequence) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"{name}: wanted a finite number for each of red, green and blue, got {values!r}")
    if min(std) <= 0:
        raise ValueError(f"std: wanted numbers above 0, got {std!r}")
    return tuple(map(float, mean)), tuple(map(float, std))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(pixels - mean) / std`` of ``(3, T, H, W)``, channel by channel."""
    mean, std = (torch.tensor(values, device="cpu").view(3, 1, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def _check_clip(clip: Tensor) -> None:
    if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"clip: wanted (T, H, W, 3) uint8, got {tuple(clip.shape)} {clip.dtype}")


def _scale(clip: Tensor, height: int, width: int) -> Tensor:
    if clip.shape[1:3] == (height, width):
        return clip
    planes = clip.permute(0, 3, 1, 2)
    scaled = F.interpolate(planes, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return scaled.permute(0, 2, 3, 1)


def _channels_first(clip: Tensor) -> Tensor:
    """``(T, H, W, 3)`` uint8 to contiguous ``(3, T, H, W)`` float32 in ``[0, 1]``."""
    return clip.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
