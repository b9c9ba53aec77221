"""Launchers of ``csrc/cuda/lists.cu``: samples by neuron, and channel lists."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..gpu.lists import PLAN, Groups, Lists
from . import launch
from .launch import address, check_count


def group_samples(neuron: Tensor, neurons: int) -> Groups:
    check_count(neurons)
    batch = neuron.shape[0]
    count = min(batch, neurons)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=neuron.device)
    groups = Groups(empty(batch), empty(count), empty(neurons), empty(count, 2), empty(batch))
    launch.native().group_samples(
        neuron=address(neuron),  # [B]
        slots=address(groups.slots),  # [B]
        neuron_of=address(groups.neuron_of),  # [S]
        slot_of=address(groups.slot_of),  # [N]
        groups=address(groups.groups),  # [S, 2]
        members=address(groups.members),  # [B]
        batch=batch,
        neurons=neurons,
        num_slots=count,
        target=launch.target(neuron),
    )
    return groups


def list_channels(gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
    channels = gate.shape[1]
    count = groups.neuron_of.shape[0] if union else gate.shape[0]
    gate = gate.float()
    order = torch.empty((count, channels), dtype=torch.int32, device=gate.device)
    plans = torch.empty((count, PLAN), dtype=torch.int32, device=gate.device)
    listed = torch.empty((count, channels) if union else (1,), dtype=torch.int8, device=gate.device)
    launch.native().list_channels(
        gate=address(gate),  # [B, C]
        slots=address(groups.slots),  # [B]
        neuron_of=address(groups.neuron_of),  # [S]
        groups=address(groups.groups),  # [S, 2]
        members=address(groups.members),  # [B]
        order=address(order),  # [B or S, C]
        plans=address(plans),  # [B or S] plans
        listed=address(listed),  # [S, C]
        num_lists=count,
        channels=channels,
        k_block=block_k,
        by_slot=union,
        target=launch.target(gate),
    )
    return Lists(order, plans, listed)
