"""Launcher of ``csrc/cuda/data_gradient.cu``: gradients of features and gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu import grids
from ..gpu.lists import Lists
from . import launch
from .launch import address, padded, uses_tf32


def data_gradient(
    grad_ndhwc: Tensor,
    x: Tensor,
    gate: Tensor,
    lists: Lists,
    filters: Tensor,
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    b, c, *size = x.shape
    outputs, factors = grad_ndhwc.shape[-1], gate.float()
    filters, grad_ndhwc = padded(filters), padded(grad_ndhwc)
    dx = torch.empty_like(x) if need_x else None
    if dx is not None and dx.stride() != x.stride() and need_gate:  # one set of strides serves both
        x = torch.empty_like(dx).copy_(x)
    tiles = grids.flat_tiles(math.prod(size), c).along
    dgate = x.new_empty((b, tiles, c), dtype=torch.float32) if need_gate else None
    launch.native().data_gradient(
        grad=address(grad_ndhwc),  # [B, T, H, W, pitch]
        filters=address(filters),  # [S * 12, C, pitch]
        order=address(lists.order),  # [B, C]
        plans=address(lists.plans),  # [B] plans
        gate=address(factors),  # [B, C]
        x=address(x),  # [B, C, T, H, W]
        dx=address(dx),  # [B, C, T, H, W]
        dgate=address(dgate),  # [B, tiles along positions, C]
        size=size,
        x_strides=(x if dx is None else dx).stride(),
        batch=b,
        channels=c,
        outputs=outputs,
        pitch=grad_ndhwc.shape[-1],
        listed=not need_gate,
        dtype=DTYPE_CODES[x.dtype],
        tf32=uses_tf32(x),
        target=launch.target(x),
    )
    return dx, None if dgate is None else dgate.sum(1).to(gate.dtype)
