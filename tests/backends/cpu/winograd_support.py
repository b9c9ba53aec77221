"""What tests of fast convolution share: shapes, layouts, the formula in float64, gates and their operators."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels.backends.convolution import SPATIAL, TEMPORAL
from dsts_kernels.backends.winograd import SPATIAL_TILES, TEMPORAL_TILES, Operator

from . import support  # noqa: F401  skips where there are no native kernels

SHAPES = [
    (2, 33, 47, (3, 5, 7)),
    (1, 16, 16, (1, 1, 1)),
    (3, 70, 20, (4, 14, 2)),
    (1, 5, 130, (16, 7, 9)),
    (2, 20, 24, (2, 2, 28)),
    (1, 40, 33, (8, 17, 1)),
    (1, 3, 1, (9, 1, 18)),
    (1, 150, 70, (8, 16, 16)),  # two slices of channels, two tasks of outputs
]
LAYOUTS = ("contiguous", "channels_last", "strided")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_tile = pytest.mark.parametrize(
    "tiles", [t for t in itertools.product(TEMPORAL_TILES, SPATIAL_TILES, SPATIAL_TILES) if 1 not in t], ids=str
)


def laid(x, layout):
    """The same features in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "strided":
        b, c, t, h, w = x.shape
        return x.new_full((b, c + 1, t, w + 2, h * 2), torch.nan)[:, 1:, :, 1:-1, ::2].transpose(3, 4).copy_(x)
    return x.contiguous()


def formula(x, gate, spatial, temporal):
    """The row "specialise" of section 1, one neuron, in float64."""
    x, g = x.double(), gate.double()[:, :, None, None, None]
    kept, rest = torch.where(g == 0, 0, g * x), torch.where(g == 1, 0, (1 - g) * x)
    return F.conv3d(kept, spatial.double(), padding=(0, 1, 1)) + F.conv3d(rest, temporal.double(), padding=(1, 0, 0))


def weights(outputs, channels, dtype=torch.float32):
    spatial = torch.randn(outputs, channels, 1, 3, 3) / (9 * channels) ** 0.5
    temporal = torch.randn(outputs, channels, 3, 1, 1) / (3 * channels) ** 0.5
    return spatial.to(dtype), temporal.to(dtype)


def half_gate(x, share=0.5):
    """One gate for all samples, some of it open: at least a channel on each side where there are two."""
    gate = (torch.rand(x.shape[1]) < share).to(x.dtype)
    gate[0] = 1
    gate[-1:] = 0 if len(gate) > 1 else 1
    return gate.expand(x.shape[0], -1).contiguous()


def lists_of(gate: Tensor) -> list[Tensor | None]:
    """Channels of either operator where gates are hard, else ``None``: all channels, scaled."""
    if not bool(((gate == 0) | (gate == 1)).all()):
        return [None, None]
    return [listed.nonzero()[:, 0].int() for listed in (gate[0] == 1, gate[0] == 0)]


def operators_of(gate: Tensor, filters: Sequence[Tensor]) -> list[Operator | None]:
    """Both operators on live weights: hard gates as lists of channels, soft gates as scales."""
    lists = lists_of(gate)
    return [
        None
        if listed is not None and not listed.numel()
        else Operator.forward(weight, listed, gate if listed is None else None, kernel)
        for weight, listed, kernel in zip(filters, lists, (SPATIAL, TEMPORAL), strict=True)
    ]
