"""Launcher of ``csrc/cuda/conv.cu``: a panel's convolution, each sample with its own filters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import DTYPE_CODES
from ..gpu import grids
from ..gpu.features import SPATIAL
from ..gpu.grids import PersistentGrid, cdiv
from ..gpu.kernels import PLAIN, ConvEpilogue
from ..packing import tile_channels
from . import launch
from .launch import address, padded, resident, uses_tf32, vector


def conv_grid(x: Tensor, outputs: int, width: int, taps: int, sum_taps: int, packed: bool = False) -> PersistentGrid:
    tiles = grids.flat_tiles(x.shape[2:].numel(), outputs)
    k_blocks = cdiv(width, tile_channels(x.dtype)) * taps
    processors = launch.chip(x.device).processors
    return grids.persistent_grid(x.shape[0], tiles, k_blocks, processors, resident(x), grids.MAX_CTAS)


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
    grid: PersistentGrid,
    *,
    kernel: tuple[int, int, int] = SPATIAL,
    with_temporal: bool = True,
    sign: int = 1,
    order: Tensor | None = None,
    k_channels: int = 0,
    slots: int = 0,
    epilogue: ConvEpilogue = PLAIN,
) -> None:
    b, outputs, *size = out.shape
    planned, width = form in ("packed", "listed"), panel.shape[-1]
    if form != "packed":
        filters = padded(filters)
    if not planned:
        panel = padded(panel)
    sums = epilogue.sums
    sum_taps = 0 if sums is None else sums.shape[2]
    tiles = grids.flat_tiles(math.prod(size), outputs)
    tile_sums = panel.new_empty((b, tiles.along, outputs, sum_taps), dtype=torch.float32) if sum_taps else None
    counters = epilogue.arrival_counters
    if counters is None:
        counters = panel.new_zeros(grid.arrival_counters, dtype=torch.int32)
    workspace = panel.new_empty(2 * grid.num_ctas * grids.TILE * grids.TILE, dtype=torch.float32)
    launch.native().conv(
        panel=address(panel),  # [B, T, H, W, pitch]
        filters=address(filters),  # by form: see csrc/cuda/conv.cu
        order=address(order),  # [lists, k_channels]
        plan=address(plan) if planned else 0,  # [B] plans
        index=0 if planned else address(plan),  # [B]
        bias=address(epilogue.bias),  # [N, O]
        skip=address(epilogue.skip),  # [B, O, T, H, W]
        out=address(out),  # [B, O, T, H, W]
        tile_sums=address(tile_sums),  # [B, tiles along positions, O, sum_taps]
        sums=address(sums) if sum_taps else 0,  # [B, O, sum_taps]
        workspace=address(workspace),  # [2 * num_ctas, TILE * TILE]
        arrival_counters=address(counters),
        size=size,
        out_strides=out.stride(),
        batch=b,
        width=width,
        pitch=panel.shape[-1],
        k_channels=k_channels,
        slots=slots,
        outputs=outputs,
        filter_pitch=filters.shape[-1],
        kernel=kernel,
        with_temporal=with_temporal,
        sign=sign,
        form=form,
        index_64=plan.dtype == torch.int64,
        relu=epilogue.relu,
        sum_taps=sum_taps,
        num_ctas=grid.num_ctas,
        waves=grid.waves,
        idle_percent=grids.cuda_idle_percent(launch.chip(out.device).capability),
        vector_out=vector_rows(out, epilogue.skip),
        dtype=DTYPE_CODES[out.dtype],
        tf32=uses_tf32(out),
        target=launch.target(out),
    )
