"""Which tile a kernel runs with: a rule, never a search at the first call.

The first of :data:`CANDIDATES` that fits a problem runs. ``python -m benchmarks.gpu.tune`` times them all on a GPU and
says where another one is faster. Every candidate is compiled ahead of time, and checked for correctness, by the tests.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..gpu import grids
from ..gpu.dtypes import DTYPES
from ..gpu.grids import Box, PersistentGrid, cdiv, next_power
from ..packing import TILE_BYTES

KERNELS = ("conv", "data_gradient", "weight_gradient")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
INTERPRETER = "interpreter"
KINDS = {"half": 2, "tf32": 4, "ieee": 4}  # of products, with the bytes of an element
FILTER_TILE = 64  # outputs, and elements of channels and taps, of a program that lays filters out
LIST_CHANNELS = 1024  # of a program that lists channels, at a time
SEMHASH_CHANNELS, SEMHASH_BACKWARD_CHANNELS = 1024, 256  # of a program that works gates out, and their gradient
GATE_CHANNELS = 256  # of a program that adds up parts of gates' gradients


class SumTile(NamedTuple):
    """Channels of a program that sums features, and its warps."""

    channels: int
    warps: int


SUMS = {1: SumTile(64, 4), 9: SumTile(32, 8)}  # by taps


class Tile(NamedTuple):
    """Rows, columns and K block of a tile, and how it is run. A weight gradient's ``k`` is positions."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool  # operands come through tensor descriptors, where they are aligned for it
    per_sm: int = 1  # persistent programs a multiprocessor


def kind_of(dtype: torch.dtype) -> str:
    """``half``, or for float32 ``tf32`` or ``ieee``, as torch's float32 matmul precision says."""
    if DTYPES[dtype].kind == "half":
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def block_k(kind: str) -> int:
    """Channels of a K block."""
    return TILE_BYTES // KINDS[kind]


def _tiles(*rows: tuple[int, ...], tma: bool = False) -> tuple[Tile, ...]:
    return tuple(Tile(*row[:5], tma, *row[5:]) for row in rows)


