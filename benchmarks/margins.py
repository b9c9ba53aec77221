"""Inputs on which rounding cannot change a route: what a comparison between precisions needs of its data.

Two implementations of one module that round differently choose different neurons where two scores are nearly tied,
and from there on compute different things, both rightly. Where the draws are ours to choose the chosen neuron gets a
little more; in evaluation the features of a nearly tied sample are rolled along their channels, which changes what
the router sees and nothing else about them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ATTEMPTS", "MARGIN", "margins", "rolled", "separate_draws", "separate_features"]

MARGIN = 0.02
ATTEMPTS = 12


def margins(noisy: Tensor) -> Tensor:
    """How far the best of ``(..., N)`` scores is ahead, in their root mean square: ``(...)``, ``inf`` for one."""
    if noisy.shape[-1] == 1:
        return torch.full(noisy.shape[:-1], float("inf"), device=noisy.device)
    best, second = noisy.topk(2, dim=-1).values.unbind(-1)
    return (best - second) / noisy.square().mean(-1).sqrt().clamp_min(1e-30)


def rolled(x: Tensor, dim: int) -> Tensor:
    """``x`` with its places along ``dim`` moved on by 7, or by 1 where that would come round too soon."""
    return x.roll(7 if x.shape[dim] % 7 else 1, dims=dim)


def separate_draws(run: Callable[[NamedTuple], NamedTuple], draws: NamedTuple, margin: float = MARGIN) -> NamedTuple:
    """``draws`` with Gumbel noise that leaves no two scores nearly tied.

    Args:
        run: draws to the routing of the reference, with ``scores (L, B, N)``.
        draws: ``noise``, ``hard`` and ``gumbel (L, B, N)``.

    Raises:
        RuntimeError: some scores stay nearly tied.
    """
    for _ in range(ATTEMPTS):
        scores = run(draws).scores
        noisy = scores + draws.gumbel.to(scores.dtype)
        narrow = margins(noisy) < margin
        if not narrow.any():
            return draws
        extra = torch.where(narrow, 4 * margin * noisy.square().mean(-1).sqrt(), 0.0)[..., None]
        gumbel = draws.gumbel.scatter_add(-1, noisy.argmax(-1, keepdim=True), extra.to(draws.gumbel))
        draws = draws._replace(gumbel=gumbel)
    raise RuntimeError(f"draws: scores within {margin} of each other after {ATTEMPTS} corrections")


def separate_features(run: Callable[[Tensor], NamedTuple], x: Tensor, margin: float = MARGIN) -> Tensor:
    """A copy of ``x (B, C, T, H, W)`` on which no layer of the reference has two scores nearly tied.

    Args:
        run: features to the routing of the reference in evaluation, with ``scores (L, B, N)``.

    Raises:
        RuntimeError: some scores stay nearly tied.
    """
    x = x.clone()
    samples = torch.arange(x.shape[0], device=x.device)
    for _ in range(ATTEMPTS):
        samples = samples[(margins(run(x[samples]).scores) < margin).any(0)]
        if not samples.numel():
            return x
        x[samples] = rolled(x[samples], 1)
    raise RuntimeError(f"x: scores within {margin} of each other after {ATTEMPTS} corrections")
