"""Launchers: tensors in, tensors out, on the current stream of their device and without a host synchronisation."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..base import FrozenOptions, FrozenWeights
from ..packing import tile_channels
from . import tuning
from .boxes import Box, best_box, cdiv, next_power
from .conv import conv_kernel
from .data_gradient import data_gradient_kernel
from .filters import pack_filters_kernel, unpack_filters_kernel
from .route import group_kernel, list_kernel, pack_kernel, route_and_pack_kernel
from .schedule import PLAN
from .semhash import semhash_backward_kernel, semhash_kernel
from .tap_sums import tap_sums_kernel
from .weight_gradient import weight_gradient_kernel

INT32 = 2**31 - 1
POSITIONS = 64  # of a program that gathers
FILTER_TILE = 64  # outputs, and elements of channels and taps, of a program that lays filters out
LEAST = 8  # K blocks: what a program of a shared tile takes at least
SPATIAL, TEMPORAL = (1, 3, 3), (3, 1, 1)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the device of ``x``, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def chip(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessors."""
    if device.type != "cuda":
        return tuning.INTERPRETER, 3
    properties = torch.cuda.get_device_properties(device)
    return tuning.architecture_of((properties.major, properties.minor)), properties.multi_processor_count


def precision(dtype: torch.dtype) -> str:
    return "ieee" if tuning.kind_of(dtype) == "ieee" else "tf32"


def extent(x: Tensor) -> int:
    """The largest offset within a sample of ``(B, C, T, H, W)``."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def wide(*features: Tensor) -> bool:
    """Whether offsets within a sample need 64 bits."""
    return any(extent(x) > INT32 for x in features)


def flat(x: Tensor) -> bool:
    """Whether the positions of a sample follow one another at one stride."""
    strides = [stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    sizes = [size for size in x.shape[2:] if size > 1]
    return all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 1))


def steps_of(x: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides for a kernel, and :func:`flat`; a flat sample's last one is the step from position to position."""
    if not flat(x):
        return x.stride(), False
    step = next((x.stride(i) for i in (4, 3, 2) if x.shape[i] > 1), 1)
    return (*x.stride()[:4], step), True


def rows_of(x: Tensor) -> Tensor:
    """``x (B, C, T, H, W)`` as a dense panel ``(B, T, H, W, C)``, a copy only where it does not lie so."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows of whole 16 bytes, and coordinates that fit."""
    return (tensor.shape[-1] * tensor.element_size()) % 16 == 0 and tensor.data_ptr() % 16 == 0


