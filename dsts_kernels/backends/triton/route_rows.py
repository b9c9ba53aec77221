"""A frozen layer's first launch in Gluon: whole positions into shared memory, the choice worked out meanwhile.

Which channels a panel takes depends on the choice of the neuron, but which positions it takes does not. So a CTA asks
for its first positions, with all their channels, by asynchronous copies of 16 bytes; works out scores, choice and lists
while they are on their way; and takes the listed channels from shared memory. The next positions come while these
are written. Every access to features and panels is whole lines.

Off by default (:attr:`..gpu.switches.Switches.gluon_gather`), as no GPU has run it: tests run its compiled code on the
CPU. :mod:`.route_and_gather` has the same launch without Gluon.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..gpu import features, grids
from . import launch, tuning

WARPS = 8


@gluon.jit
def choose_neuron(
    sums,  # [B, parts, size] float32
    scoring,  # [N, size] float32
    b,
    parts,
    size,
    neurons,
    divisor,
    scores,  # [B, N] float32
    NEURONS: gl.constexpr,
    BC: gl.constexpr,
    WARPS: gl.constexpr,
):
    """As :func:`.route_and_gather.choose_neuron`: sample ``b``'s ``argmax`` as torch has it, never out of range."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    n = gl.arange(0, NEURONS, gl.SliceLayout(1, LAYOUT))
    products = gl.zeros([NEURONS, BC], gl.float32, LAYOUT)
    for c0 in range(0, size, BC):
        c = c0 + gl.arange(0, BC, gl.SliceLayout(0, LAYOUT))
        v = gl.zeros([BC], gl.float32, gl.SliceLayout(0, LAYOUT))
        for part in range(0, parts):
            v += gl.load(sums + (b.to(gl.int64) * parts + part) * size + c, mask=c < size, other=0.0)
        mask = (n < neurons)[:, None] & (c < size)[None, :]
        products += gl.load(scoring + (n[:, None] * size + c[None, :]), mask=mask, other=0.0) * v[None, :]
    score = gl.sum(products, 1) / divisor
    gl.store(scores + b * neurons + n, score, mask=n < neurons)
    unknown = (score != score) & (n < neurons)
    best = gl.max(gl.where((n < neurons) & (score == score), score, float("-inf")), 0)
    hit = gl.where(gl.sum(unknown.to(gl.int32), 0) > 0, unknown, score == best)
    return gl.minimum(gl.min(gl.where(hit & (n < neurons), n, NEURONS), 0), neurons - 1)


@gluon.jit
def ask(
    rows, start, first, channels, positions, stride_w, BP: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr
):
    """Copies under way: ``BP`` positions of a sample from ``first`` on, with all their channels."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 128 // rows.dtype.primitive_bitwidth], [1, 32], [WARPS, 1], [1, 0])
    p = first + gl.arange(0, BP, gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, CHANNELS, gl.SliceLayout(0, LAYOUT))
    mask = (p < positions)[:, None] & (c < channels)[None, :]
    async_copy.async_copy_global_to_shared(rows, start + (p[:, None] * stride_w + c[None, :]), mask=mask)
    async_copy.commit_group()


@gluon.jit
def listed_channels(order, k, split, spatial_columns, columns, channels):
    """Channels of a panel's columns ``k``, and whether a list has one there; zeros stand behind each list."""
    place = gl.where(k < spatial_columns, k, k - spatial_columns + split)
    listed = (k < columns) & (place < gl.where(k < spatial_columns, split, channels))
    return gl.load(order + place, mask=listed, other=0), listed


@gluon.jit
def give(rows, panel, first, k, c, listed, columns, positions, width, BP: gl.constexpr, LAYOUT: gl.constexpr):
    """Columns ``k`` of ``BP`` positions of a sample's panel, taken from ``rows [BP, CHANNELS]``."""
    p = first + gl.arange(0, BP, gl.SliceLayout(1, LAYOUT))
    index = gl.zeros([BP, k.shape[0]], gl.int32, LAYOUT) + c[None, :]
    v = gl.where(listed[None, :], rows.gather(index, 1), 0.0).to(rows.dtype)
    mask = (p < positions)[:, None] & (k < columns)[None, :]
    gl.store(panel + (p.to(gl.int64)[:, None] * width + k[None, :]), v, mask=mask)


