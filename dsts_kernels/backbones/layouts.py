"""How a backbone lays its features out, and the views from there to ``(B, C, T, H, W)`` and back.

Every way there is a view, so nothing is copied on it: channels that lie side by side (``BTHWC``, ``BNC``) become
channels-last features, in which layers work anyway, and which ``FusedDSTS`` gives back as it got them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import _checks
from ..options import count, one_of

__all__ = ["LAYOUTS", "FeatureLayout"]

LAYOUTS = ("BCTHW", "BTHWC", "BNC", "TSN")


class FeatureLayout(NamedTuple):
    """What the features of a submodule are.

    Attributes:
        name: ``"BCTHW"``: ``(B, C, T, H, W)``, as of 3-d convolutions. ``"BTHWC"``: ``(B, T, H, W, C)``, as of Video
            Swin; with ``frames`` ``(B*T, H, W, C)``, as of an image Swin. ``"BNC"``: tokens
            ``(B, class_tokens + T*H*W, C)``; with ``frames`` ``(B*T, class_tokens + H*W, C)``, as of an image ViT.
            ``"TSN"``: frames as a batch, ``(B*T, C, H, W)``, as of TSN, TSM and timm.
        channels: ``C``.
        frames: ``T`` where the first dimension holds ``B*T`` frames, those of a clip one after the other.
        grid: ``(T, H, W)`` of tokens, with ``frames`` ``(H, W)``.
        class_tokens: how many tokens come before those of the grid; they pass as they are.
    """

    name: str
    channels: int
    frames: int | None = None
    grid: tuple[int, ...] | None = None
    class_tokens: int = 0

    def __str__(self) -> str:
        """The shape, with its sizes as far as they are known: ``"(B, 1 + 8*14*14, 768)"``."""
        batch = "B" if self.frames is None else f"{self.frames}*B"
        if self.name == "BNC":
            before = f"{self.class_tokens} + " if self.class_tokens else ""
            return f"({batch}, {before}{'*'.join(map(str, self.grid))}, {self.channels})"
        time = "" if self.frames else "T, "
        if self.name == "BTHWC":
            return f"({batch}, {time}H, W, {self.channels})"
        return f"({batch}, {self.channels}, {time}H, W)"

    @property
    def dims(self) -> int:
        return 3 if self.name == "BNC" else 5 if self.frames is None else 4

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels, counted from the end for ``BTHWC`` and ``BNC``."""
        return -1 if self.name in ("BTHWC", "BNC") else 1

    def check(self, x: object, argument: str) -> Tensor:
        """``x``, if it lies so.

        Raises:
            TypeError, ValueError: ``argument``, what came, what was wanted.
        """
        x = _checks.floating(argument, x)
        wrong = x.dim() != self.dims or x.shape[self.channel_dim] != self.channels
        if not wrong and self.name == "BNC":
            wrong = x.shape[1] != self.class_tokens + math.prod(self.grid)
        if not wrong and self.frames is not None:
            wrong = x.shape[0] % self.frames != 0
        if wrong:
            raise ValueError(f"{argument}: got {_checks.describe(x)}, wanted {self}, layout {self.name!r}")
        return x

    def apply(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function``, of features ``(B, C, T, H, W)``, on ``x``, which :meth:`check` has seen; laid out as ``x``."""
        if self.name == "BCTHW":
            return function(x)
        if self.name == "TSN":
            return _joined(function(_split(x, self.frames).transpose(1, 2)).transpose(1, 2))
        last, before = x, None
        if self.name == "BNC":
            if self.class_tokens:
                before, last = x[:, : self.class_tokens], x[:, self.class_tokens :]
            last = last.unflatten(1, self.grid)
        if self.frames is not None:
            last = _split(last, self.frames)
        y = function(last.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        if self.frames is not None:
            y = _joined(y)
        if self.name == "BNC":
            y = y.flatten(1, -2)
        return y if before is None else torch.cat((before, y), 1)


def _split(x: Tensor, frames: int) -> Tensor:
    """``(B*T, ...)`` to ``(B, T, ...)``; sizes are stated, as -1 has no value in an empty batch."""
    return x.unflatten(0, (x.shape[0] // frames, frames))


def _joined(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


class Wanted(NamedTuple):
    """What a caller says of the layout, checked; ``None`` is to be learned."""

    layout: str | None
    channels: int | None
    frames: int | None
    grid: tuple[int, ...] | None
    class_tokens: int

    @classmethod
    def read(cls, layout: object, channels: object, frames: object, grid: object, class_tokens: object) -> Wanted:
        """
        Raises:
            TypeError, ValueError: one that is out of range, or that does not go with the others.
        """
        one_of("layout", layout, (None, *LAYOUTS))
        if channels is not None:
            count("channels", channels)
        if frames is not None:
            count("frames", frames)
        count("class_tokens", class_tokens, 0)
        sizes = 3 if frames is None else 2
        if grid is not None:
            named = "(T, H, W)" if frames is None else "(H, W), as frames is given"
            if not isinstance(grid, (tuple, list)) or len(grid) != sizes or not all(type(s) is int for s in grid):
                raise ValueError(f"grid: got {grid!r}, wanted {sizes} ints, {named}")
            grid = tuple(count("grid", size) for size in grid)
        tokens = layout in (None, "BNC")
        if grid is not None and not tokens:
            raise ValueError(f"grid: got {grid}, wanted None: it is for layout 'BNC', and layout is {layout!r}")
        if class_tokens and not tokens:
            raise ValueError(
                f"class_tokens: got {class_tokens}, wanted 0: they are for layout 'BNC', and layout is {layout!r}"
            )
        if frames is not None and layout == "BCTHW":
            raise ValueError(f"frames: got {frames}, wanted None for layout 'BCTHW', whose features know their T")
        if layout == "TSN" and frames is None:
            raise ValueError("frames: got None, wanted the frames of a clip for layout 'TSN'")
        if layout == "BNC" and grid is None:
            raise ValueError("grid: got None, wanted (T, H, W) of the tokens for layout 'BNC', or frames and (H, W)")
        return cls(layout, channels, frames, grid, class_tokens)

    def known(self) -> FeatureLayout | None:
        """The layout, where nothing is left to learn."""
        return None if self.layout is None or self.channels is None else self._as(self.layout, self.channels)

    def _as(self, name: str, channels: int) -> FeatureLayout:
        return FeatureLayout(name, channels, self.frames, self.grid, self.class_tokens)

    def learn(self, x: object, clip: tuple[int, ...] | None, argument: str) -> FeatureLayout:
        """The one layout that features ``x`` of a dry run fit.

        Args:
            x: the features.
            clip: the shape of the clip that was run, if it was one tensor: features are no longer, higher or wider.
            argument: what to call ``x`` in an error.

        Raises:
            ValueError: ``x`` fits none or several, with what would do.
        """
        x = _checks.floating(argument, x)
        rest = {3: ("BNC",), 4: ("TSN", "BTHWC"), 5: ("BCTHW", "BTHWC")}.get(x.dim())
        if rest is None:
            raise ValueError(
                f"{argument}: got {_checks.describe(x)}, wanted 3, 4 or 5 dimensions; pooled features have no "
                "positions left: wanted a submodule before pooling"
            )
        if self.layout is not None and self.layout not in rest:
            either = " or ".join(map(repr, rest))
            raise ValueError(f"layout: got {self.layout!r}, wanted {either} for {argument}, {_checks.describe(x)}")
        self._check_others(x, clip, argument)
        found = [self._as(name, x.shape[-1 if name in ("BTHWC", "BNC") else 1]) for name in rest]
        if self.layout is None:
            fit = [own for own in found if self.channels in (None, own.channels) and _no_larger(own, x, clip)]
        else:
            fit = [own for own in found if own.name == self.layout]
            likely = [own for own in found if _no_larger(own, x, clip)]
            if self.channels is None and likely and not set(fit) & set(likely):
                raise ValueError(
                    f"layout: got {self.layout!r}, whose T, H, W are not those of the clip for {argument}, "
                    f"{_checks.describe(x)}; wanted {likely[0].name!r}, or channels= beside it, if it is so"
                )
        if len(fit) != 1:
            offered = " or ".join(f"{own.name!r} with channels={own.channels}" for own in fit or found)
            how_many = "none of them" if not fit else "several"
            channels = "" if self.channels is None else f" and channels={self.channels}"
            raise ValueError(
                f"layout: got None{channels}, which fit {how_many} for {argument}, {_checks.describe(x)}; wanted "
                f"layout={offered}"
            )
        if self.channels not in (None, fit[0].channels):
            raise ValueError(
                f"channels: got {self.channels}, wanted {fit[0].channels} for {argument}, {_checks.describe(x)}, in "
                f"layout {fit[0].name!r}"
            )
        fit[0].check(x, argument)
        if x.shape[0] * fit[0].channels == x.numel():
            warnings.warn(
                f"{argument}: got {_checks.describe(x)}, features of one position, where convolutions over space and "
                "time see nothing: wanted a submodule before pooling",
                stacklevel=3,  # insert_dsts
            )
        return fit[0]

    def _check_others(self, x: Tensor, clip: tuple[int, ...] | None, argument: str) -> None:
        """``frames`` and ``grid``, which nothing can learn: two readings of a batch or of tokens look alike."""
        shape = _checks.describe(x)
        if x.dim() == 5 and self.frames is not None:
            raise ValueError(f"frames: got {self.frames}, wanted None for {argument}, {shape}, which know their T")
        if x.dim() == 4 and self.frames is None:
            raise ValueError(
                f"frames: got None, wanted the frames of a clip for {argument}, {shape}: their batch holds frames "
                f"(layout 'TSN' with channels={x.shape[1]}, or 'BTHWC' with channels={x.shape[3]}), or they have lost "
                "their time, and another submodule is wanted"
            )
        if x.dim() != 3 and (self.grid is not None or self.class_tokens):
            name, value = ("grid", self.grid) if self.grid is not None else ("class_tokens", self.class_tokens)
            raise ValueError(f"{name}: got {value}, wanted none for {argument}, {shape}: it is for tokens (B, N, C)")
        if x.dim() == 3 and self.grid is None:
            likely = _grids(x.shape[1], clip, self.frames)
            hint = f", such as {' or '.join(likely)}" if likely else ""
            named = "(T, H, W)" if self.frames is None else "(H, W)"
            raise ValueError(f"grid: got None, wanted {named} of the tokens for {argument}, {shape}{hint}")


def _no_larger(layout: FeatureLayout, x: Tensor, clip: tuple[int, ...] | None) -> bool:
    """Whether ``T, H, W`` of ``x`` are those of a clip with strides, the same along height and width."""
    if clip is None or len(clip) not in (4, 5) or layout.name == "BNC":
        return True
    sizes = tuple(x.shape[2:] if layout.channel_dim == 1 else x.shape[1:-1])
    (height, width), (most_h, most_w) = sizes[-2:], clip[-2:]
    if layout.frames is None and len(clip) == 5 and sizes[0] > max(clip[1:3]):  # (B, C, T, H, W) or (B, T, C, H, W)
        return False
    return height <= most_h and width <= most_w and abs(width - most_w * height / most_h) <= 1


def _grids(tokens: int, clip: tuple[int, ...] | None, frames: int | None) -> list[str]:
    """Grids that so many tokens of such a clip may have, with one class token or none, as arguments to give."""
    if clip is None or len(clip) not in (4, 5):
        return []
    longest = max(clip[1:3]) if frames is None and len(clip) == 5 else 1
    found = []
    for t in (t for t in range(longest, 0, -1) if longest % t == 0):
        for h in (h for h in range(clip[-2], 0, -1) if clip[-2] % h == 0 and clip[-1] * h % clip[-2] == 0):
            grid = (h, clip[-1] * h // clip[-2]) if frames is not None else (t, h, clip[-1] * h // clip[-2])
            class_tokens = tokens - math.prod(grid)
            if class_tokens in (0, 1):
                found.append(f"grid={grid}" + (", class_tokens=1" if class_tokens else ""))
    return found[:4]
