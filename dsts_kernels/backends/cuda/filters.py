"""Launchers of ``csrc/cuda/filters.cu``: filters by slot and tap, and their gradients back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu.lists import Groups
from . import launch
from .launch import address, round_up


def pack_filters(
    weights: list[Tensor],
    neuron_of: Tensor,
    dtype: torch.dtype,
    by_channel: bool,
    read: tuple[Tensor, Groups] | None = None,  # every channel is written, whoever reads it
) -> Tensor:
    outputs, channels = weights[0].shape[1:3]
    taps = [weight[0, 0, 0].numel() for weight in weights]
    pitch = round_up(outputs if by_channel else channels, dtype)
    slots = neuron_of.shape[0]
    shape = (slots * sum(taps), channels if by_channel else outputs, pitch)
    filters = torch.empty(shape, dtype=dtype, device=neuron_of.device)
    first = 0
    for weight, count in zip(weights, taps, strict=True):
        weight = (weight if weight.dtype in (dtype, torch.float32) else weight.to(dtype)).contiguous()
        launch.native().pack_filters(
            weight=address(weight),  # [N, O, C, taps]
            filters=address(filters),  # [S * all_taps, O or C, pitch]
            neuron_of=address(neuron_of),  # [S]
            outputs=outputs,
            channels=channels,
            taps=count,
            first_tap=first,
            all_taps=sum(taps),
            by_channel=by_channel,
            pitch=pitch,
            slots=slots,
            weight_dtype=DTYPE_CODES[weight.dtype],
            dtype=DTYPE_CODES[dtype],
            target=launch.target(weight),
        )
        first += count
    return filters


def unpack_filters(
    filters: Tensor,
    like: Tensor,
    groups: Groups,
    listed: Tensor | None,
    reader: int,
    first_tap: int,
    all_taps: int,
    by_channel: bool,
) -> Tensor:
    neurons, outputs, channels = like.shape[:3]
    weight = torch.empty(like.shape, dtype=filters.dtype, device=like.device)
    launch.native().unpack_filters(
        filters=address(filters),  # [S * all_taps, O or C, pitch]
        weight=address(weight),  # [N, O, C, taps]
        slot_of=address(groups.slot_of),  # [N]
        listed=address(listed),  # [S, C]
        reader=reader,
        outputs=outputs,
        channels=channels,
        taps=like[0, 0, 0].numel(),
        first_tap=first_tap,
        all_taps=all_taps,
        by_channel=by_channel,
        pitch=filters.shape[-1],
        neurons=neurons,
        dtype=DTYPE_CODES[filters.dtype],
        target=launch.target(weight),
    )
    return weight.to(like.dtype)