def dense_strides(shape: torch.Size) -> list[int]:
    """Strides of dense memory. Those that torch gives a side of 1 may be anything, and no descriptor takes that."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def boxed(panel: Tensor, box: Box, columns: int, tma: bool) -> tuple[object, bool]:
    """A panel ``(B, T, H, W, c)`` as a kernel takes it, and whether that is a tensor descriptor."""
    if not (tma and aligned(panel)):
        return panel, False
    return TensorDescriptor(panel, list(panel.shape), dense_strides(panel.shape), [1, *box, columns]), True


def described(matrix: Tensor, block: list[int], tma: bool) -> tuple[object, bool]:
    """Likewise for filters."""
    if not (tma and aligned(matrix)):
        return matrix, False
    return TensorDescriptor(matrix, list(matrix.shape), dense_strides(matrix.shape), block), True


def box_for(tile: tuning.Tile, size: tuple[int, int, int], rows: int) -> Box:
    return best_box(rows, *size)


def semhash_gate(logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
    logits = logits.contiguous()
    neurons, size = logits.shape
    batch = neurons if neuron is None else neuron.shape[0]
    gate = logits.new_empty(batch, size)
    if gate.numel():
        with on_device(logits):
            block = min(1024, next_power(size))
            semhash_kernel[cdiv(size, block), batch](
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
        with on_device(logits):
            block = min(256, next_power(size))
            semhash_backward_kernel[cdiv(size, block), neurons](
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


def partial_tap_sums(x: Tensor, taps: int) -> Tensor:
    """``(B, parts, C, taps)`` float32: enough parts that a small batch fills the chip."""
    b, c, t, h, w = x.shape
    bp, bc = (64, 64) if taps == 1 else (64, 32)
    steps, blocks = cdiv(t * h * w, bp), cdiv(c, bc)
    parts = max(1, min(steps, cdiv(4 * chip(x.device)[1], max(1, b * blocks))))
    sums = x.new_empty((b, parts, c, taps), dtype=torch.float32)
    if sums.numel():
        with on_device(x):
            strides, is_flat = steps_of(x)
            tap_sums_kernel[blocks, parts, b](
                x, sums, c, t, h, w, *strides, TAPS=taps, FLAT=is_flat, WIDE=wide(x), BP=bp, BC=bc
            )
    return sums


def tap_sums(x: Tensor, taps: int) -> Tensor:
    return partial_tap_sums(x, taps).sum(1)


class Groups(NamedTuple):
    """Samples by neuron: see :func:`.route.group_kernel`."""

    slots: Tensor  # (B,) int32
    neuron_of: Tensor  # (S,) int32
    slot_of: Tensor  # (N,) int32
    groups: Tensor  # (S, 2) int32
    members: Tensor  # (B,) int32


def group_samples(neuron: Tensor, neurons: int) -> Groups:
    batch = neuron.shape[0]
    count = min(batch, neurons)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=neuron.device)
    groups = Groups(empty(batch), empty(count), empty(neurons), empty(count, 2), empty(batch))
    lanes = next_power(neurons)
    group_kernel[(batch,)](
        neuron, *groups, batch, neurons, count, NEURONS=lanes, CHUNK=max(1, min(next_power(batch), 4096 // lanes))
    )
    return groups


class Lists(NamedTuple):
    """Channel lists by row: see :mod:`.route`."""

    order: Tensor  # (rows, C) int32
    plans: Tensor  # (rows, PLAN) int32
    listed: Tensor  # (rows, C) int8, where the rows are slots


def list_channels(gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
    """Lists of every sample, or with ``union`` of every slot: what any of its samples reads."""
    size = gate.shape[1]
    count = groups.neuron_of.shape[0] if union else gate.shape[0]
    order = torch.empty((count, size), dtype=torch.int32, device=gate.device)
    plans = torch.empty((count, PLAN), dtype=torch.int32, device=gate.device)
    listed = torch.empty((count, size) if union else (1,), dtype=torch.int8, device=gate.device)
    list_kernel[(count,)](
        gate,
        groups.slots,
        groups.neuron_of,
        groups.groups,
        groups.members,
        order,
        plans,
        listed,
        size,
        UNION=union,
        BK=block_k,
        CHUNK=min(1024, next_power(size)),
    )
    return Lists(order, plans, listed)


def gather_grid(batch: int, positions: int, blocks: int, device: torch.device) -> tuple[int, int, int]:
    """Blocks of positions, shares of a list's K blocks, samples: about four programs a multiprocessor."""
    along = cdiv(positions, POSITIONS)
    return along, max(1, min(blocks, cdiv(4 * chip(device)[1], along * batch))), batch


def pack_features(x: Tensor, gate: Tensor, neuron: Tensor, neurons: int, rows: Tensor, lists: Lists, width: int) -> Tensor:
    """``(B, T, H, W, width)``: gated features gathered by the list row that each sample has in ``rows``."""
    b, c, t, h, w = x.shape
    panel = x.new_empty(b, t, h, w, width)
    block_k = tile_channels(x.dtype)
    strides, is_flat = steps_of(x)
    pack_kernel[gather_grid(b, t * h * w, cdiv(c, block_k), x.device)](
        x,
        lists.order,
        gate,
        neuron,
        rows,
        lists.plans,
        panel,
        neurons,
        c,
        t * h * w,
        h,
        w,
        *strides,
        width,
        FLAT=is_flat,
        WIDE=wide(x),
        BP=POSITIONS,
        BK=block_k,
    )
    return panel


