"""Launchers of ``csrc/cuda/semhash.cu``: gates and the gradient of their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import DTYPE_CODES
from . import launch
from .launch import address


def semhash_gate(logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
    logits = logits.contiguous()
    neurons, channels = logits.shape
    neuron, noise, hard = (None if t is None else t.contiguous() for t in (neuron, noise, hard))
    batch = neurons if neuron is None else neuron.shape[0]
    gate = logits.new_empty(batch, channels)
    if gate.numel():
        launch.native().semhash(
            grad=0,
            logits=address(logits),  # [N, C]
            noise=address(noise),  # [B, C]
            neuron=address(neuron),  # [B]
            hard=address(hard),  # [B]
            out=address(gate),  # [B, C]
            batch=batch,
            neurons=neurons,
            channels=channels,
            backward=False,
            dtype=DTYPE_CODES[logits.dtype],
            target=launch.target(logits),
        )
    return gate


def semhash_gate_backward(grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None) -> Tensor:
    grad, logits = grad.contiguous(), logits.contiguous()
    neuron, noise = (None if t is None else t.contiguous() for t in (neuron, noise))
    if not grad.numel():
        return torch.zeros_like(logits)
    dlogits = torch.empty_like(logits)
    launch.native().semhash(
        grad=address(grad),  # [B, C]
        logits=address(logits),  # [N, C]
        noise=address(noise),  # [B, C]
        neuron=address(neuron),  # [B]
        hard=0,
        out=address(dlogits),  # [N, C]
        batch=grad.shape[0],
        neurons=logits.shape[0],
        channels=logits.shape[1],
        backward=True,
        dtype=DTYPE_CODES[logits.dtype],
        target=launch.target(logits),
    )
    return dlogits
