"""Randomness in, routing out: the two records that pass between a DSTS module and its user."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends.base import accumulate_dtype
from .ops import _checks

__all__ = ["Draws", "Routing", "check_draws", "sample_draws"]


class Draws(NamedTuple):
    """The randomness of one training step, used as given.

    Attributes:
        noise: ``(L, B, C)`` floating, added to the gate logits (already scaled).
        hard: ``(L, B)`` bool, the samples whose gates are hard.
        gumbel: ``(L, B, N)`` floating, added to the scores (already scaled).

    A single :class:`~dsts_kernels.DSTSLayer` takes them without the leading ``L``.
    """

    noise: Tensor
    hard: Tensor
    gumbel: Tensor


class Routing(NamedTuple):
    """What each layer chose for each sample.

    Attributes:
        neuron: ``(L, B)`` int64.
        scores: ``(L, B, N)`` float32 (float64 in a float64 module), before Gumbel noise: what the choice goes by, so
            less the centre where ``score_center`` subtracts one.
        gate: ``(L, B, C)``, the share of each channel that goes to the spatial operator.

    In training ``scores`` and ``gate`` carry gradients: ``detach()`` what is kept. A single
    :class:`~dsts_kernels.DSTSLayer` returns them without the leading ``L``.
    """

    neuron: Tensor
    scores: Tensor
    gate: Tensor


def sample_draws(
    batch: int,
    channels: int,
    num_neurons: int,
    num_layers: int,
    *,
    noise_std: float | Tensor = 1.0,
    hard_fraction: float = 0.5,
    gumbel_scale: float | Tensor = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Draws:
    """Fresh draws from torch's generator, without a host synchronisation.

    ``hard`` is an exact share of the batch: ``hard_fraction * B`` samples, what is left over by a coin. ``noise_std``
    and ``gumbel_scale`` multiply standard draws; they may be tensors on the device, which a CUDA graph reads anew.
    """
    dtype = accumulate_dtype(dtype)
    noise = torch.randn(num_layers, batch, channels, device=device, dtype=dtype) * noise_std
    coin = torch.rand(num_layers, 1, device=device)
    rank = torch.rand(num_layers, batch, device=device).argsort(dim=1).argsort(dim=1)
    hard = rank < torch.floor(hard_fraction * batch + coin)
    exponential = torch.empty(num_layers, batch, num_neurons, device=device, dtype=dtype).exponential_()
    return Draws(noise, hard, exponential.log() * -gumbel_scale)


def check_draws(draws: object, lead: tuple[int, ...], channels: int, num_neurons: int, like: Tensor) -> Draws:
    """``draws`` as :class:`Draws`, or an error that names the field. ``lead`` is ``(L, B)`` or ``(B,)``."""
    if isinstance(draws, (tuple, list)) and len(draws) == len(
        Draws._fields
    ):  # torch.jit.trace makes plain tuples of them
        draws = Draws(*draws)
    fields = tuple(getattr(draws, name, None) for name in Draws._fields)
    if any(field is None for field in fields):
        raise TypeError(f"draws: got {_checks.describe(draws)}, wanted Draws(noise, hard, gumbel)")
    noise, hard, gumbel = fields
    floats = tuple({like.dtype, accumulate_dtype(like.dtype)})
    _checks.shaped("draws.noise", noise, (*lead, channels), floats)
    _checks.shaped("draws.hard", hard, lead, (torch.bool,))
    _checks.shaped("draws.gumbel", gumbel, (*lead, num_neurons), floats)
    for name, field in zip(Draws._fields, fields, strict=True):
        _checks.same_device(f"draws.{name}", field, like.device)
    return Draws(noise, hard, gumbel)
