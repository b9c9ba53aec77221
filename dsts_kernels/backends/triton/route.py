"""The choice of each sample's neuron: fused with its gates and, on the way back, all gradients of both; or, in a frozen
layer's first launch, with the gather of that neuron's channels.

:mod:`dsts_kernels.backends.gpu.lists` says what a list and a plan are.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import FrozenWeights
from ..gpu import features, grids, switches
from ..gpu.lists import PLAN as PLAN_INTS
from ..gpu.lists import panel_width
from ..packing import tile_channels
from . import launch, route_rows, tuning
from .common import (
    Size,
    kernel_strides,
    plan_at,
    position_offsets,
)
from .gather_panel import gather_columns, gather_grid
from .semhash import gate_of, gate_slope
from .tap_sums import partial_tap_sums


@triton.jit
def first_largest(score, neurons, NEURONS: tl.constexpr):
    """``argmax`` of ``score [NEURONS]``, as torch breaks ties and orders NaN; never out of range."""
    n = tl.arange(0, NEURONS)
    unknown = (score != score) & (n < neurons)
    best = tl.max(tl.where((n < neurons) & (score == score), score, float("-inf")), 0)
    hit = tl.where(tl.sum(unknown.to(tl.int32), 0) > 0, unknown, score == best)
    return tl.minimum(tl.min(tl.where(hit & (n < neurons), n, NEURONS), 0), neurons - 1)


@triton.jit
def shares_of(noisy, neurons, tau, NEURONS: tl.constexpr):
    """``softmax(noisy / tau)`` of ``noisy [NEURONS]``, 0 beyond the neurons."""
    n = tl.arange(0, NEURONS)
    top = tl.max(tl.where(n < neurons, noisy, float("-inf")), 0)
    e = tl.where(n < neurons, tl.exp((noisy - top) / tau), 0.0)
    return e / tl.sum(e, 0)


@triton.jit
def choose_neuron(
    sums,  # [B, parts, size] float32
    scoring,  # [N, size] float32
    b,
    parts,
    size,
    neurons,
    divisor,
    scores,  # [B, N] float32
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
):
    """``argmax`` of the relevance scores of sample ``b``, as torch breaks ties and orders NaN; never out of range.

    ``size`` is channels times taps.
    """
    n = tl.arange(0, NEURONS)
    total = tl.zeros((NEURONS,), tl.float32)
    for c0 in range(0, size, BC):
        c = c0 + tl.arange(0, BC)
        v = tl.zeros((BC,), tl.float32)
        for part in range(0, parts):
            v += tl.load(sums + (b.to(tl.int64) * parts + part) * size + c, mask=c < size, other=0.0)
        mask = (n < neurons)[:, None] & (c < size)[None, :]
        total += tl.sum(tl.load(scoring + n[:, None] * size + c[None, :], mask=mask, other=0.0) * v[None, :], 1)
    score = total / divisor
    tl.store(scores + b * neurons + n, score, mask=n < neurons)
    return first_largest(score, neurons, NEURONS)


@triton.jit
def ask_for_positions(
    x,
    b,
    channels,
    positions,
    size,
    stride,
    FLAT_POSITIONS: tl.constexpr,
    INDEX_64: tl.constexpr,
    BP: tl.constexpr,
    LINE: tl.constexpr,
):
    """Lines of whole positions are sent for, from memory to L2; programs that gather from them share them out.

    ``LINE`` is the channels of 128 bytes, which lie side by side.
    """
    LINES: tl.constexpr = 16
    i = tl.arange(0, BP)
    p = tl.program_id(0) % tl.cdiv(positions, BP) * BP + i
    start = x + b.to(tl.int64) * stride.b + position_offsets(p, size, stride, FLAT_POSITIONS, INDEX_64)
    own = (p < positions) & (i % tl.num_programs(1) == tl.program_id(1))
    for first in range(0, channels, LINES * LINE):
        c = first + tl.arange(0, LINES) * LINE
        wanted = own[:, None] & (c < channels)[None, :]
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred wanted;
                setp.ne.b32 wanted, $2, 0;
                @wanted prefetch.global.L2 [$1];
                mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [(start[:, None] + c[None, :]).to(tl.int64), wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["parts", "num_counters"])
def route_and_gather_kernel(
    x,  # [B, C, T, H, W]
    sums,  # [B, parts, C * taps] float32
    scoring,  # [N, C * taps] float32
    channel_lists,  # [N, C] int32
    starts,  # [N + 1] int64
    panel,  # [B, T, H, W, width]
    plan,  # [B, PLAN] int32
    neuron,  # [B] int64
    scores,  # [B, N] float32
    arrival_counters,  # [num_counters] int32
    parts,
    taps,
    neurons,
    divisor,
    channels,
    positions,
    size,
    stride,
    width,
    num_counters,
    FLAT_POSITIONS: tl.constexpr,
    INDEX_64: tl.constexpr,
    FLAT_STORE: tl.constexpr,
    ASK_FIRST: tl.constexpr,
    NEURONS: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Choose each sample's neuron, gather its channels, and plan the convolution.

    Every program works its sample's choice out for itself, alike; one writes it down. ``arrival_counters`` are zeroed
    for the convolution that follows. Positions do not depend on the choice: with ``ASK_FIRST`` they are on their way to
    L2 while it is worked out.
    """
    along = tl.cdiv(positions, BP)
    b = tl.program_id(0) // along
    batch = tl.num_programs(0) // along
    if ASK_FIRST:
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
        ask_for_positions(x, b, channels, positions, size, stride, FLAT_POSITIONS, INDEX_64, BP, LINE)
    is_writer = (tl.program_id(0) % along == 0) & (tl.program_id(1) == 0)
    chosen = choose_neuron(sums, scoring, b, parts, channels * taps, neurons, divisor, scores, NEURONS, BC)
    n = tl.arange(0, NEURONS)
    split_all = tl.load(starts + n + 1, mask=n < neurons, other=0) - tl.load(starts + n, mask=n < neurons, other=0)
    split_all = split_all.to(tl.int32)
    blocks_all = 9 * tl.cdiv(split_all, BK) + 3 * tl.cdiv(channels - split_all, BK)
    split = tl.sum(tl.where(n == chosen, split_all, 0), 0)
    spatial_blocks = tl.cdiv(split, BK)
    temporal_blocks = tl.cdiv(channels - split, BK)
    if is_writer:
        tl.store(neuron + b, chosen.to(tl.int64))
        tl.store(plan_at(plan, b, "filters"), tl.sum(tl.where(n < chosen, blocks_all, 0), 0))
        tl.store(plan_at(plan, b, "spatial_blocks"), spatial_blocks)
        tl.store(plan_at(plan, b, "temporal_blocks"), temporal_blocks)
        tl.store(plan_at(plan, b, "spatial_channels"), split)
        tl.store(plan_at(plan, b, "temporal_start"), split)
        tl.store(plan_at(plan, b, "row"), chosen)
        for i in range(b * 256, num_counters, batch * 256):
            place = i + tl.arange(0, 256)
            tl.store(arrival_counters + place, tl.zeros((256,), tl.int32), mask=place < num_counters)
    gather_columns(
        x, channel_lists, None, panel, b, chosen, spatial_blocks, temporal_blocks, split, split, True, channels,
        positions, size, stride, width, FLAT_POSITIONS, INDEX_64, FLAT_STORE, BP, BK,
    )  # fmt: skip


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
    total = tl.zeros((NEURONS,), tl.float32)
    for c0 in range(0, size, BC):
        f = c0 + tl.arange(0, BC)
        v = tl.zeros((BC,), tl.float32)
        for part in range(0, parts):
            v += tl.load(partial + (b.to(tl.int64) * parts + part) * size + f, mask=f < size, other=0.0)
        if sums is not None:
            tl.store(sums + b.to(tl.int64) * size + f, v, mask=f < size)
        mask = (n < neurons)[:, None] & (f < size)[None, :]
        total += tl.sum(tl.load(scoring + n[:, None] * size + f[None, :], mask=mask, other=0.0) * v[None, :], 1)
    noisy = total / divisor
    tl.store(scores + b * neurons + n, noisy, mask=n < neurons)
    if gumbel is not None:
        noisy += tl.load(gumbel + b * neurons + n, mask=n < neurons, other=0.0).to(tl.float32)
    chosen = first_largest(noisy, neurons, NEURONS)
    tl.store(neuron + b, chosen.to(tl.int64))
    if share is not None:
        shares = shares_of(noisy, neurons, tau, NEURONS)
        tl.store(share + b, tl.sum(tl.where(n == chosen, shares, 0.0), 0))
    for c0 in range(0, channels, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        q = tl.load(logits + chosen.to(tl.int64) * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        if noise is not None:
            q += tl.load(noise + b.to(tl.int64) * channels + c, mask=c < channels, other=0.0).to(tl.float32)
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
            q = tl.load(logits + chosen * channels + f, mask=known, other=0.0).to(tl.float32)
            if noise is not None:
                q += tl.load(noise + b64 * channels + f, mask=known, other=0.0).to(tl.float32)
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
    """Gradients of tap sums ``(B, C, taps)``, ``scoring`` and ``logits``, each ``None`` where it is not needed."""
    (batch, neurons), (channels, taps) = scores.shape, scoring.shape[1:]
    dscores, dgate, dshare = (None if g is None else g.contiguous() for g in gradients)
    dsums = torch.empty((batch, channels, taps), dtype=torch.float32, device=scores.device) if needs[0] else None
    dscoring = torch.empty_like(scoring) if needs[1] else None
    dlogits = torch.empty_like(logits) if needs[2] else None
    with features.on_device(scores):
        written = dsums, dscoring, None if dgate is None else dlogits
        launch.start(
            route_backward_kernel,
            route_backward_launch(batch, channels * taps, neurons, channels, float(divisor), float(tau)),
            (dscores, dgate, dshare, scores, gumbel, neuron, sums, scoring, logits, noise, *written),
        )
    return dsums, dscoring, dlogits.zero_() if dlogits is not None and dgate is None else dlogits


@launch.remembered
def route_and_gather_launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    routing: tuple[int, int, int, float],
    width: int,
    counters: int,
    block_k: int,
    index_64: bool,
    stores: tuple[bool, bool],
    processors: int,
) -> launch.Launch:
    """``routing`` are parts of the sums, taps, neurons and the divisor of scores; ``stores`` what the kernel's
    ``FLAT_STORE`` and ``ASK_FIRST`` are."""
    stride, is_flat = kernel_strides(shape, strides)
    lanes = grids.next_power(routing[2])
    return launch.Launch(
        gather_grid(shape, block_k, processors),
        (*routing, shape[1], math.prod(shape[2:]), Size(*shape[2:]), stride, width, counters),
        FLAT_POSITIONS=is_flat, INDEX_64=index_64, FLAT_STORE=stores[0], ASK_FIRST=stores[1],
        NEURONS=lanes, BC=tuning.score_channels(lanes),
        BP=grids.GATHER_POSITIONS, BK=block_k, num_warps=8,
    )  # fmt: skip


def can_ask_first(x: Tensor) -> bool:
    """Whether lines of ``x (B, C, T, H, W)`` are channels of a position, where kernels can send for them."""
    return x.stride(1) == 1 and launch.chip(x.device)[0] != tuning.INTERPRETER


def route_and_gather(
    x: Tensor,  # (B, C, T, H, W)
    sums: Tensor,  # (B, parts, C * taps) float32, tap sums of x in parts that are added up here
    w: FrozenWeights,
    divisor: int,
    neuron: Tensor,  # (B,) int64, filled
    scores: Tensor,  # (B, N) float32, filled
    arrival_counters: Tensor,  # int32, zeroed
) -> tuple[Tensor, Tensor]:
    """A frozen layer's panel ``(B, T, H, W, width)`` and plan ``(B, PLAN)``."""
    b, c, *size = x.shape
    width = panel_width(c, x.dtype, False)
    panel = x.new_empty(b, *size, width)
    plan = torch.empty((b, PLAN_INTS), dtype=torch.int32, device=x.device)
    now, block_k = switches.current(), tile_channels(x.dtype)
    if now.gluon_gather and route_rows.why_not(x) is None:
        arguments = sums, w.scoring, w.channels, w.starts, panel, plan, neuron, scores, arrival_counters
        route_rows.route_and_gather_rows(x, arguments, w.scoring.shape[2], float(divisor), block_k)
        return panel, plan
    one = route_and_gather_launch(
        x.shape, x.stride(), (sums.shape[1], w.scoring.shape[2], scores.shape[1], float(divisor)), width,
        arrival_counters.shape[0], block_k, features.needs_int64(x),
        (now.flat_gather, now.early_gather and can_ask_first(x)), launch.chip(x.device)[1],
    )  # fmt: skip
    tensors = x, sums, w.scoring, w.channels, w.starts, panel, plan, neuron, scores, arrival_counters
    launch.start(route_and_gather_kernel, one, tensors)
    return panel, plan
