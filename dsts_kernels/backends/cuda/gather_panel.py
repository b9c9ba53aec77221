"""Launcher of ``csrc/cuda/gather_panel.cu``: a training step's panel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu import features, grids
from ..gpu.grids import cdiv
from ..gpu.lists import Lists
from ..packing import tile_channels
from . import launch
from .launch import address, vectors_fit


def gather_whole(x: Tensor) -> tuple[int, tuple[int, ...]]:
    """Positions whose channels a CTA of a gather takes whole, 16 bytes at a time, and strides whose last one leads from
    position to position; 0 and the strides of ``x`` where it goes by elements."""
    strides, flat = features.kernel_strides(x)
    fits = flat and x.stride(1) == 1 and vectors_fit(x)
    whole = grids.whole_positions(x.shape[1] * x.element_size()) if fits else 0
    return whole, strides if whole else x.stride()


def gather_arguments(x: Tensor, panel: Tensor) -> dict[str, Any]:
    """What both gathers are told of features and panel."""
    b, c, *size = x.shape
    whole, strides = gather_whole(x)
    blocks, processors = cdiv(c, tile_channels(x.dtype)), launch.chip(x.device).processors
    return {
        "x": address(x),  # [B, C, T, H, W]
        "panel": address(panel),  # [B, T, H, W, pitch]
        "size": size,
        "x_strides": strides,
        "batch": b,
        "channels": c,
        "pitch": panel.shape[-1],
        "splits": grids.gather_grid(b, math.prod(size), blocks, processors, whole).splits,
        "whole_positions": whole,
        "dtype": DTYPE_CODES[x.dtype],
        "target": launch.target(x),
    }


def gather_panel(
    x: Tensor, gate: Tensor, neuron: Tensor, neurons: int, slots: Tensor | None, lists: Lists, width: int
) -> Tensor:
    panel, gate = x.new_empty(x.shape[0], *x.shape[2:], width), gate.float()
    launch.native().gather_panel(
        **gather_arguments(x, panel),
        order=address(lists.order),  # [B or S, C]
        slots=address(slots),  # [B]
        plans=address(lists.plans),  # [B or S] plans
        gate=address(gate),  # [B, C]
        neuron=address(neuron),  # [B]
        neurons=neurons,
    )
    return panel
