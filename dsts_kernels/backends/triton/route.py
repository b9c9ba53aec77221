"""The choice of each sample's neuron with its gates and its share, in one launch; and all gradients of them in another.

A frozen layer makes its choice where it gathers: :mod:`.route_and_gather`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import features, grids
from . import launch, tuning
from .semhash import gate_of, gate_slope
from .tap_sums import partial_tap_sums


@triton.jit
def scores_of(
    partial,  # [B, parts, size] float32
    scoring,  # [N, size] float32
    b,
    parts,
    size,
    neurons,
    divisor,
    scores,  # [B, N] float32
    sums,  # [B, size] float32, all parts, or None
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
):
    """Relevance scores ``[NEURONS]`` of sample ``b``, written down too. ``size`` is channels times taps."""
    n = tl.arange(0, NEURONS)
    total = tl.zeros((NEURONS,), tl.float32)
    for f0 in range(0, size, BC):
        f = f0 + tl.arange(0, BC)
        v = tl.zeros((BC,), tl.float32)
        for part in range(0, parts):
            v += tl.load(partial + (b.to(tl.int64) * parts + part) * size + f, mask=f < size, other=0.0)
        if sums is not None:
            tl.store(sums + b.to(tl.int64) * size + f, v, mask=f < size)
        mask = (n < neurons)[:, None] & (f < size)[None, :]
        total += tl.sum(tl.load(scoring + n[:, None] * size + f[None, :], mask=mask, other=0.0) * v[None, :], 1)
    score = total / divisor
    tl.store(scores + b * neurons + n, score, mask=n < neurons)
    return score


@triton.jit
def first_largest(score, neurons, NEURONS: tl.constexpr):
    """``argmax`` of ``score [NEURONS]``, as torch breaks ties and orders NaN; never out of range."""
    n = tl.arange(0, NEURONS)
    unknown = (score != score) & (n < neurons)
    best = tl.max(tl.where((n < neurons) & (score == score), score, float("-inf")), 0)
    hit = tl.where(tl.sum(unknown.to(tl.int32), 0) > 0, unknown, score == best)
    return tl.minimum(tl.min(tl.where(hit & (n < neurons), n, NEURONS), 0), neurons - 1)


@triton.jit
def chosen_logits(
    logits,  # [N, C]
    noise,  # [B, C], or None
    b,
    chosen,
    c,
    channels,
):
    """Noisy logits of neuron ``chosen`` at channels ``c``, in float32.

    Noise is rounded to the dtype of logits, as :func:`dsts_kernels.ops.semhash_gate` rounds it: else a hard gate whose
    logit is nearly 0 could be 1 here and 0 on another backend.
    """
    q = tl.load(logits + chosen.to(tl.int64) * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    if noise is not None:
        drawn = tl.load(noise + b.to(tl.int64) * channels + c, mask=c < channels, other=0.0)
        q += drawn.to(logits.dtype.element_ty).to(tl.float32)
    return q


@triton.jit
def shares_of(noisy, neurons, tau, NEURONS: tl.constexpr):
    """``softmax(noisy / tau)`` of ``noisy [NEURONS]``, 0 beyond the neurons."""
    n = tl.arange(0, NEURONS)
    top = tl.max(tl.where(n < neurons, noisy, float("-inf")), 0)
    e = tl.where(n < neurons, tl.exp((noisy - top) / tau), 0.0)
    return e / tl.sum(e, 0)


@triton.jit(do_not_specialize=["parts"])
def route_kernel(
    partial,  # [B, parts, size] float32
    scoring,  # [N, size] float32
    logits,  # [N, C]
    gumbel,  # [B, N], or None
    noise,  # [B, C], or None
    hard,  # [B] bool, or None: all are hard
    neuron,  # [B] int64
    scores,  # [B, N] float32, before Gumbel noise
    gate,  # [B, C]
    share,  # [B] float32 of the chosen neuron, or None
    sums,  # [B, size] float32, all parts, or None
    parts,
    size,
    neurons,
    channels,
    divisor,
    tau,
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a sample: scores, the choice after Gumbel noise, its softmax share, its gates.

    ``size`` is channels times taps.
    """
    b = tl.program_id(0)
    n = tl.arange(0, NEURONS)
    noisy = scores_of(partial, scoring, b, parts, size, neurons, divisor, scores, sums, NEURONS, BC)
    if gumbel is not None:
        noisy += tl.load(gumbel + b * neurons + n, mask=n < neurons, other=0.0).to(tl.float32)
    chosen = first_largest(noisy, neurons, NEURONS)
    tl.store(neuron + b, chosen.to(tl.int64))
    if share is not None:
        shares = shares_of(noisy, neurons, tau, NEURONS)
        tl.store(share + b, tl.sum(tl.where(n == chosen, shares, 0.0), 0))
    for c0 in range(0, channels, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        q = chosen_logits(logits, noise, b, chosen, c, channels)
        tl.store(gate + b.to(tl.int64) * channels + c, gate_of(q, b, hard), mask=c < channels)


@triton.jit(do_not_specialize=["batch"])
def route_backward_kernel(
    dscores,  # [B, N] float32, or None
    dgate,  # [B, C], or None
    dshare,  # [B] float32, or None
    scores,  # [B, N] float32
    gumbel,  # [B, N], or None
    neuron,  # [B] int64
    sums,  # [B, size] float32
    scoring,  # [N, size] float32
    logits,  # [N, C]
    noise,  # [B, C], or None
    dsums,  # [B, size] float32, or None
    dscoring,  # [N, size] float32, or None
    dlogits,  # [N, C], or None
    batch,
    size,
    neurons,
    channels,
    divisor,
    tau,
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
):
    """A program a block of channels (times taps), over all samples in order, so that nothing depends on timing."""
    n = tl.arange(0, NEURONS)
    f = tl.program_id(0) * BC + tl.arange(0, BC)
    tile = (n < neurons)[:, None] & (f < size)[None, :]
    own = tl.zeros((NEURONS, BC), tl.float32)
    of_scoring = tl.zeros((NEURONS, BC), tl.float32)
    of_logits = tl.zeros((NEURONS, BC), tl.float32)
    if dsums is not None:
        own = tl.load(scoring + n[:, None] * size + f[None, :], mask=tile, other=0.0)
    for b in range(0, batch):
        b64 = tl.cast(b, tl.int64)
        chosen = tl.load(neuron + b)
        d = tl.zeros((NEURONS,), tl.float32)
        if dscores is not None:
            d += tl.load(dscores + b64 * neurons + n, mask=n < neurons, other=0.0)
        if dshare is not None:
            noisy = tl.load(scores + b64 * neurons + n, mask=n < neurons, other=0.0)
            if gumbel is not None:
                noisy += tl.load(gumbel + b64 * neurons + n, mask=n < neurons, other=0.0).to(tl.float32)
            shares = shares_of(noisy, neurons, tau, NEURONS)
            share = tl.sum(tl.where(n == chosen, shares, 0.0), 0)
            d += tl.load(dshare + b) * share * (tl.where(n == chosen, 1.0, 0.0) - shares) / tau
        d = d / divisor
        if dsums is not None:
            tl.store(dsums + b64 * size + f, tl.sum(d[:, None] * own, 0), mask=f < size)
        if dscoring is not None:
            of_scoring += d[:, None] * tl.load(sums + b64 * size + f, mask=f < size, other=0.0)[None, :]
        if dlogits is not None:
            known = f < channels
            q = chosen_logits(logits, noise, b64, chosen, f, channels)
            g = tl.load(dgate + b64 * channels + f, mask=known, other=0.0).to(tl.float32)
            slope = gate_slope(q)
            g = tl.where(slope > 0.0, g * slope, 0.0)
            of_logits += tl.where((n == chosen)[:, None], g[None, :], 0.0)
    if dscoring is not None:
        tl.store(dscoring + n[:, None] * size + f[None, :], of_scoring, mask=tile)
    if dlogits is not None:
        inside = (n < neurons)[:, None] & (f < channels)[None, :]
        tl.store(dlogits + n[:, None] * channels + f[None, :], of_logits, mask=inside)


@launch.remembered
def route_launch(
    batch: int, parts: int, size: int, neurons: int, channels: int, divisor: float, tau: float
) -> launch.Launch:
    lanes = grids.next_power(neurons)
    return launch.Launch(
        (batch,), (parts, size, neurons, channels, divisor, tau),
        NEURONS=lanes, BC=tuning.score_channels(lanes), BLOCK=tuning.semhash_channels(channels),
    )  # fmt: skip


@launch.remembered
def route_backward_launch(
    batch: int, size: int, neurons: int, channels: int, divisor: float, tau: float
) -> launch.Launch:
    lanes = grids.next_power(neurons)
    block = tuning.route_channels(lanes)
    numbers = batch, size, neurons, channels, divisor, tau
    return launch.Launch((grids.cdiv(size, block),), numbers, NEURONS=lanes, BC=block)


def route(
    x: Tensor,  # (B, C, T, H, W)
    scoring: Tensor,  # (N, C, taps) float32
    logits: Tensor,  # (N, C)
    noise: Tensor | None,  # (B, C)
    hard: Tensor | None,  # (B,) bool
    gumbel: Tensor | None,  # (B, N)
    divisor: int,
    tau: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Neurons, scores, gates; and with ``keep`` the choice's shares ``(B,)`` and the tap sums ``(B, C * taps)``."""
    (neurons, channels), (batch, size) = logits.shape, (x.shape[0], scoring[0].numel())
    partial = partial_tap_sums(x, scoring.shape[2])
    real = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    neuron, scores = torch.empty(batch, dtype=torch.int64, device=x.device), real(batch, neurons)
    gate = torch.empty((batch, channels), dtype=logits.dtype, device=x.device)
    share, sums = (real(batch), real(batch, size)) if keep else (None, None)
    if batch:
        with features.on_device(x):
            one = route_launch(batch, partial.shape[1], size, neurons, channels, float(divisor), float(tau))
            tensors = partial, scoring, logits, gumbel, noise, hard, neuron, scores, gate, share, sums
            launch.start(route_kernel, one, tensors)
    return neuron, scores, gate, share, sums


def route_backward(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],  # of scores (B, N), gates (B, C), shares (B,)
    scores: Tensor,  # (B, N) float32
    gumbel: Tensor | None,  # (B, N)
    neuron: Tensor,  # (B,) int64
    sums: Tensor,  # (B, C * taps) float32
    scoring: Tensor,  # (N, C, taps) float32
    logits: Tensor,  # (N, C)
    noise: Tensor | None,  # (B, C)
    divisor: int,
    tau: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of tap sums ``(B, C, taps)``, ``scoring`` and ``logits``, each ``None`` where it is not needed.

    ``logits`` need a gradient of gates.
    """
    (batch, neurons), (channels, taps) = scores.shape, scoring.shape[1:]
    dscores, dgate, dshare = (None if g is None else g.contiguous() for g in gradients)
    dsums = torch.empty((batch, channels, taps), dtype=torch.float32, device=scores.device) if needs[0] else None
    dscoring = torch.empty_like(scoring) if needs[1] else None
    dlogits = torch.empty_like(logits) if needs[2] else None
    with features.on_device(scores):
        launch.start(
            route_backward_kernel,
            route_backward_launch(batch, channels * taps, neurons, channels, float(divisor), float(tau)),
            (dscores, dgate, dshare, scores, gumbel, neuron, sums, scoring, logits, noise, dsums, dscoring, dlogits),
        )
    return dsums, dscoring, dlogits
