"""Launcher of ``csrc/cuda/weight_gradient.cu``: gradients of filters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu.lists import Groups, Lists
from . import launch
from .launch import address, padded, uses_tf32


def weight_gradient(
    left: Tensor,
    right: Tensor,
    lists: Lists | None,
    groups: Groups,
    k_channels: int,
    kernel: tuple[int, int, int],
    with_temporal: bool,
    sign: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    size, columns, by_neuron = left.shape[1:4], right.shape[-1], out is not None
    result_dtype = dtype if dtype in (left.dtype, torch.float32) else torch.float32
    if by_neuron and out.dtype != result_dtype:
        raise TypeError(f"out: got {out.dtype}, wanted {left.dtype} or torch.float32")
    gradient = torch.empty(shape, dtype=result_dtype, device=left.device) if out is None else out
    left, right = padded(left), padded(right)
    launch.native().weight_gradient(
        left=address(left),  # [B, T, H, W, left_pitch]
        right=address(right),  # [B, T, H, W, right_pitch]
        order=0 if lists is None else address(lists.order),  # [S, k_channels]
        plans=0 if lists is None else address(lists.plans),  # [S] plans
        neuron_of=address(groups.neuron_of),  # [S]
        groups=address(groups.groups),  # [S, 2]
        members=address(groups.members),  # [B]
        out=address(gradient),  # [S or N, taps, k_channels, columns]
        size=tuple(size),
        left_pitch=left.shape[-1],
        right_pitch=right.shape[-1],
        rows=k_channels,
        columns=columns,
        slots=groups.neuron_of.shape[0],
        kernel=kernel,
        with_temporal=with_temporal,
        sign=sign,
        by_neuron=by_neuron,
        out_float=result_dtype == torch.float32,
        dtype=DTYPE_CODES[left.dtype],
        tf32=uses_tf32(left),
        target=launch.target(left),
    )
    return gradient
