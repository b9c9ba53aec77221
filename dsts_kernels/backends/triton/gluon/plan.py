"""Where the Gluon kernels run, with which tiles, and how these are dealt out: plain integers, without triton.

Every CTA takes whole tiles in turn; none is shared (no stream-K), so nothing goes through memory but the result. That
is right where the waves are nearly full, and where they are not the older kernel runs, which shares tiles.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch

from ...gpu import grids, switches
from ...gpu.dtypes import DTYPES
from ...gpu.grids import Box, Tiles, cdiv, next_power
from ...packing import TILE_BYTES

CAPABILITY = (9, 0)  # wgmma is Hopper's alone
ARCHITECTURE = "sm_90"
PART = 64  # outputs of a tile that are ended at a time, for registers' sake
GRADIENT_PART = 32  # channels of a data gradient's tile, likewise: it has three operands
CONSUMER_WARPS = 8
PRODUCER_WARPS, PRODUCER_REGISTERS = 1, 40
# How full waves must be. A step of this kernel is predicted at 0.80 us where the older one's takes 0.90, and a launch
# of that takes 34 us beside its steps (docs/log/gluon.md): at Swin-B's 85% both predictions still favour this one.
LEAST_FILL = 0.8
# A tile's steps and its end, in steps of the largest tile: predicted, to choose between tiles by.
STEP_COST, END_COST = {256: 1.0, 128: 0.55}, {256: 8.0, 128: 4.0}


class WaveTile(NamedTuple):
    """Positions and outputs of a tile, channels of a K block, and K blocks in shared memory at once."""

    m: int
    n: int
    k: int
    stages: int


HALF_K = TILE_BYTES // 2
TILES = (WaveTile(128, 256, HALF_K, 4), WaveTile(128, 128, HALF_K, 6))

WEIGHT_TILES = (WaveTile(128, 256, 64, 4), WaveTile(128, 128, 64, 6))  # channels, outputs, positions of a step


class WaveGrid(NamedTuple):
    """The grid of a convolution in whole waves; it stands in for a :class:`..tuning.ConvGrid`."""

    tile: WaveTile
    box: Box
    tiles: Tiles  # of a sample
    batch: int
    ctas: int

    @property
    def arrival_counters(self) -> int:
        """One for every sample and column of tiles: boxes whose tap sums are there."""
        return self.batch * self.tiles.across

    @property
    def waves(self) -> int:
        return cdiv(self.batch * self.tiles.per_sample, self.ctas)


@functools.cache
def has_gluon() -> bool:
    """Whether triton brings it; found out without importing it."""
    try:
        return importlib.util.find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:
        return False


def unfit(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why no kernel here can run on such a GPU; ``None`` where they can."""
    if capability != CAPABILITY:
        wanted, got = (".".join(map(str, one)) for one in (CAPABILITY, capability))
        return f"it needs compute capability {wanted}, this GPU has {got}"
    if DTYPES[dtype].kind != "half":
        return f"it multiplies half types, not {dtype}"
    if not has_gluon():
        return "this triton has no triton.experimental.gluon"
    return None


def why_not(capability: tuple[int, int], dtype: torch.dtype, switch: str = "gluon_conv") -> str | None:
    """Why a kernel does not run; ``None`` where it does, if its waves are full enough."""
    if (reason := unfit(capability, dtype)) is not None:
        return reason
    if not getattr(switches.current(), switch):
        return f"its switch {switch} is off"
    return None


@functools.lru_cache(maxsize=1024)  # every launch asks
def wave_grid(processors: int, batch: int, size: tuple[int, int, int], outputs: int, k_blocks: int) -> WaveGrid | None:
    """The grid that should take least time, of ``k_blocks`` a tile; ``None`` where no waves are full enough."""
    positions, found = size[0] * size[1] * size[2], []
    for tile in TILES:
        if tile.n > next_power(max(outputs, 16)) or tile.m > next_power(positions):
            continue
        box = grids.best_box(tile.m, *size)
        tiles = grids.box_tiles(box, size, outputs, tile.n)
        grid = WaveGrid(tile, box, tiles, batch, min(processors, batch * tiles.per_sample))
        if grid.batch * tiles.per_sample >= LEAST_FILL * grid.waves * processors:
            found.append(grid)
    return min(found, key=lambda g: g.waves * (k_blocks * STEP_COST[g.tile.n] + END_COST[g.tile.n]), default=None)


def weight_tile(channels: int, outputs: int, positions: int) -> WaveTile | None:
    """The tile of a filter gradient, the first that fits; ``None`` where none does.

    How many tiles there are, only the device knows. The older kernel's tiles are as large, and as many fill a wave.
    """
    for tile in WEIGHT_TILES:
        sides = zip((tile.m, tile.n, tile.k), (channels, outputs, positions), strict=True)
        if all(side <= next_power(max(count, 16)) for side, count in sides):
            return tile
    return None
