"""Launcher of ``csrc/cuda/gather_panel.cu``: a training step's panel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu import features, grids, switches
from ..gpu.grids import cdiv
from ..gpu.lists import Lists
from ..packing import tile_channels
from . import launch
from .launch import address, vectors_fit


class GatherWay(NamedTuple):
    """How a gather goes over its features."""

    whole: int  # positions whose channels a CTA takes whole, 16 bytes at a time; else 0
    turned: bool  # positions lie side by side, and are taken 16 bytes at a time
    strides: tuple[int, ...]  # of the features; the last one leads from position to position where they are so taken


def gather_way(x: Tensor) -> GatherWay:
    """For ``x (B, C, T, H, W)``; neither whole nor turned where it goes by elements."""
    strides, flat = features.kernel_strides(x)
    fits = flat and vectors_fit(x)
    whole = grids.whole_positions(x.shape[1] * x.element_size()) if fits and x.stride(1) == 1 else 0
    turned = fits and x.stride(1) != 1 and switches.current().turned_gather
    return GatherWay(whole, turned, strides if whole or turned else x.stride())


def gather_arguments(x: Tensor, panel: Tensor) -> dict[str, Any]:
    """What both gathers are told of features and panel."""
    b, c, *size = x.shape
    way = gather_way(x)
    blocks, processors = cdiv(c, tile_channels(x.dtype)), launch.chip(x.device).processors
    return {
        "x": address(x),  # [B, C, T, H, W]
        "panel": address(panel),  # [B, T, H, W, pitch]
        "size": size,
        "x_strides": way.strides,
        "batch": b,
        "channels": c,
        "pitch": panel.shape[-1],
        "splits": grids.gather_grid(b, math.prod(size), blocks, processors, way.whole).splits,
        "whole_positions": way.whole,
        "turned": way.turned,
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
