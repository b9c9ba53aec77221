"""Launchers of the CUDA kernels, ``csrc/cuda``: tensors in, tensors out, through ``dsts_kernels._C.cuda``.

What :class:`..gpu.kernels.Kernels` asks for. Each call hands addresses, sizes and strides to one launch on the current
stream. Rows that tensor cores read are padded to whole 16 bytes: as they are made, or in a copy where they come from
outside with an odd number of channels.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import FrozenWeights
from ..cpu import _C, DTYPE_CODES
from ..gpu import features
from ..gpu.features import INT32, SPATIAL, cdiv
from ..gpu.kernels import PLAIN, Epilogue
from ..gpu.lists import PLAN, Groups, Lists, panel_width
from ..packing import tile_channels

TILE, GATHER, LEAST = 128, 64, 8  # positions and outputs of a tile, positions of a gather, K blocks of a short range
ROWS_BYTES = 16384  # of whole rows of features that a block of a gather holds
MOST_PROGRAMS = 1024
MOST_NEURONS = 8192  # kernels keep a score or a flag of each in shared memory
SHARED_KIB = {70: 96, 75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228}  # a processor


class Chip(NamedTuple):
    """What launches depend on."""

    capability: int  # times ten
    processors: int


@functools.cache
def chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def native() -> ModuleType:
    """The native launchers."""
    return _C.cuda


@functools.lru_cache(64)
def _target(index: int, capability: int, stream: int) -> object:
    return native().Target(index, capability, stream)


def target(x: Tensor) -> object:
    """The device of ``x`` and its current stream."""
    if not x.is_cuda:  # emulated, in tests
        return native().Target(0, chip(x.device).capability, 0)
    return _target(x.device.index, chip(x.device).capability, torch.cuda.current_stream(x.device).cuda_stream)


def uses_tf32(x: Tensor) -> bool:
    """Whether float32 products may be TF32 products: as torch's float32 matmul precision says."""
    if x.dtype != torch.float32 or chip(x.device).capability < 80:
        return False
    return torch.get_float32_matmul_precision() != "highest"


def block_kib(capability: int) -> int:
    """KiB of shared memory that a block of tensor core products takes at most."""
    return 44 if capability < 75 else 32 if capability < 80 else 70


def resident(x: Tensor) -> int:
    """Blocks of a product that a multiprocessor holds: of exact float32 one, else two where shared memory allows."""
    capability = chip(x.device).capability
    if x.dtype == torch.float32 and not uses_tf32(x):
        return 1
    return 2 if SHARED_KIB.get(capability, 100) >= 2 * block_kib(capability) else 1


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def vector(dtype: torch.dtype) -> int:
    """Elements of 16 bytes."""
    return 16 // dtype.itemsize


def padded(x: Tensor) -> Tensor:
    """Dense rows of whole, aligned 16 bytes: ``x`` itself, or a copy with zeros behind each row."""
    more = -x.shape[-1] % vector(x.dtype)
    if more:
        return F.pad(x, (0, more))
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def round_up(n: int, dtype: torch.dtype) -> int:
    return cdiv(n, vector(dtype)) * vector(dtype)


def vectors_fit(x: Tensor) -> bool:
    """Whether 16 bytes at a time can be read along the side of ``(B, C, T, H, W)`` that lies at stride 1."""
    v, strides = vector(x.dtype), x.stride()
    if x.data_ptr() % 16:
        return False
    if strides[1] == 1:
        others = [strides[i] for i in (0, 2, 3, 4) if x.shape[i] > 1]
        return x.shape[1] % v == 0 and all(stride % v == 0 for stride in others)
    steps, flat = features.kernel_strides(x)
    outer = [strides[i] for i in (0, 1) if x.shape[i] > 1]
    return flat and steps[4] == 1 and x.shape[2:].numel() % v == 0 and all(stride % v == 0 for stride in outer)


