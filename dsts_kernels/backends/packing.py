"""How a frozen module's filters lie in memory: in blocks of outputs, ready to be transformed without a transposition.

A filter ``(O, taps, c)`` is packed as ``(ceil(O/16), c, taps, 16)``, the last block padded with zeros, so that one
channel's taps for 16 outputs are neighbours. What is packed serves fast convolution; a backend without it unpacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16


def packed_size(outputs: int, taps: int) -> int:
    """Elements a channel of a packed filter takes."""
    return -(-outputs // BLOCK) * BLOCK * taps


def pack(panel: Tensor) -> Tensor:
    """``(O, taps, c)`` packed, flat."""
    outputs, taps, channels = panel.shape
    padded = torch.nn.functional.pad(panel, (0, 0, 0, 0, 0, -outputs % BLOCK))
    return padded.view(-(-outputs // BLOCK), BLOCK, taps, channels).permute(0, 3, 2, 1).reshape(-1)


def unpack(flat: Tensor, outputs: int, taps: int, channels: int) -> Tensor:
    """The panel ``(O, taps, c)`` of a packed filter."""
    count = -(-outputs // BLOCK)
    blocks = flat.view(count, channels, taps, BLOCK).permute(0, 3, 2, 1)
    return blocks.reshape(count * BLOCK, taps, channels)[:outputs]
