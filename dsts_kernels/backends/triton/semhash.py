"""Improved SemHash gates: logits of each sample's neuron plus noise, hard or soft by sample; and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features
from ..gpu.grids import cdiv
from . import launch, tuning


@triton.jit
def noisy_logits(
    logits,  # [N, C]
    neuron,  # [B] int64, or None: sample b has row b
    noise,  # [B, C], or None
    b,
    c,
    mask,
    neurons,
    channels,
):
    """``q`` of sample ``b`` in float32; NaN where its neuron is out of range."""
    if neuron is not None:
        n = tl.load(neuron + b)
        known = (n >= 0) & (n < neurons)
        row = tl.where(known, n, 0)
    else:
        known = True
        row = b.to(tl.int64)
    q = tl.load(logits + row * channels + c, mask=mask, other=0.0).to(tl.float32)
    q = tl.where(known, q, float("nan"))
    if noise is not None:
        q += tl.load(noise + b.to(tl.int64) * channels + c, mask=mask, other=0.0).to(tl.float32)
    return q


@triton.jit
def gate_of(q, b, hard):
    """Gates of noisy logits ``q`` of sample ``b``; ``hard [B]`` says which samples are, all where it is ``None``."""
    g = tl.where(q > 0, 1.0, 0.0)
    if hard is not None:
        r = 1.2 / (1.0 + tl.exp(-q)) - 0.1
        r = tl.where(r < 0.0, 0.0, tl.where(r > 1.0, 1.0, r))
        g = tl.where(tl.load(hard + b), g, r)
    return g


@triton.jit
def gate_slope(q):
    """The derivative of a gate, hard or soft, by its logit."""
    s = 1.0 / (1.0 + tl.exp(-q))
    r = 1.2 * s - 0.1
    return tl.where((r > 0.0) & (r < 1.0), 1.2 * s * (1.0 - s), 0.0)


@triton.jit
def semhash_kernel(
    logits,  # [N, C]
    neuron,  # [B] int64, or None
    noise,  # [B, C], or None
    hard,  # [B] bool, or None: all are hard
    gate,  # [B, C]
    neurons,
    channels,
    BLOCK: tl.constexpr,
):
    """Gates: 1 or 0 for hard samples, the saturating sigmoid for soft ones."""
    blocks = tl.cdiv(channels, BLOCK)
    b = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    q = noisy_logits(logits, neuron, noise, b, c, mask, neurons, channels)
    g = gate_of(q, b, hard)
    if neuron is not None:
        g = tl.where(q == q, g, q)  # a neuron out of range shows as NaN
    tl.store(gate + b.to(tl.int64) * channels + c, g, mask=mask)


@triton.jit(do_not_specialize=["batch"])
def semhash_backward_kernel(
    grad,  # [B, C]
    logits,  # [N, C]
    neuron,  # [B] int64, or None
    noise,  # [B, C], or None
    dlogits,  # [N, C]
    batch,
    neurons,
    channels,
    BLOCK: tl.constexpr,
):
    """A neuron's samples are added up in order, so the result does not depend on timing."""
    blocks = tl.cdiv(channels, BLOCK)
    n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    total = tl.zeros((BLOCK,), tl.float32)
    first = 0
    last = batch
    if neuron is None:
        first = n
        last = n + 1
    for b in range(first, last):
        chose = True
        if neuron is not None:
            chose = tl.load(neuron + b) == n
        if chose:
            b64 = tl.cast(b, tl.int64)
            q = noisy_logits(logits, neuron, noise, b64, c, mask, neurons, channels)
            g = tl.load(grad + b64 * channels + c, mask=mask, other=0.0).to(tl.float32)
            slope = gate_slope(q)
            total += tl.where(slope > 0.0, g * slope, 0.0)  # a gradient of infinity does not meet a slope of 0
    tl.store(dlogits + n.to(tl.int64) * channels + c, total, mask=mask)


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@launch.remembered
def gates_launch(batch: int, neurons: int, channels: int, block: int) -> launch.Launch:
    return launch.Launch((cdiv(channels, block) * batch,), (neurons, channels), BLOCK=block)


@launch.remembered
def gradients_launch(batch: int, neurons: int, channels: int, block: int) -> launch.Launch:
    return launch.Launch((cdiv(channels, block) * neurons,), (batch, neurons, channels), BLOCK=block)


def semhash_gate(
    logits: Tensor,  # (N, C)
    neuron: Tensor | None,  # (B,) int64
    noise: Tensor | None,  # (B, C)
    hard: Tensor | None,  # (B,) bool
) -> Tensor:
    """Gates ``(B, C)``."""
    logits = logits.contiguous()
    neurons, channels = logits.shape
    batch = neurons if neuron is None else neuron.shape[0]
    gate = logits.new_empty(batch, channels)
    if gate.numel():
        with features.on_device(logits):
            block = tuning.semhash_channels(channels)
            tensors = logits, dense(neuron), dense(noise), dense(hard), gate
            launch.start(semhash_kernel, gates_launch(batch, neurons, channels, block), tensors)
    return gate


def semhash_gate_backward(
    grad: Tensor,  # (B, C)
    logits: Tensor,  # (N, C)
    neuron: Tensor | None,  # (B,) int64
    noise: Tensor | None,  # (B, C)
) -> Tensor:
    """Gradient of the logits ``(N, C)``."""
    grad, logits = grad.contiguous(), logits.contiguous()
    dlogits = torch.empty_like(logits)
    if dlogits.numel():
        neurons, channels = logits.shape
        with features.on_device(logits):
            block = tuning.semhash_channels(channels, backward=True)
            tensors = grad, logits, dense(neuron), dense(noise), dlogits
            launch.start(semhash_backward_kernel, gradients_launch(grad.shape[0], neurons, channels, block), tensors)
    return dlogits
