"""Copies of features, counted twice: by what the dispatcher sees, and by the profiler, which looks into ops of ours."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dsts_kernels.backbones.insertion import DSTSHook

COPYING = ("clone", "contiguous", "copy_", "_to_copy", "cat", "slice_scatter")


class Copies(TorchDispatchMode):
    """Counts copies of so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.counted = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COPYING and isinstance(out, torch.Tensor) and out.numel() == self.elements:
            self.counted.append(name)
        return out


def copies(submodule: nn.Module, features: torch.Tensor, *, backward: bool) -> list[str]:
    """Copies of features on the way from ``submodule`` through DSTS, and on the way back of a gradient laid alike."""
    hook = next(hook for hook in submodule._forward_hooks.values() if isinstance(hook, DSTSHook))
    leaf = features.detach().requires_grad_(backward)
    grad = torch.randn_like(features)

    def step() -> None:
        y = hook(submodule, (), leaf)
        if backward:
            y.backward(grad)

    with torch.set_grad_enabled(backward):
        with Copies(leaf.numel()) as mode:
            step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            step()
    found = [
        event.key.removeprefix("aten::")
        for event in profiler.key_averages(group_by_input_shape=True)
        if event.input_shapes and event.input_shapes[0] and math.prod(event.input_shapes[0]) == leaf.numel()
    ]
    return mode.counted + [name for name in found if name in COPYING]
