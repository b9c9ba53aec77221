"""A frozen layer's first launch: the choice of each sample's neuron, and the gather of that neuron's channels.

:mod:`dsts_kernels.backends.gpu.lists` says what a list and a plan are; :mod:`.route_rows` has the same launch in Gluon.
"""

from __future__ import annotations

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
from .common import Size, kernel_strides, plan_at, position_offsets
from .gather_panel import gather_columns, gather_grid
from .route import first_largest, scores_of


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
    score = scores_of(sums, scoring, b, parts, size, neurons, divisor, scores, None, NEURONS, BC)
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
