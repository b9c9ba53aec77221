"""Improved SemHash gates: logits of each sample's neuron plus noise, hard or soft by sample; and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features
from .boxes import cdiv, next_power


@triton.jit
def noisy_logits(logits, neuron, noise, b, c, mask, neurons, size, HAS_NEURON: tl.constexpr, HAS_NOISE: tl.constexpr):
    """``q`` of sample ``b`` in float32; NaN where its neuron is out of range."""
    if HAS_NEURON:
        n = tl.load(neuron + b)
        known = (n >= 0) & (n < neurons)
        row = tl.where(known, n, 0)
    else:
        known = True
        row = b.to(tl.int64)
    q = tl.load(logits + row * size + c, mask=mask, other=0.0).to(tl.float32)
    q = tl.where(known, q, float("nan"))
    if HAS_NOISE:
        q += tl.load(noise + b.to(tl.int64) * size + c, mask=mask, other=0.0).to(tl.float32)
    return q


@triton.jit
def semhash_kernel(
    logits,
    neuron,
    noise,
    hard,
    gate,
    neurons,
    size,
    HAS_NEURON: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``gate (B, C)``: 1 or 0 for hard samples, the saturating sigmoid for soft ones; all hard without ``hard``."""
    blocks = tl.cdiv(size, BLOCK)
    b = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = c < size
    q = noisy_logits(logits, neuron, noise, b, c, mask, neurons, size, HAS_NEURON, HAS_NOISE)
    found = tl.where(q > 0, 1.0, 0.0)
    if HAS_NEURON:
        found = tl.where(q == q, found, q)  # a neuron out of range shows as NaN
    if HAS_HARD:
        r = 1.2 / (1.0 + tl.exp(-q)) - 0.1
        r = tl.where(r < 0.0, 0.0, tl.where(r > 1.0, 1.0, r))
        found = tl.where(tl.load(hard + b), found, r)
    tl.store(gate + b.to(tl.int64) * size + c, found, mask=mask)


@triton.jit(do_not_specialize=["batch"])
def semhash_backward_kernel(
    grad,
    logits,
    neuron,
    noise,
    dlogits,
    batch,
    neurons,
    size,
    HAS_NEURON: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dlogits (N, C)``: a neuron's samples are added up in order, so the result does not depend on timing."""
    blocks = tl.cdiv(size, BLOCK)
    n = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = c < size
    total = tl.zeros((BLOCK,), tl.float32)
    first = 0
    last = batch
    if not HAS_NEURON:
        first = n
        last = n + 1
    for b in range(first, last):
        mine = True
        if HAS_NEURON:
            mine = tl.load(neuron + b) == n
        if mine:
            b64 = tl.cast(b, tl.int64)
            q = noisy_logits(logits, neuron, noise, b64, c, mask, neurons, size, HAS_NEURON, HAS_NOISE)
            s = 1.0 / (1.0 + tl.exp(-q))
            r = 1.2 * s - 0.1
            g = tl.load(grad + b64 * size + c, mask=mask, other=0.0).to(tl.float32)
            total += tl.where((r > 0.0) & (r < 1.0), g * (1.2 * s * (1.0 - s)), 0.0)
    tl.store(dlogits + n.to(tl.int64) * size + c, total, mask=mask)


def semhash_gate(logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
    logits = logits.contiguous()
    neurons, size = logits.shape
    batch = neurons if neuron is None else neuron.shape[0]
    gate = logits.new_empty(batch, size)
    if gate.numel():
        with features.on_device(logits):
            block = min(1024, next_power(size))
            semhash_kernel[(cdiv(size, block) * batch,)](
                logits,
                logits if neuron is None else neuron.contiguous(),
                logits if noise is None else noise.contiguous(),
                logits if hard is None else hard.contiguous(),
                gate,
                neurons,
                size,
                HAS_NEURON=neuron is not None,
                HAS_NOISE=noise is not None,
                HAS_HARD=hard is not None,
                BLOCK=block,
            )
    return gate


def semhash_gate_backward(grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None) -> Tensor:
    grad, logits = grad.contiguous(), logits.contiguous()
    dlogits = torch.empty_like(logits)
    if dlogits.numel():
        neurons, size = logits.shape
        with features.on_device(logits):
            block = min(256, next_power(size))
            semhash_backward_kernel[(cdiv(size, block) * neurons,)](
                grad,
                logits,
                logits if neuron is None else neuron.contiguous(),
                logits if noise is None else noise.contiguous(),
                dlogits,
                grad.shape[0],
                neurons,
                size,
                HAS_NEURON=neuron is not None,
                HAS_NOISE=noise is not None,
                BLOCK=block,
            )
    return dlogits
