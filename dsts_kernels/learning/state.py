"""A snapshot of everything that a training step changes, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import generator_states, restore_generators

__all__ = ["Frozen", "Generators", "OptimizerState", "Tensors"]


class Tensors:
    """Copies of the tensors that ``find()`` gives, in memory that is kept from one step to the next."""

    def __init__(self, find: Callable[[], Iterable[Tensor]]) -> None:
        self.find = find
        self.copies: list[Tensor] = []

    def save(self) -> None:
        tensors = [t.detach() for t in self.find()]
        if [(t.shape, t.dtype, t.device) for t in tensors] != [(c.shape, c.dtype, c.device) for c in self.copies]:
            self.copies = [torch.empty_like(t) for t in tensors]
        if tensors:
            torch._foreach_copy_(self.copies, tensors)

    def restore(self) -> None:
        if self.copies:
            torch._foreach_copy_([t.detach() for t in self.find()], self.copies)


class OptimizerState:
    """A copy of what an optimizer keeps: the state of every parameter, and its groups' settings."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: copied(own) for p, own in optimizer.state.items()}
        self.groups = [copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]

    def restore(self) -> None:
        """Any number of times: the optimizer gets copies of the copy."""
        self.optimizer.state.clear()
        self.optimizer.state.update({p: copied(own) for p, own in self.state.items()})
        for group, saved in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(copied(saved))


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
