"""Launcher of ``csrc/cuda/route.cu``: a frozen layer's choice of neurons, panel and plan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import FrozenWeights
from ..gpu.lists import PLAN, panel_width
from . import launch
from .gather_panel import gather_arguments
from .launch import address, check_count


def route_and_gather(
    x: Tensor, sums: Tensor, w: FrozenWeights, divisor: int, neuron: Tensor, scores: Tensor, arrival_counters: Tensor
) -> tuple[Tensor, Tensor]:
    check_count(scores.shape[1])
    panel = x.new_empty(x.shape[0], *x.shape[2:], panel_width(x.shape[1], x.dtype, False))
    plan = torch.empty((x.shape[0], PLAN), dtype=torch.int32, device=x.device)
    launch.native().route_and_gather(
        **gather_arguments(x, panel),
        sums=address(sums),  # [B, parts, C, taps]
        scoring=address(w.scoring),  # [N, C, taps]
        channels_of=address(w.channels),  # [N, C]
        starts=address(w.starts),  # [N + 1]
        plan=address(plan),  # [B] plans
        neuron=address(neuron),  # [B]
        scores=address(scores),  # [B, N]
        arrival_counters=address(arrival_counters),
        divisor=divisor,
        neurons=scores.shape[1],
        parts=sums.shape[1],
        taps=w.scoring.shape[2],
        num_arrival_counters=arrival_counters.numel(),
    )
    return panel, plan
