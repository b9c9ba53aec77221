"""How a frozen module's filters lie in memory: ready for the kernels that read them.

A filter is a panel ``(O, taps, c)`` over its listed channels. Packings:
  plain    as it is, for library convolutions
  blocked  ``(ceil(O/16), c, taps, 16)``: one channel's taps for 16 outputs are neighbours, so fast convolution on a CPU
           transforms them without a transposition; the library's convolution where that is cheaper
  winograd the same, for fast convolution alone
  tiled    ``(ceil(c/K), taps, O, K)`` with K channels of 128 bytes: each K block of a tap is one dense tile of a
           matrix product on a GPU

Outputs and channels are padded with zeros to whole blocks. A layer's filters lie behind one another in one flat tensor,
each neuron's spatial panel followed by its temporal one.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PACKINGS = ("plain", "blocked", "tiled", "winograd")
BLOCKED = ("blocked", "winograd")
BLOCK = 16  # outputs of a block
TILE_BYTES = 128  # of a row of a tile


def tile_channels(dtype: torch.dtype) -> int:
    """Channels of a K block."""
    return TILE_BYTES // dtype.itemsize


def packed_size(packing: str, outputs: int, taps: int, channels: int, dtype: torch.dtype) -> int:
    """Elements of a packed filter."""
    if packing in BLOCKED:
        outputs = -(-outputs // BLOCK) * BLOCK
    elif packing == "tiled":
        channels = -(-channels // tile_channels(dtype)) * tile_channels(dtype)
    return outputs * taps * channels


def pack(panel: Tensor, packing: str) -> Tensor:
    """A filter ``(O, taps, c)`` packed, flat."""
    outputs, taps, channels = panel.shape
    if channels == 0:  # F.pad refuses a tensor without elements before torch 2.10
        return panel.reshape(-1)
    if packing in BLOCKED:
        padded = F.pad(panel, (0, 0, 0, 0, 0, -outputs % BLOCK))
        return padded.view(-(-outputs // BLOCK), BLOCK, taps, channels).permute(0, 3, 2, 1).reshape(-1)
    if packing == "tiled":
        k = tile_channels(panel.dtype)
        padded = F.pad(panel, (0, -channels % k))
        return padded.view(outputs, taps, -(-channels // k), k).permute(2, 1, 0, 3).reshape(-1)
    return panel.reshape(-1)


def unpack(flat: Tensor, packing: str, outputs: int, taps: int, channels: int) -> Tensor:
    """The filter ``(O, taps, c)`` of a flat packed one."""
    if packing in BLOCKED:
        count = -(-outputs // BLOCK)
        blocks = flat.view(count, channels, taps, BLOCK).permute(0, 3, 2, 1)
        return blocks.reshape(count * BLOCK, taps, channels)[:outputs]
    if packing == "tiled":
        k = tile_channels(flat.dtype)
        tiles = flat.view(-(-channels // k), taps, outputs, k).permute(2, 1, 0, 3)
        return tiles.reshape(outputs, taps, -(-channels // k) * k)[:, :, :channels]
    return flat.view(outputs, taps, channels)


def pack_mixing(panel: Tensor, packing: str) -> Tensor:
    """A mixing kernel ``(O, taps, O)`` packed: tiled as ``(taps, O, O)``, which needs no padding, else as a filter."""
    return panel.transpose(0, 1).contiguous() if packing == "tiled" else pack(panel, packing)


def unpack_mixing(packed: Tensor, packing: str, outputs: int, taps: int) -> Tensor:
    """The mixing kernel ``(O, taps, O)`` of a packed one."""
    if packing == "tiled":
        return packed.transpose(0, 1)
    return unpack(packed.flatten(), packing, outputs, taps, outputs)


def mixing_shape(packing: str, outputs: int, taps: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of a packed mixing kernel."""
    return (taps, outputs, outputs) if packing == "tiled" else (packed_size(packing, outputs, taps, outputs, dtype),)


def channel_lists(hard: Tensor) -> tuple[Tensor, Tensor]:
    """``channels (N, C)`` int32 and ``starts (N + 1,)`` int64 of hard gates ``(N, C)`` bool; dense, however they lie.

    A stable sort of "not spatial" lists the spatial channels first, each part in order. ``starts`` sums up how many
    are spatial.
    """
    channels = (~hard).to(torch.int8).sort(dim=1, stable=True).indices.to(torch.int32)
    return channels.contiguous(), F.pad(hard.sum(1).cumsum(0), (1, 0)).contiguous()


class Place(NamedTuple):
    """Where one filter lies in a layer's flat tensor: its first element, how many channels it has."""

    start: int
    channels: int


def places(
    starts: list[int], channels: int, outputs: int, packing: str, dtype: torch.dtype
) -> list[tuple[Place, Place]]:
    """Every neuron's spatial and temporal filter; neuron ``n`` has ``starts[n + 1] - starts[n]`` spatial channels."""
    pairs, at = [], 0
    for begin, end in itertools.pairwise(starts):
        pair = []
        for count, taps in ((end - begin, 9), (channels - (end - begin), 3)):
            pair.append(Place(at, count))
            at += packed_size(packing, outputs, taps, count, dtype)
        pairs.append(tuple(pair))
    return pairs


def unpack_at(filters: Tensor, place: Place, packing: str, outputs: int, taps: int) -> Tensor:
    """The filter ``(O, taps, c)`` that lies at ``place``."""
    size = packed_size(packing, outputs, taps, place.channels, filters.dtype)
    return unpack(filters[place.start : place.start + size], packing, outputs, taps, place.channels)


def filters_size(starts: list[int], channels: int, outputs: int, packing: str, dtype: torch.dtype) -> int:
    """Elements of a layer's flat tensor."""
    last = places(starts, channels, outputs, packing, dtype)[-1][1]
    return last.start + packed_size(packing, outputs, 3, last.channels, dtype)


class Layout(NamedTuple):
    """What a packing depends on: its name, and the dtype, by which a tile has so many channels."""

    packing: str
    dtype: torch.dtype


def repack_filters(filters: Tensor, starts: list[int], channels: int, outputs: int, old: Layout, new: Layout) -> Tensor:
    """A layer's flat tensor laid out anew, every value rounded once where the dtype changes."""
    panels = [
        unpack_at(filters, place, old.packing, outputs, taps).to(new.dtype)
        for pair in places(starts, channels, outputs, *old)
        for place, taps in zip(pair, (9, 3), strict=True)
    ]
    return torch.cat([pack(panel, new.packing) for panel in panels])


def repack_mixing(mixing: Tensor, outputs: int, taps: int, old: Layout, new: Layout) -> Tensor:
    """A layer's mixing kernels ``(N, ...)`` laid out anew."""
    panels = [unpack_mixing(kernel, old.packing, outputs, taps).to(new.dtype) for kernel in mixing]
    return torch.stack([pack_mixing(panel, new.packing) for panel in panels])