def semhash_gate(logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
    logits = logits.contiguous()
    neurons, channels = logits.shape
    neuron, noise, hard = (None if t is None else t.contiguous() for t in (neuron, noise, hard))
    batch = neurons if neuron is None else neuron.shape[0]
    gate = logits.new_empty(batch, channels)
    if gate.numel():
        native().semhash(
            0, address(logits), address(noise), address(neuron), address(hard), address(gate),
            batch, neurons, channels, False, DTYPE_CODES[logits.dtype], target(logits),
        )  # fmt: skip
    return gate


def semhash_gate_backward(grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None) -> Tensor:
    grad, logits = grad.contiguous(), logits.contiguous()
    neuron, noise = (None if t is None else t.contiguous() for t in (neuron, noise))
    if not grad.numel():
        return torch.zeros_like(logits)
    dlogits = torch.empty_like(logits)
    native().semhash(
        address(grad), address(logits), address(noise), address(neuron), 0, address(dlogits),
        grad.shape[0], *logits.shape, True, DTYPE_CODES[logits.dtype], target(logits),
    )  # fmt: skip
    return dlogits


def partial_tap_sums(x: Tensor, taps: int) -> Tensor:
    b, c, t, h, w = x.shape
    blocks = b * cdiv(c, 64 if x.stride(1) == 1 else 32)
    parts = max(1, min(cdiv(t * h * w, 64), cdiv(4 * chip(x.device).processors, max(1, blocks))))
    sums = x.new_empty((b, parts, c, taps), dtype=torch.float32)
    if sums.numel():
        native().tap_sums(
            address(x), (t, h, w), x.stride(), address(sums), b, c, parts, taps, taps == 1 and vectors_fit(x),
            DTYPE_CODES[x.dtype], target(x),
        )  # fmt: skip
    return sums


def check_count(neurons: int) -> None:
    if neurons > MOST_NEURONS:
        raise ValueError(f"neurons: got {neurons}, wanted at most {MOST_NEURONS} on the 'cuda' backend")


def group_samples(neuron: Tensor, neurons: int) -> Groups:
    check_count(neurons)
    batch = neuron.shape[0]
    count = min(batch, neurons)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=neuron.device)
    groups = Groups(empty(batch), empty(count), empty(neurons), empty(count, 2), empty(batch))
    native().group_samples(address(neuron), *map(address, groups), batch, neurons, count, target(neuron))
    return groups


