"""A stand-in for CUDA graphs on a CPU: what ``torch.cuda.make_graphed_callables`` does to memory, without a GPU.

A replay runs the captured function again. As in a graph, inputs, outputs and gradients lie in memory that every replay
writes, activations of one pass are kept, and what Python decided at the capture is not asked again: a function that
would now take another way gives an error. Forward and backward graph share memory: what the one had given back at its
capture is the other's, so a forward replay writes over gradients, and a backward replay over activations.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsts_kernels import Draws, FusedDSTS, graphed
from dsts_kernels.routing import sample_draws

from .modules import enliven

SIZE = (4, 6, 2, 3, 3)


def module(**options: object) -> FusedDSTS:
    dsts = FusedDSTS(6, dtype=torch.float64, **dict(num_layers=2, num_neurons=3) | options)
    enliven(dsts)
    return dsts


def features(**options: object) -> Tensor:
    return torch.randn(SIZE, dtype=torch.float64, **options)


def draws() -> Draws:
    return sample_draws(4, 6, 3, 2, dtype=torch.float64)


class Static:
    """Memory of one capture."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.trained = [t for t in inputs if t.requires_grad]
        self.with_grad = torch.is_grad_enabled()
        self.addresses = [t.data_ptr() for t in inputs]
        for _ in range(3):  # the warm-up
            self.run()
            self.gradients = self.differentiate([torch.zeros_like(t) for t in self.live])
        self.outputs = [t.detach().clone() for t in self.live]
        self.gradients = [None if g is None else g.clone() for g in self.gradients]
        self.spent = False  # activations, by a backward replay

    def run(self) -> None:
        with torch.set_grad_enabled(self.with_grad):
            self.live = self.function(*self.inputs)

    def differentiate(self, gradients: list[Tensor]) -> list[Tensor | None]:
        pairs = [(t, g) for t, g in zip(self.live, gradients, strict=True) if t.requires_grad]
        if not pairs:
            return [None] * len(self.trained)
        live, given = zip(*pairs, strict=True)
        return list(torch.autograd.grad(live, self.trained, given, retain_graph=True, allow_unused=True))


def make_graphed_callables(
    function: Callable[..., tuple[Tensor, ...]], sample_args: tuple[Tensor, ...], *, allow_unused_input: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """As torch's, of one function that returns a tuple of tensors."""
    assert allow_unused_input and all(isinstance(t, Tensor) for t in sample_args)
    assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    static = Static(function, sample_args)

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            assert [t.data_ptr() for t in static.inputs] == static.addresses
            for mine, theirs in zip(static.inputs, inputs, strict=True):
                if mine.data_ptr() != theirs.data_ptr():
                    mine.copy_(theirs)
            static.run()
            static.spent = False
            for gradient in static.gradients:
                if gradient is not None:
                    gradient.fill_(float("nan"))
            for mine, theirs in zip(static.outputs, static.live, strict=True):
                mine.copy_(theirs.detach())
            return tuple(t.detach() for t in static.outputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *gradients):
            for mine, theirs in zip(static.outputs, static.live, strict=True):
                theirs.data.copy_(mine)  # in a graph they are one: autograd may have kept what a user changes
            found = static.differentiate(list(gradients))
            for mine, theirs in zip(static.gradients, found, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    mine.copy_(theirs).mul_(float("nan") if static.spent else 1)
            static.spent = True
            mine = iter(static.gradients)
            wanted = [next(mine) if t.requires_grad else None for t in static.inputs]
            return tuple(None if g is None else g.detach() for g in wanted)

    return Replayed.apply


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of CPU modules from now on, on any backend."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(graphed, "no_graphs", lambda device: None)
    monkeypatch.setattr(graphed, "waits", lambda backend: None)