def panel_width(channels: int, dtype: torch.dtype, scaled: bool) -> int:
    """Columns a panel may need: both lists in whole K blocks, which overlap only where gates are soft."""
    block_k = tile_channels(dtype)
    blocks = cdiv(channels, block_k)
    return (2 * blocks if scaled else blocks + 1) * block_k


def pack_filters(weights: list[Tensor], neuron_of: Tensor, dtype: torch.dtype, by_channel: bool) -> Tensor:
    """Filters of the chosen neurons, ``(slots * taps, C, O)`` or ``(slots * taps, O, C)``, all kernels' taps in a row."""
    outputs, channels = weights[0].shape[1:3]
    taps = [weight[0, 0, 0].numel() for weight in weights]
    shape = (channels, outputs) if by_channel else (outputs, channels)
    filters = torch.empty((neuron_of.shape[0] * sum(taps), *shape), dtype=dtype, device=neuron_of.device)
    first = 0
    for weight, count in zip(weights, taps, strict=True):
        grid = (cdiv(outputs, FILTER_TILE) * cdiv(channels * count, FILTER_TILE), neuron_of.shape[0])
        pack_filters_kernel[grid](
            weight.contiguous(), filters, neuron_of, outputs, channels, first, sum(taps),
            TAPS=count, BY_CHANNEL=by_channel, BO=FILTER_TILE, BF=FILTER_TILE,
        )  # fmt: skip
        first += count
    return filters


def unpack_filters(
    filters: Tensor, like: Tensor, groups: Groups, listed: Tensor | None, bit: int, first: int, taps: int, by_channel: bool
) -> Tensor:
    """Gradients ``filters`` of the chosen neurons, as a gradient of ``like (N, O, C, *kernel)``."""
    neurons, outputs, channels = like.shape[:3]
    weight = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    own = like[0, 0, 0].numel()
    grid = (cdiv(outputs, FILTER_TILE) * cdiv(channels * own, FILTER_TILE), neurons)
    unpack_filters_kernel[grid](
        filters, weight, groups.slot_of, filters if listed is None else listed, outputs, channels, first, taps, bit,
        TAPS=own, BY_CHANNEL=by_channel, HAS_LISTS=listed is not None, BO=FILTER_TILE, BF=FILTER_TILE,
    )  # fmt: skip
    return weight


class Epilogue(NamedTuple):
    """What a convolution does besides. ``flags`` are zeros from an earlier launch, else made here."""

    bias: Tensor | None = None
    relu: bool = False
    skip: Tensor | None = None
    sums: Tensor | None = None
    flags: Tensor | None = None


class Problem(NamedTuple):
    """A convolution's tile and grid, known before its operands are."""

    tile: tuning.Tile
    box: Box
    programs: int
    waves: int
    flags: int