def list_channels(gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
    channels = gate.shape[1]
    count = groups.neuron_of.shape[0] if union else gate.shape[0]
    gate = gate.float()
    order = torch.empty((count, channels), dtype=torch.int32, device=gate.device)
    plans = torch.empty((count, PLAN), dtype=torch.int32, device=gate.device)
    listed = torch.empty((count, channels) if union else (1,), dtype=torch.int8, device=gate.device)
    native().list_channels(
        address(gate), address(groups.slots), address(groups.neuron_of), address(groups.groups),
        address(groups.members), address(order), address(plans), address(listed), count, channels, block_k, union,
        target(gate),
    )  # fmt: skip
    return Lists(order, plans, listed)


def gather_rows(x: Tensor) -> tuple[int, tuple[int, ...]]:
    """Positions whose channels a block of a gather takes whole, 16 bytes at a time, and strides whose last one leads
    from position to position; 0 and the strides of ``x`` where it goes by elements."""
    strides, flat = features.kernel_strides(x)
    row = x.shape[1] * x.element_size()
    whole = flat and row and x.stride(1) == 1 and vectors_fit(x)
    rows = min(GATHER, ROWS_BYTES // row) if whole else 0
    return rows, strides if rows else x.stride()


def gather_shares(x: Tensor, rows: int) -> int:
    """Blocks that share a sample's rows, or a list's K blocks: about four blocks a multiprocessor in all."""
    positions = x.shape[2:].numel()
    along = x.shape[0] * (1 if rows else cdiv(positions, GATHER))
    most = cdiv(positions, rows) if rows else cdiv(x.shape[1], tile_channels(x.dtype))
    return max(1, min(most, cdiv(4 * chip(x.device).processors, along)))


def gather_panel(
    x: Tensor, gate: Tensor, neuron: Tensor, neurons: int, slots: Tensor | None, lists: Lists, width: int
) -> Tensor:
    b, c, *size = x.shape
    panel = x.new_empty(b, *size, width)
    gate, (rows, strides) = gate.float(), gather_rows(x)
    native().gather_panel(
        address(x), size, strides, address(panel), b, c, width, gather_shares(x, rows), rows, address(lists.order),
        address(slots), address(lists.plans), address(gate), address(neuron), neurons, DTYPE_CODES[x.dtype], target(x),
    )  # fmt: skip
    return panel


def route_and_gather(
    x: Tensor, sums: Tensor, w: FrozenWeights, divisor: int, neuron: Tensor, scores: Tensor, arrival_counters: Tensor
) -> tuple[Tensor, Tensor]:
    check_count(scores.shape[1])
    b, c, *size = x.shape
    width, (rows, strides) = panel_width(c, x.dtype, False), gather_rows(x)
    panel = x.new_empty(b, *size, width)
    plan = torch.empty((b, PLAN), dtype=torch.int32, device=x.device)
    native().route_and_gather(
        address(x), size, strides, address(panel), b, c, width, gather_shares(x, rows), rows, address(sums),
        address(w.scoring), address(w.channels), address(w.starts), address(plan), address(neuron), address(scores),
        address(arrival_counters), divisor, scores.shape[1], sums.shape[1], w.scoring.shape[2],
        arrival_counters.numel(), DTYPE_CODES[x.dtype], target(x),
    )  # fmt: skip
    return panel, plan


def pack_filters(weights: list[Tensor], neuron_of: Tensor, dtype: torch.dtype, by_channel: bool) -> Tensor:
    outputs, channels = weights[0].shape[1:3]
    taps = [weight[0, 0, 0].numel() for weight in weights]
    pitch = round_up(outputs if by_channel else channels, dtype)
    slots = neuron_of.shape[0]
    shape = (slots * sum(taps), channels if by_channel else outputs, pitch)
    filters = torch.empty(shape, dtype=dtype, device=neuron_of.device)
    first = 0
    for weight, count in zip(weights, taps, strict=True):
        weight = (weight if weight.dtype in (dtype, torch.float32) else weight.to(dtype)).contiguous()
        native().pack_filters(
            address(weight), address(filters), address(neuron_of), outputs, channels, count, first, sum(taps),
            by_channel, pitch, slots, DTYPE_CODES[weight.dtype], DTYPE_CODES[dtype], target(weight),
        )  # fmt: skip
        first += count
    return filters


def unpack_filters(
    filters: Tensor,
    like: Tensor,
    groups: Groups,
    listed: Tensor | None,
    bit: int,
    first: int,
    taps: int,
    by_channel: bool,
) -> Tensor:
    neurons, outputs, channels = like.shape[:3]
    weight = torch.empty(like.shape, dtype=filters.dtype, device=like.device)
    native().unpack_filters(
        address(filters), address(weight), address(groups.slot_of), address(listed), bit, outputs, channels,
        like[0, 0, 0].numel(), first, taps, by_channel, filters.shape[-1], neurons, DTYPE_CODES[filters.dtype],
        target(weight),
    )  # fmt: skip
    return weight.to(like.dtype)


class ConvGrid(NamedTuple):
    """A convolution's grid, known before its operands are."""

    programs: int
    waves: int
    arrival_counters: int


def conv_grid(x: Tensor, outputs: int, width: int, taps: int, sum_taps: int) -> ConvGrid:
    tiles = x.shape[0] * cdiv(x.shape[2:].numel(), TILE) * cdiv(outputs, TILE)
    most = tiles * cdiv(width, tile_channels(x.dtype)) * taps
    if most > INT32:
        raise ValueError(f"x: got {tuple(x.shape)}, wanted fewer than 2^31 steps of 128 bytes of channels in all tiles")
    programs = max(1, min(chip(x.device).processors * resident(x), cdiv(most, LEAST), MOST_PROGRAMS))
    return ConvGrid(programs, max(0, tiles // programs - 1), programs + x.shape[0] * cdiv(outputs, TILE))


def vector_rows(out: Tensor, skip: Tensor | None) -> bool:
    """Whether 16 bytes at a time can be written along channels."""
    v = vector(out.dtype)
    others = [out.stride(i) for i in (0, 2, 3, 4) if out.shape[i] > 1]
    aligned = out.data_ptr() % 16 == 0 and (skip is None or skip.data_ptr() % 16 == 0)
    return aligned and out.stride(1) == 1 and out.shape[1] % v == 0 and all(stride % v == 0 for stride in others)


def conv(
    panel: Tensor,
    filters: Tensor,
    form: str,
    plan: Tensor,
    out: Tensor,
    grid: ConvGrid,
    *,
    kernel: tuple[int, int, int] = SPATIAL,
    with_temporal: bool = True,
    sign: int = 1,
    order: Tensor | None = None,
    k_channels: int = 0,
    slots: int = 0,
    epilogue: Epilogue = PLAIN,
) -> None:
    b, outputs, *size = out.shape
    planned, width = form in ("packed", "listed"), panel.shape[-1]
    if form != "packed":
        filters = padded(filters)
    if not planned:
        panel = padded(panel)
    sums = epilogue.sums
    taps = 0 if sums is None else sums.shape[2]
    tiles = cdiv(math.prod(size), TILE)
    parts = panel.new_empty((b, tiles, outputs, taps), dtype=torch.float32) if taps else None
    counters = epilogue.arrival_counters
    if counters is None:
        counters = panel.new_zeros(grid.arrival_counters, dtype=torch.int32)
    partial = panel.new_empty(2 * grid.programs * TILE * TILE, dtype=torch.float32)
    addresses = (
        panel, filters, order, plan if planned else None, None if planned else plan, epilogue.bias, epilogue.skip, out,
        parts, sums if taps else None, partial, counters,
    )  # fmt: skip
    native().conv(
        tuple(map(address, addresses)), size, out.stride(), b, width, panel.shape[-1], k_channels, slots, outputs,
        filters.shape[-1], kernel, with_temporal, sign, form, plan.dtype == torch.int64, epilogue.relu, taps,
        grid.programs, grid.waves, vector_rows(out, epilogue.skip), DTYPE_CODES[out.dtype], uses_tf32(out), target(out),
    )  # fmt: skip


def data_gradient(
    grad_ndhwc: Tensor,
    x: Tensor,
    gate: Tensor,
    groups: Groups,
    spatial: Tensor,
    temporal: Tensor,
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    b, c, *size = x.shape
    outputs, factors = spatial.shape[1], gate.float()
    lists = list_channels(factors, groups, False, tile_channels(x.dtype))
    filters = pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
    grad_ndhwc = padded(grad_ndhwc)
    dx = torch.empty_like(x) if need_x else None
    if dx is not None and dx.stride() != x.stride() and need_gate:  # one set of strides serves both
        x = torch.empty_like(dx).copy_(x)
    parts = x.new_empty((b, cdiv(math.prod(size), TILE), c), dtype=torch.float32) if need_gate else None
    native().data_gradient(
        address(grad_ndhwc), address(filters), address(lists.order), address(lists.plans), address(factors), address(x),
        address(dx), address(parts), size, (x if dx is None else dx).stride(), b, c, outputs, grad_ndhwc.shape[-1],
        not need_gate, DTYPE_CODES[x.dtype], uses_tf32(x), target(x),
    )  # fmt: skip
    return dx, None if parts is None else parts.sum(1).to(gate.dtype)


def weight_gradient(
    left: Tensor,
    right: Tensor,
    lists: Lists | None,
    groups: Groups,
    rows: int,
    kernel: tuple[int, int, int],
    with_temporal: bool,
    sign: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    size, columns, by_neuron = left.shape[1:4], right.shape[-1], out is not None
    kept = dtype if dtype in (left.dtype, torch.float32) else torch.float32
    if by_neuron and out.dtype != kept:
        raise TypeError(f"out: got {out.dtype}, wanted {left.dtype} or torch.float32")
    found = torch.empty(shape, dtype=kept, device=left.device) if out is None else out
    left, right = padded(left), padded(right)
    native().weight_gradient(
        address(left), address(right), *((0, 0) if lists is None else (address(lists.order), address(lists.plans))),
        address(groups.neuron_of), address(groups.groups), address(groups.members), address(found), tuple(size),
        left.shape[-1], right.shape[-1], rows, columns, groups.neuron_of.shape[0], kernel, with_temporal, sign,
        by_neuron, kept == torch.float32, DTYPE_CODES[left.dtype], uses_tf32(left), target(left),
    )  # fmt: skip
    return found


__all__ = [
    "conv",
    "conv_grid",
    "data_gradient",
    "gather_panel",
    "group_samples",
    "list_channels",
    "pack_filters",
    "partial_tap_sums",
    "route_and_gather",
    "semhash_gate",
    "semhash_gate_backward",
    "unpack_filters",
    "weight_gradient",
]  # fmt: skip