@gluon.jit
def write_plan(plan, neuron, b, chosen, starts, neurons, channels, split, NEURONS: gl.constexpr, BK: gl.constexpr):
    """What later launches read of the choice; :class:`..gpu.lists.Plan` has the order of the fields."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    n = gl.arange(0, NEURONS, LAYOUT)
    before = n < gl.minimum(chosen, neurons)
    spatial = (gl.load(starts + n + 1, mask=before, other=0) - gl.load(starts + n, mask=before, other=0)).to(gl.int32)
    blocks = 9 * ((spatial + BK - 1) // BK) + 3 * ((channels - spatial + BK - 1) // BK)
    gl.store(neuron + b, chosen.to(gl.int64))
    gl.store(plan + b * 6, gl.sum(gl.where(before, blocks, 0), 0))
    gl.store(plan + b * 6 + 1, (split + BK - 1) // BK)
    gl.store(plan + b * 6 + 2, (channels - split + BK - 1) // BK)
    gl.store(plan + b * 6 + 3, split)
    gl.store(plan + b * 6 + 4, split)
    gl.store(plan + b * 6 + 5, chosen)


@gluon.jit(do_not_specialize=["parts", "num_counters"])
def route_and_gather_rows_kernel(
    x,  # [B, C, T, H, W], channels side by side, positions stride_w apart
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
    vectors,  # of 16 bytes, that a position's channels fill
    positions,
    stride_b,  # in vectors
    stride_w,
    width,
    num_counters,
    NEURONS: gl.constexpr,
    BC: gl.constexpr,
    BP: gl.constexpr,
    CHANNELS: gl.constexpr,
    BK: gl.constexpr,
    WARPS: gl.constexpr,
):
    """As :func:`.route_and_gather.route_and_gather_kernel`; axis 0 of the grid is samples, axis 1 shares positions."""
    MANY: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, WARPS], [1, 0])  # columns
    FEW: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
    # Multiples of a vector, so that the compiler knows them to be.
    VECTOR: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    channels = vectors * VECTOR
    stride_w *= VECTOR
    b = gl.program_id(0)
    step = gl.num_programs(1) * BP
    start = x + b.to(gl.int64) * stride_b * VECTOR
    rows = gl.allocate_shared_memory(
        x.dtype.element_ty, [2, BP, CHANNELS], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    )
    first = gl.program_id(1) * BP
    ask(rows.index(0), start, first, channels, positions, stride_w, BP, CHANNELS, WARPS)

    chosen = choose_neuron(sums, scoring, b, parts, channels * taps, neurons, divisor, scores, NEURONS, BC, WARPS)
    split = (gl.load(starts + chosen + 1) - gl.load(starts + chosen)).to(gl.int32)
    spatial_columns = (split + BK - 1) // BK * BK
    columns = spatial_columns + (channels - split + BK - 1) // BK * BK
    order = channel_lists + chosen.to(gl.int64) * channels
    k = gl.arange(0, CHANNELS, gl.SliceLayout(0, MANY))
    c, listed = listed_channels(order, k, split, spatial_columns, columns, channels)
    more_k = CHANNELS + gl.arange(0, BK, gl.SliceLayout(0, FEW))  # both lists in whole K blocks have at most one more
    more_c, more_listed = listed_channels(order, more_k, split, spatial_columns, columns, channels)
    if gl.program_id(1) == 0:
        write_plan(plan, neuron, b, chosen, starts, neurons, channels, split, NEURONS, BK)
        for i in range(b * 256, num_counters, gl.num_programs(0) * 256):
            place = i + gl.arange(0, 256, gl.BlockedLayout([1], [32], [WARPS], [0]))
            zeros = gl.zeros([256], gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
            gl.store(arrival_counters + place, zeros, mask=place < num_counters)

    own = panel + b.to(gl.int64) * positions * width
    turn = 0
    for at in range(first, positions, step):
        ask(rows.index(1 - turn), start, at + step, channels, positions, stride_w, BP, CHANNELS, WARPS)
        async_copy.wait_group(1)
        gl.barrier()
        here = rows.index(turn)
        give(here, own, at, k, c, listed, columns, positions, width, BP, MANY)
        if columns > CHANNELS:
            give(here, own, at, more_k, more_c, more_listed, columns, positions, width, BP, FEW)
        gl.barrier()  # before these rows are written again
        turn = 1 - turn
    async_copy.wait_group(0)


def why_not(x: Tensor) -> str | None:
    """Why the kernel does not run for ``x (B, C, T, H, W)``; ``None`` where it does."""
    if launch.chip(x.device)[0] == tuning.INTERPRETER:
        return "Triton's interpreter runs no Gluon kernel"
    if not hasattr(gl.shared_memory_descriptor, "gather"):
        return "this Triton cannot gather from shared memory: 3.7 can"
    _, flat = features.kernel_strides(x)
    if x.stride(1) != 1 or not flat:
        return "the channels of a position do not lie side by side"
    vector = 16 // x.element_size()
    outer = [x.stride(i) for i in (0, 2, 3, 4) if x.shape[i] > 1]
    if x.shape[1] % vector or any(stride % vector for stride in outer) or x.data_ptr() % 16:
        return "the channels of a position are no whole 16 bytes"
    if positions_at_once(x) == 0:
        return f"the {x.shape[1]} channels of a position take more than {grids.GATHER_BYTES} bytes of shared memory"
    if features.needs_int64(x):
        return "offsets within a sample need 64 bits"
    return None


def channels_held(x: Tensor) -> int:
    """Of a position in shared memory: a power of two, and a whole number of K blocks."""
    return max(64, grids.next_power(x.shape[1]))


def positions_at_once(x: Tensor) -> int:
    """That a program keeps, twice, in shared memory: a power of two, or 0 where not one fits."""
    return grids.whole_positions(channels_held(x) * x.element_size())


@launch.remembered
def rows_launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    routing: tuple[int, int, int, float],
    sizes: tuple[int, int, int],
    vector: int,
    rows: int,
    channels: int,
    processors: int,
) -> launch.Launch:
    """``routing`` are parts of the sums, taps, neurons and the divisor of scores; ``sizes`` the panel's width, counters
    and the K block; ``rows`` of ``channels`` are in shared memory at once, in vectors of ``vector``."""
    b, c, positions = shape[0], shape[1], math.prod(shape[2:])
    (stride_b, *_, stride_w), _ = features.strides_for_kernels(shape, strides)
    (parts, taps, neurons, divisor), (width, counters, block_k) = routing, sizes
    lanes = grids.next_power(neurons)
    return launch.Launch(
        grids.gather_grid(b, positions, 0, processors, rows),
        (
            parts, taps, neurons, divisor, c // vector, positions, stride_b // vector, stride_w // vector, width,
            counters,
        ),
        NEURONS=lanes, BC=max(128, tuning.score_channels(lanes)), BP=rows, CHANNELS=channels, BK=block_k, WARPS=WARPS,
        num_warps=WARPS,
    )  # fmt: skip


def route_and_gather_rows(
    x: Tensor,  # (B, C, T, H, W)
    arguments: tuple[Tensor, ...],  # of the kernel, from sums to arrival_counters
    taps: int,
    divisor: float,
    block_k: int,
) -> None:
    """Launch it: fills panel, plan, neuron, scores, and zeroes the counters."""
    sums, *_, panel, _, _, scores, counters = arguments
    one = rows_launch(
        x.shape, x.stride(), (sums.shape[1], taps, scores.shape[1], divisor),
        (panel.shape[-1], counters.shape[0], block_k), 16 // x.element_size(), positions_at_once(x), channels_held(x),
        launch.chip(x.device)[1],
    )  # fmt: skip
    launch.start(route_and_gather_rows_kernel, one, (x, *arguments))