def conv_problem(x: Tensor, outputs: int, width: int, taps: int, sum_taps: int) -> Problem:
    """``x`` gives batch, size, dtype and device; ``width`` is the most columns a reduction has, by ``taps``."""
    size = tuple(x.shape[2:])
    architecture, processors = chip(x.device)
    small = sum_taps == 9
    tile = tuning.choose_tile("conv", architecture, tuning.kind_of(x.dtype), size, outputs, x.shape[0], small)
    box = best_box(tile.m, *size)
    tiles = x.shape[0] * box.tiles(*size) * cdiv(outputs, tile.n)
    most = tiles * cdiv(width, tile.k) * taps
    programs = max(1, min(processors * tile.per_sm, cdiv(most, LEAST)))
    if most > INT32:
        raise ValueError(f"x: got {tuple(x.shape)}, wanted fewer than 2^31 steps of {tile.k} channels in all its tiles")
    flags = programs + x.shape[0] * cdiv(outputs, tile.n)
    return Problem(tile, box, programs, max(0, tiles // programs - 1), flags)


def conv(
    panel: Tensor,
    filters: Tensor,
    form: str,
    plan: Tensor,
    out: Tensor,
    p: Problem,
    *,
    kernel: tuple[int, int, int] = SPATIAL,
    second: bool = True,
    sign: int = 1,
    order: Tensor | None = None,
    rows: int = 0,
    slots: int = 0,
    epilogue: Epilogue = Epilogue(),
) -> None:
    """:func:`.conv.conv_kernel` on a panel ``(B, T, H, W, width)`` into ``out (B, O, T, H, W)``."""
    b, outputs, *size = out.shape
    tile, box = p.tile, p.box
    x, tma_x = boxed(panel, box, tile.k, tile.tma)
    shape = {"packed": [tile.n, tile.k], "rows": [1, tile.n, tile.k], "columns": [1, tile.k, tile.n]}.get(form)
    f, tma_filters = described(filters, shape, tile.tma) if shape else (filters, False)
    sums = epilogue.sums
    sum_taps = 0 if sums is None else sums.shape[2]
    parts = panel.new_empty((b, box.tiles(*size), outputs, sum_taps) if sum_taps else (1,), dtype=torch.float32)
    flags = panel.new_zeros(p.flags, dtype=torch.int32) if epilogue.flags is None else epilogue.flags
    partial = panel.new_empty(2 * p.programs * tile.m * tile.n, dtype=torch.float32)
    conv_kernel[(p.programs,)](
        x,
        f,
        plan if order is None else order,
        plan,
        partial if epilogue.bias is None else epilogue.bias,
        out if epilogue.skip is None else epilogue.skip,
        out,
        parts,
        parts if sums is None else sums,
        partial,
        flags,
        b,
        *size,
        panel.shape[-1],
        rows,
        slots,
        outputs,
        *out.stride(),
        p.waves,
        FORM=form,
        TMA_X=tma_x,
        TMA_FILTERS=tma_filters,
        UNIFORM=form in ("rows", "columns"),
        KT_1=kernel[0],
        KH_1=kernel[1],
        KW_1=kernel[2],
        TAPS_2=3 if second else 0,
        SIGN=sign,
        HAS_BIAS=epilogue.bias is not None,
        RELU=epilogue.relu,
        HAS_SKIP=epilogue.skip is not None,
        SUM_TAPS=sum_taps,
        WIDE=wide(out) or panel[0].numel() > INT32,
        PRECISION=precision(panel.dtype),
        BATCH=next_power(b),
        PROGRAMS=next_power(p.programs),
        LEAST=LEAST,
        BT=box.t,
        BH=box.h,
        BW=box.w,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def empty_features(x: Tensor, outputs: int) -> Tensor:
    """``(B, O, T, H, W)``, channels-last."""
    b, _, t, h, w = x.shape
    return x.new_empty(b, t, h, w, outputs).permute(0, 4, 1, 2, 3)


def gated_conv3d(x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    neurons, outputs, channels = spatial.shape[:3]
    out = empty_features(x, outputs)
    if not out.numel():
        return out
    gate, neuron, block_k = gate.contiguous(), neuron.contiguous(), tile_channels(x.dtype)
    width = panel_width(channels, x.dtype, True)
    with on_device(x):
        groups = group_samples(neuron, neurons)
        lists = list_channels(gate, groups, False, block_k)
        panel = pack_features(x, gate, neuron, neurons, lists.plans[:, 5:], lists, width)
        filters = pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
        problem = conv_problem(x, outputs, channels + block_k, 12, 0)
        conv(panel, filters, "listed", lists.plans, out, problem, order=lists.order, rows=channels)
    return out


def gated_conv3d_backward(
    grad: Tensor, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_gate, need_spatial, need_temporal = needs
    if not grad.numel():
        zeros = [torch.zeros_like(t) if need else None for t, need in zip((x, gate, spatial, temporal), needs, strict=True)]
        return tuple(zeros)
    gate_rows, neuron, neurons = gate.contiguous(), neuron.contiguous(), spatial.shape[0]
    with on_device(x):
        groups, rows = group_samples(neuron, neurons), rows_of(grad)
        dx = dgate = dspatial = dtemporal = None
        if need_x or need_gate:
            dx, dgate = data_gradient(rows, x, gate_rows, groups, spatial, temporal, need_x, need_gate)
        if need_spatial or need_temporal:
            dspatial, dtemporal = operator_gradients(rows, x, gate_rows, neuron, groups, spatial, temporal)
    return dx, dgate, dspatial if need_spatial else None, dtemporal if need_temporal else None


def data_gradient(
    rows: Tensor, x: Tensor, gate: Tensor, groups: Groups, spatial: Tensor, temporal: Tensor, need_x: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    b, c, *size = x.shape
    outputs = spatial.shape[1]
    lists = list_channels(gate, groups, False, tile_channels(x.dtype))
    filters = pack_filters([spatial, temporal], groups.neuron_of, x.dtype, True)
    tile = tuning.choose_tile("data_gradient", chip(x.device)[0], tuning.kind_of(x.dtype), tuple(size), c, b)
    box = best_box(tile.m, *size)
    dx = torch.empty_like(x) if need_x else None
    if dx is not None and dx.stride() != x.stride() and need_gate:  # one set of strides serves both
        x = torch.empty_like(dx).copy_(x)
    like = x if dx is None else dx
    boxes = box.tiles(*size)
    parts = x.new_empty((b, boxes, c) if need_gate else (1,), dtype=torch.float32)
    g, tma_grad = boxed(rows, box, tile.k, tile.tma)
    f, tma_filters = described(filters, [1, tile.n, tile.k], tile.tma and need_gate)
    data_gradient_kernel[(b * boxes * cdiv(c, tile.n),)](
        g,
        f,
        lists.order,
        lists.plans,
        gate,
        x,
        like,
        parts,
        *size,
        c,
        outputs,
        *like.stride(),
        LISTED=not need_gate,
        NEED_X=need_x,
        NEED_GATE=need_gate,
        TMA_GRAD=tma_grad,
        TMA_FILTERS=tma_filters,
        WIDE=wide(like) or rows[0].numel() > INT32,
        PRECISION=precision(x.dtype),
        BT=box.t,
        BH=box.h,
        BW=box.w,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dx, parts.sum(1).to(gate.dtype) if need_gate else None


def operator_gradients(
    rows: Tensor, x: Tensor, gate: Tensor, neuron: Tensor, groups: Groups, spatial: Tensor, temporal: Tensor
) -> tuple[Tensor, Tensor]:
    neurons, outputs, channels = spatial.shape[:3]
    block_k = tile_channels(x.dtype)
    lists = list_channels(gate, groups, True, block_k)
    # Rows of a union are slots; a sample's slot stands where a plan has its first number.
    slots = torch.zeros((x.shape[0], PLAN), dtype=torch.int32, device=x.device)
    slots[:, 0] = groups.slots
    panel = pack_features(x, gate, neuron, neurons, slots, lists, panel_width(channels, x.dtype, True))
    found = filter_gradient(
        panel, rows, lists, groups, channels, SPATIAL, True, 1, (groups.neuron_of.shape[0] * 12, channels, outputs),
        spatial.dtype,
    )  # fmt: skip
    return (
        unpack_filters(found, spatial, groups, lists.listed, 1, 0, 12, True),
        unpack_filters(found, temporal, groups, lists.listed, 2, 9, 12, True),
    )


def filter_gradient(
    left: Tensor,
    right: Tensor,
    lists: Lists | None,
    groups: Groups,
    rows: int,
    kernel: tuple[int, int, int],
    second: bool,
    sign: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`.weight_gradient.weight_gradient_kernel` by slot, or into ``out`` by neuron."""
    size = tuple(left.shape[1:4])
    width = right.shape[-1]
    architecture = chip(left.device)[0]
    tile = tuning.choose_tile(
        "weight_gradient", architecture, tuning.kind_of(left.dtype), size, width, left.shape[0]
    )
    box = best_box(tile.k, *size)
    by_neuron = out is not None
    out = torch.empty(shape, dtype=dtype, device=left.device) if out is None else out
    taps = kernel[0] * kernel[1] * kernel[2] + (3 if second else 0)
    lefts, tma_left = boxed(left, box, tile.m, tile.tma)
    rights, tma_right = boxed(right, box, tile.n, tile.tma)
    weight_gradient_kernel[cdiv(rows, tile.m) * cdiv(width, tile.n), taps, groups.neuron_of.shape[0]](
        lefts,
        rights,
        groups.members if lists is None else lists.order,
        groups.members if lists is None else lists.plans,
        groups.neuron_of,
        groups.groups,
        groups.members,
        out,
        *size,
        left.shape[-1],
        width,
        rows,
        KT_1=kernel[0],
        KH_1=kernel[1],
        KW_1=kernel[2],
        TAPS_2=3 if second else 0,
        SIGN=sign,
        UNIFORM=lists is None,
        BY_NEURON=by_neuron,
        TMA_LEFT=tma_left,
        TMA_RIGHT=tma_right,
        WIDE=left[0].numel() > INT32 or right[0].numel() > INT32,
        PRECISION=precision(left.dtype),
        BT=box.t,
        BH=box.h,
        BW=box.w,
        BM=tile.m,
        BN=tile.n,
        BK=tile_channels(left.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def mixing_filters(mixing: Tensor, neuron: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """A mixing kernel ``(matrices, O, O)``, what indexes it by sample, and how many sets of taps it has.

    A 1x1x1 kernel serves as it is stored; of another the chosen neurons' are laid out tap by tap.
    """
    neurons, outputs = mixing.shape[:2]
    if mixing.shape[3:].numel() == 1:
        return mixing.to(dtype).reshape(neurons, outputs, outputs).contiguous(), neuron, neurons
    groups = group_samples(neuron, neurons)
    # A neuron that is out of range gets slot -1, and its samples NaN.
    slots = torch.where((neuron >= 0) & (neuron < neurons), groups.slots, -1)
    return pack_filters([mixing], groups.neuron_of, dtype, False), slots, groups.neuron_of.shape[0]


def mix(z: Tensor, neuron: Tensor, mixing: Tensor, form: str) -> Tensor:
    outputs, kernel = mixing.shape[1], tuple(mixing.shape[3:])
    out, neuron = empty_features(z, outputs), neuron.contiguous()
    if out.numel():
        with on_device(z):
            filters, index, slots = mixing_filters(mixing, neuron, z.dtype)
            taps = kernel[0] * kernel[1] * kernel[2]
            problem = conv_problem(z, outputs, outputs, taps, 0)
            conv(
                rows_of(z), filters, form, index, out, problem,
                kernel=kernel, second=False, sign=1 if form == "rows" else -1, rows=outputs, slots=slots,
            )  # fmt: skip
    return out


def mixing_conv3d(z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
    return mix(z, neuron, mixing, "rows")


def mixing_conv3d_backward(
    grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    dz = mix(grad, neuron, mixing, "columns") if needs[0] else None
    dmixing = None
    if needs[1]:
        neurons, outputs, kernel = mixing.shape[0], mixing.shape[1], tuple(mixing.shape[3:])
        taps = kernel[0] * kernel[1] * kernel[2]
        if not grad.numel():
            return dz, torch.zeros_like(mixing)
        with on_device(z):
            groups = group_samples(neuron.contiguous(), neurons)
            if taps == 1:
                dmixing = torch.zeros(mixing.shape, dtype=mixing.dtype, device=z.device)
                filter_gradient(
                    rows_of(grad), rows_of(z), None, groups, outputs, kernel, False, -1, None, mixing.dtype, dmixing
                )
            else:
                shape = (groups.neuron_of.shape[0] * taps, outputs, outputs)
                found = filter_gradient(
                    rows_of(grad), rows_of(z), None, groups, outputs, kernel, False, -1, shape, mixing.dtype
                )
                dmixing = unpack_filters(found, mixing, groups, None, 3, 0, taps, False)
    return dz, dmixing


def frozen_layer(
    x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, c, t, h, width = x.shape
    neurons, outputs = w.bias.shape
    taps = w.scoring.shape[2]
    y = empty_features(x, outputs) if skip is None else torch.empty_like(skip)
    next_sums = x.new_empty((b, outputs, options.next_taps), dtype=torch.float32)
    neuron = torch.empty(b, dtype=torch.int64, device=x.device)
    scores = x.new_empty((b, neurons), dtype=torch.float32)
    if not b:
        return y, next_sums, neuron, scores
    if skip is not None and skip.stride() != y.stride():
        skip = torch.empty_like(y).copy_(skip)
    folds = w.mixing is None
    block_k = tile_channels(x.dtype)
    with on_device(x):
        parts = partial_tap_sums(x, taps) if sums is None else sums
        panel = x.new_empty(b, t, h, width, panel_width(c, x.dtype, False))
        plan = torch.empty((b, PLAN), dtype=torch.int32, device=x.device)
        problem = conv_problem(x, outputs, c + block_k, 9, options.next_taps if folds else 0)
        flags = torch.empty(problem.flags, dtype=torch.int32, device=x.device)
        lanes = next_power(neurons)
        strides, is_flat = steps_of(x)
        route_and_pack_kernel[gather_grid(b, t * h * width, cdiv(c, block_k), x.device)](
            x,
            parts,
            w.scoring,
            w.channels,
            w.starts,
            panel,
            plan,
            neuron,
            scores,
            flags,
            1 if sums is not None else parts.shape[1],
            taps,
            neurons,
            float(options.score_divisor),
            c,
            t * h * width,
            h,
            width,
            *strides,
            panel.shape[-1],
            problem.flags,
            FLAT=is_flat,
            WIDE=wide(x),
            NEURONS=lanes,
            BC=max(16, min(256, 4096 // lanes)),
            BP=POSITIONS,
            BK=block_k,
        )
        filters = w.filters.view(-1, block_k)
        if folds:
            wanted = next_sums if options.next_taps else None
            last = Epilogue(w.bias, options.relu, skip, wanted, flags)
            conv(panel, filters, "packed", plan, y, problem, epilogue=last)
            return y, next_sums, neuron, scores
        z = empty_features(x, outputs)
        conv(panel, filters, "packed", plan, z, problem, epilogue=Epilogue(flags=flags))
        finish_mixing(z, neuron, scores, skip, y, next_sums, w, options)
    return y, next_sums, neuron, scores


def finish_mixing(
    z: Tensor,
    neuron: Tensor,
    scores: Tensor,
    skip: Tensor | None,
    y: Tensor,
    next_sums: Tensor,
    w: FrozenWeights,
    options: FrozenOptions,
) -> None:
    """A mixing kernel that does not fold: a second convolution, with the epilogue of the layer."""
    outputs, kernel = w.bias.shape[1], tuple(options.mixing_kernel)
    taps = kernel[0] * kernel[1] * kernel[2]
    problem = conv_problem(z, outputs, outputs, taps, options.next_taps)
    # The bias is the same for every neuron: what BatchNorm leaves, which lies behind the mixing.
    last = Epilogue(w.bias, options.relu, skip, next_sums if options.next_taps else None)
    conv(
        rows_of(z), w.mixing.view(-1, outputs, outputs), "rows", neuron, y, problem,
        kernel=kernel, second=False, rows=outputs, slots=w.mixing.shape[0], epilogue=last,
    )  # fmt: skip
