"""A snapshot of everything that a training step changes, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import generator_states, restore_generators
from .sharded import local

__all__ = ["Frozen", "Generators", "OptimizerState", "Tensors"]


class Tensors:
    """Copies of tensors, of sharded ones this process's part, in memory that is kept from one step to the next."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.copies: list[Tensor] = []

    def save(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        found = [local(t.detach()) for t in self.tensors]
        shapes = [(t.shape, t.dtype, t.device) for t in found]
        if shapes != [(c.shape, c.dtype, c.device) for c in self.copies]:
            self.copies = [torch.empty_like(t) for t in found]
        if found:
            torch._foreach_copy_(self.copies, found)

    def restore(self) -> None:
        """What was saved, whatever came since."""
        if self.tensors:  # fully_shard may have given a parameter other memory
            torch._foreach_copy_([local(t.detach()) for t in self.tensors], self.copies)


class OptimizerState:
    """A copy of what an optimizer keeps: the state of every parameter, and its groups' settings."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: copied(own) for p, own in optimizer.state.items()}
        self.groups = [copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Any number of times. Tensors stay the objects that they are: a learning rate, what a graph captured."""
        state = self.optimizer.state
        for p in [p for p in state if p not in self.state]:
            del state[p]
        for p, own in self.state.items():
            put_back(state.setdefault(p, {}), own)
        for group, saved in zip(self.optimizer.param_groups, self.groups, strict=True):
            put_back(group, saved)


def put_back(target: dict, saved: dict) -> None:
    """The saved entries into ``target``, tensors in place where they fit."""
    for key, value in saved.items():
        now = target.get(key)
        fits = (
            isinstance(now, Tensor)
            and isinstance(value, Tensor)
            and (now.shape, now.dtype) == (value.shape, value.dtype)
        )
        if fits:
            local(now).copy_(local(value))
        else:
            target[key] = copied(value)


def copied(value: Any) -> Any:
    """``value`` with its tensors and containers anew."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


class Frozen:
    """A block in which these parameters get no gradient; their flags are put back afterwards."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def __enter__(self) -> None:
        self.flags = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for p, flag in zip(self.parameters, self.flags, strict=True):
            p.requires_grad_(flag)


class Generators:
    """Where the streams of randomness of the CPU and of a device stood."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.states = device, generator_states(device)

    def restore(self) -> None:
        restore_generators(self.states, self.device)
