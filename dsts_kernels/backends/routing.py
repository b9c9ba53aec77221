"""Routing on the host in one step of autograd: what :class:`.gpu.kernels.FusedRouting` states, by a backend's passes.

Scores, choice, gates and share are small, and a small layer's training step spends its time between their ops, forward
and backward. The forward pass computes what the single ops do, in the same order; the backward pass of the share is
written out.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .base import Backend


def _without_autocast() -> contextlib.AbstractContextManager:
    """Scores stay wide."""
    on = torch._C._is_any_autocast_enabled()
    return torch.autocast("cpu", enabled=False) if on else contextlib.nullcontext()


def _noisy(scores: Tensor, gumbel: Tensor | None) -> Tensor:
    return scores if gumbel is None else scores + gumbel.to(scores.dtype)


class HostRouting(Backend):
    """Both directions of a layer's routing; arguments and results are those of ``FusedRouting``."""

    def route(
        self,
        x: Tensor,
        scoring: Tensor,
        logits: Tensor,
        noise: Tensor | None,
        hard: Tensor | None,
        gumbel: Tensor | None,
        divisor: int,
        tau: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        with _without_autocast():
            neuron, scores, gate, sums = self.choose_neurons(x, scoring, logits, noise, hard, gumbel, divisor)
            if not keep:
                return neuron, scores, gate, None, None
            share = torch.softmax(_noisy(scores, gumbel) / tau, dim=1).gather(1, neuron[:, None])[:, 0]
        return neuron, scores, gate, share, sums

    def choose_neurons(
        self,
        x: Tensor,
        scoring: Tensor,
        logits: Tensor,
        noise: Tensor | None,
        hard: Tensor | None,
        gumbel: Tensor | None,
        divisor: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The chosen ``neuron``, its ``scores`` and ``gate``, and the tap sums ``(B, C*taps)``."""
        sums = self.tap_sums(x, scoring.shape[2]).flatten(1)
        scores = sums @ scoring.flatten(1).t()
        scores = scores / divisor if divisor != 1 else scores
        neuron = _noisy(scores, gumbel).argmax(dim=1)
        gate = self.semhash_gate(logits, neuron, None if noise is None else noise.to(logits.dtype), hard)
        return neuron, scores, gate, sums

    def route_backward(
        self,
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
        scores: Tensor,
        gumbel: Tensor | None,
        neuron: Tensor,
        sums: Tensor,
        scoring: Tensor,
        logits: Tensor,
        noise: Tensor | None,
        divisor: int,
        tau: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dscores, dgate, dshare = gradients
        dsums = dscoring = dlogits = None
        with _without_autocast():
            if dshare is not None and (needs[0] or needs[1]):
                shares, chosen = torch.softmax(_noisy(scores, gumbel) / tau, dim=1), neuron[:, None]
                own = shares.gather(1, chosen) * (dshare[:, None] / tau)
                through = (own * -shares).scatter_add_(1, chosen, own)  # own where chosen, less own * shares
                dscores = through if dscores is None else dscores + through
            if dscores is not None:
                dscores = dscores / divisor if divisor != 1 else dscores
                if needs[0]:
                    dsums = (dscores @ scoring.flatten(1)).view(len(sums), *scoring.shape[1:])
                if needs[1]:
                    dscoring = (dscores.t() @ sums).view(scoring.shape)
        if dgate is not None and needs[2]:
            noise = None if noise is None else noise.to(logits.dtype)
            dlogits = self.semhash_gate_backward(dgate, logits, neuron, noise)
        return dsums, dscoring, dlogits
