"""Launcher of ``csrc/cuda/tap_sums.cu``: sums of every channel by tap."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu import grids
from . import launch
from .launch import address, vectors_fit


def partial_tap_sums(x: Tensor, taps: int) -> Tensor:
    b, c, t, h, w = x.shape
    cta_channels = grids.SUM_CHANNELS_LAST if x.stride(1) == 1 else grids.SUM_CHANNELS
    parts = grids.tap_sum_parts(b, t * h * w, c, cta_channels, launch.chip(x.device).processors)
    sums = x.new_empty((b, parts, c, taps), dtype=torch.float32)
    if sums.numel():
        launch.native().tap_sums(
            x=address(x),  # [B, C, T, H, W]
            sums=address(sums),  # [B, parts, C, taps]
            size=(t, h, w),
            x_strides=x.stride(),
            batch=b,
            channels=c,
            parts=parts,
            taps=taps,
            vector=taps == 1 and vectors_fit(x),
            dtype=DTYPE_CODES[x.dtype],
            target=launch.target(x),
        )
    return sums
