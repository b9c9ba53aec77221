"""What says who chose which neuron and which channels each gate lists: integers, worked out and kept on the device.

A *list row* is one order of the channels, ``order[row]``: those that only the first operator reads, those that both
read, those that only the second reads. The first operator's list is a prefix of it, the second one's a suffix. A
*plan* (:data:`PLAN`) says how long they are. A *slot* numbers the neurons that a batch chose, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import tile_channels

# Ints a sample in a plan: first K block or slot of its filters, K blocks of either operator, listed channels of the
# first, where the second one's list starts, row of its list and bias.
PLAN = 6


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
    listed: Tensor  # (rows, C) int8, where the rows are slots: 1 where the first operator reads it, plus 2 the second


def panel_width(channels: int, dtype: torch.dtype, scaled: bool) -> int:
    """Columns a panel may need: both lists in whole K blocks, which overlap only where gates are soft."""
    block_k = tile_channels(dtype)
    blocks = -(-channels // block_k)
    return (2 * blocks if scaled else blocks + 1) * block_k