# Every tile that ships, the one to take first: rows, columns, K block, warps, stages, and programs a multiprocessor
# where more than one. None spills a register at the paper's shapes, which is what decided between neighbours;
# docs/log/h100.md.
CANDIDATES = {
    "half": {
        "sm_80": {
            "conv": _tiles((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 8, 3)),
            "data_gradient": _tiles((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3)),
            "weight_gradient": _tiles((128, 128, 32, 8, 4), (64, 64, 32, 4, 3)),
        },
        "sm_90": {
            "conv": _tiles(
                (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4, 2), (64, 64, 64, 4, 4, 2), tma=True
            ),
            "data_gradient": _tiles((128, 128, 64, 8, 4), (128, 64, 64, 8, 4), (64, 64, 64, 4, 4), tma=True),
            "weight_gradient": _tiles((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (64, 64, 64, 4, 4), tma=True),
        },
        "sm_100": {
            "conv": _tiles((128, 128, 64, 8, 4), tma=True),
            "data_gradient": _tiles((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), tma=True),
            "weight_gradient": _tiles((128, 128, 64, 8, 4), (64, 64, 64, 4, 4), tma=True),
        },
    },
    "tf32": {
        "sm_80": {
            "conv": _tiles((128, 128, 32, 8, 3), (64, 64, 32, 4, 3, 2)),
            "data_gradient": _tiles((128, 64, 32, 8, 3), (64, 64, 32, 4, 3)),
            "weight_gradient": _tiles((128, 64, 32, 8, 3)),
        },
        "sm_90": {
            "conv": _tiles((128, 128, 32, 8, 3), (64, 64, 32, 4, 3, 2), tma=True),
            "data_gradient": _tiles((128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 3), tma=True),
            "weight_gradient": _tiles((128, 128, 32, 8, 3), (64, 64, 32, 4, 3), tma=True),
        },
        "sm_100": {
            "conv": _tiles((128, 128, 32, 8, 3), tma=True),
            "data_gradient": _tiles((128, 128, 32, 8, 3), (64, 64, 32, 4, 3), tma=True),
            "weight_gradient": _tiles((128, 64, 32, 4, 3), tma=True),
        },
    },
    # Without matrix instructions, and without descriptors, which spill there.
    "ieee": {
        "sm_80": {
            "conv": _tiles((128, 64, 32, 8, 3)),
            "data_gradient": _tiles((64, 64, 32, 4, 3)),
            "weight_gradient": _tiles((128, 64, 32, 8, 3)),
        },
        "sm_90": {
            "conv": _tiles((64, 64, 32, 4, 3, 2)),
            "data_gradient": _tiles((64, 64, 32, 4, 3)),
            "weight_gradient": _tiles((64, 64, 32, 4, 3)),
        },
        "sm_100": {
            "conv": _tiles((128, 64, 32, 8, 3)),
            "data_gradient": _tiles((64, 64, 32, 4, 3)),
            "weight_gradient": _tiles((64, 64, 32, 8, 3)),
        },
    },
}
# Small enough to watch: the interpreter runs them in plain NumPy.
INTERPRETED = {
    "conv": (Tile(32, 32, 0, 4, 1, True), Tile(16, 64, 0, 4, 1, False)),
    "data_gradient": (Tile(32, 32, 0, 4, 1, True), Tile(16, 16, 0, 4, 1, False)),
    "weight_gradient": (Tile(32, 32, 32, 4, 1, True), Tile(32, 16, 16, 4, 1, False)),
}


SIDES, WARPS, STAGES = (16, 32, 64, 128, 256), (4, 8), (1, 2, 3, 4)
ACCUMULATORS = {"conv": 1, "data_gradient": 2, "weight_gradient": 1}
ACCUMULATOR_REGISTERS = 128  # of a thread, at most
SMEM_KIB = {"sm_80": 100, "sm_90": 228, "sm_100": 228}  # of a multiprocessor, the least of a family: 8.6 and 8.9


def check_tile(kernel: str, architecture: str, kind: str, tile: Tile) -> None:
    """Refuse a tile that ``kernel`` cannot run.

    Raises:
        ValueError: a side that is no power of two or too large for a tensor descriptor, warps or stages that nobody
            tried, another K block than filters are packed in, more accumulators than registers, more operands than
            shared memory, descriptors before compute capability 9.0.
    """
    for name, got, wanted in (
        *(("side", side, SIDES) for side in tile[:3]),
        ("warps", tile.warps, WARPS),
        ("stages", tile.stages, STAGES),
        ("k", tile.k, SIDES if kernel == "weight_gradient" else (block_k(kind),)),
        ("tma", tile.tma, (False,) if architecture == "sm_80" else (False, True)),
    ):
        if got not in wanted:
            raise ValueError(f"{kernel} {kind} {architecture}: got {tile} with {name} {got}, wanted one of {wanted}")
    if tile.per_sm < 1:
        raise ValueError(f"{kernel} {kind} {architecture}: got {tile} with per_sm {tile.per_sm}, wanted at least 1")
    registers = ACCUMULATORS[kernel] * tile.m * tile.n // (32 * tile.warps)
    if registers > ACCUMULATOR_REGISTERS:
        raise ValueError(
            f"{kernel} {kind} {architecture}: got {tile} with {registers} accumulators a thread, wanted at most "
            f"{ACCUMULATOR_REGISTERS}"
        )
    kib = tile.stages * (tile.m + tile.n) * tile.k * KINDS[kind] // 1024
    if kib > SMEM_KIB.get(architecture, kib):
        raise ValueError(
            f"{kernel} {kind} {architecture}: got {tile} with operands of {kib} KiB, wanted at most "
            f"{SMEM_KIB[architecture]}"
        )


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(**tiles: Tile) -> Iterator[None]:
    """Run kernels with these tiles, ``forced(conv=Tile(...))``, whatever fits: for tests and benchmarks."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def is_forced(kernel: str) -> bool:
    """Whether :func:`forced` names the kernel's tile."""
    return kernel in _forced


def any_forced() -> bool:
    """Whether :func:`forced` names any."""
    return bool(_forced)


def architecture_of(capability: tuple[int, int]) -> str:
    """The family whose tiles a device of this compute capability runs."""
    return "sm_100" if capability[0] >= 10 else "sm_90" if capability[0] == 9 else "sm_80"


def candidates(kernel: str, architecture: str, kind: str) -> tuple[Tile, ...]:
    """The tiles that ``kernel`` may run with, the one to take first."""
    if architecture == INTERPRETER:
        tiles = INTERPRETED[kernel]
        return tiles if kernel == "weight_gradient" else tuple(tile._replace(k=block_k(kind)) for tile in tiles)
    return CANDIDATES[kind][architecture][kernel]


def check_candidates() -> None:
    """:func:`check_tile` of every tile that ships."""
    for cell in itertools.product(KERNELS, (*ARCHITECTURES, INTERPRETER), KINDS):
        for tile in candidates(*cell):
            check_tile(*cell, tile)


check_candidates()


def choose_tile(
    kernel: str, architecture: str, kind: str, size: tuple[int, int, int], columns: int, small: bool = False
) -> Tile:
    """The tile of a problem. ``small`` wants at most 128 columns, for an epilogue that needs the registers."""
    if kernel in _forced:
        return _forced[kernel]
    fitting = [tile for tile in candidates(kernel, architecture, kind) if not (small and tile.n > 128)]
    positions = size[0] * size[1] * size[2]
    for tile in fitting:
        rows = tile.m if kernel != "weight_gradient" else 0
        if tile.n <= next_power(max(columns, 16)) and rows <= next_power(max(positions, 64)):
            return tile
    return fitting[-1]


class ConvGrid(NamedTuple):
    """A convolution's tile and grid, known before its operands are."""

    tile: Tile
    box: Box
    persistent: PersistentGrid

    @property
    def arrival_counters(self) -> int:
        return self.persistent.arrival_counters


def conv_grid(
    architecture: str,
    processors: int,
    kind: str,
    batch: int,
    size: tuple[int, int, int],
    outputs: int,
    width: int,
    taps: int,
    sum_taps: int,
) -> ConvGrid:
    """Of a convolution over at most ``width`` columns of a panel, by ``taps``, and ``sum_taps`` sums of its result."""
    tile = choose_tile("conv", architecture, kind, size, outputs, small=sum_taps == 9)
    return grid_of(tile, processors, batch, size, outputs, cdiv(width, tile.k) * taps)


@functools.lru_cache(maxsize=1024)  # every launch asks
def grid_of(
    tile: Tile, processors: int, batch: int, size: tuple[int, int, int], outputs: int, k_blocks: int
) -> ConvGrid:
    """Of ``k_blocks`` a tile at most."""
    box = grids.best_box(tile.m, *size)
    tiles = grids.box_tiles(box, size, outputs, tile.n)
    return ConvGrid(tile, box, grids.persistent_grid(batch, tiles, k_blocks, processors, tile.per_sm))


def filter_tiles(outputs: int, channels: int, taps: int) -> int:
    """Programs that lay out one neuron's filters of one kernel."""
    return cdiv(outputs, FILTER_TILE) * cdiv(channels * taps, FILTER_TILE)


def semhash_channels(channels: int, backward: bool = False) -> int:
    """Channels of a program."""
    return min(SEMHASH_BACKWARD_CHANNELS if backward else SEMHASH_CHANNELS, next_power(channels))


def gate_channels(channels: int) -> int:
    """Channels of a program that adds up parts of gates' gradients."""
    return min(GATE_CHANNELS, next_power(channels))


def score_channels(neurons: int) -> int:
    """Channels (times taps) of which a program adds up scores at a time; ``neurons`` is a power of two."""
    return max(16, min(256, 4096 // neurons))


def route_channels(neurons: int) -> int:
    """Channels (times taps) of a program that works out the gradients of a routing; ``neurons`` is a power of two."""
    return max(16, min(32, 2048 // neurons))


def samples_at_once(batch: int, neurons: int) -> int:
    """Samples that a program which groups them looks at, at a time; ``neurons`` is a power of two."""
    return max(1, min(next_power(batch), 4096 // neurons))
