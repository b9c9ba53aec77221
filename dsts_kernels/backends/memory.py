"""Zeros whose pages cost neither time nor memory until they are written: what stacked gradients are made of.

The gradient of a stack of neurons is zero but for the chosen ones, and writing those zeros out would cost more
than the gradient itself. ``numpy`` takes its zeros from ``calloc`` on huge pages, which torch's own ``zeros`` and
``empty`` do not: they write 4 KiB at a time, or fault it in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LAZY_ZEROS_BYTES = 1 << 20


def lazy_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of any floating dtype; lazy on a CPU and from :data:`LAZY_ZEROS_BYTES` on."""
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < LAZY_ZEROS_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
