"""What says who chose which neuron and which channels each gate lists: integers, worked out and kept on the device.

A *list* is one order of the channels, ``order[row]``: those that only the spatial operator reads, those that both
read, those that only the temporal one reads. The spatial operator reads a prefix of it, the temporal one a
suffix. A :class:`Plan` says how long they are. A *slot* numbers the neurons that a batch chose, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import tile_channels


class Plan(NamedTuple):
    """What a product needs to know of one list, six int32 in the order in which kernels read them."""

    filters: int  # first K block of its packed filters, or their slot; -1 for a neuron out of range
    spatial_blocks: int  # K blocks of the spatial operator's list
    temporal_blocks: int
    spatial_channels: int  # listed for the spatial operator
    temporal_start: int  # where in the list the temporal operator's part starts
    row: int  # of its list, and of its bias


PLAN = len(Plan._fields)  # int32 of a plan in memory
READ_BY_SPATIAL, READ_BY_TEMPORAL = 1, 2  # in Lists.listed


class Groups(NamedTuple):
    """Samples by neuron, of ``S = min(B, N)`` slots."""

    slots: Tensor  # (B,) int32, of each sample's neuron, -1 where that is out of range
    neuron_of: Tensor  # (S,) int32, -1 where no neuron has the slot
    slot_of: Tensor  # (N,) int32, -1 where nobody chose the neuron
    groups: Tensor  # (S, 2) int32, first member of a slot, how many; only of slots that a neuron has
    members: Tensor  # (B,) int32, samples sorted by neuron


class Lists(NamedTuple):
    """Channel lists by row."""

    order: Tensor  # (rows, C) int32
    plans: Tensor  # (rows, PLAN) int32
    listed: Tensor | None  # (rows, C) int8, where rows are slots: READ_BY_SPATIAL, READ_BY_TEMPORAL or their sum


def panel_width(channels: int, dtype: torch.dtype, scaled: bool) -> int:
    """Columns a panel may need: both lists in whole K blocks, which overlap only where gates are soft."""
    block_k = tile_channels(dtype)
    blocks = -(-channels // block_k)
    return (2 * blocks if scaled else blocks + 1) * block_k
