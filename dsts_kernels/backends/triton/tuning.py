"""Which tile a kernel runs with: what was measured on this architecture, else a rule, never a search at the first call.

``tuned/<architecture>.json`` maps a grid (:func:`grid`) to the index of a candidate; ``python -m
benchmarks.gpu.tune`` measures and writes it on a GPU. Where a grid was not measured, the first candidate that fits it
runs. Every candidate is compiled ahead of time, and checked for correctness, by the tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .boxes import next_power

KERNELS = ("conv", "data_gradient", "weight_gradient")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
INTERPRETER = "interpreter"
GATHER_POSITIONS = 64  # of a program that gathers
FILTER_TILE = 64  # outputs, and elements of channels and taps, of a program that lays filters out
LEAST_BLOCKS = 8  # K blocks: what a program of a shared tile takes at least
TUNED = Path(__file__).parent / "tuned"


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
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _tiles(*rows: tuple[int, ...], tma: bool = False) -> tuple[Tile, ...]:
    return tuple(Tile(*row[:5], tma, *row[5:]) for row in rows)


# Every tile that ships, best guess first: rows, columns, K block, warps, stages, and programs a multiprocessor where
# more than one. None spills a register at the paper's shapes, which is what decided between neighbours;
# docs/performance.md.
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

_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(**tiles: Tile) -> Iterator[None]:
    """Run kernels with these tiles, ``forced(conv=Tile(...))``, whatever was measured: for tests and tuning."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def architecture_of(capability: tuple[int, int]) -> str:
    """The family whose tiles a device of this compute capability runs."""
    return "sm_100" if capability[0] >= 10 else "sm_90" if capability[0] == 9 else "sm_80"


def candidates(kernel: str, architecture: str, kind: str) -> tuple[Tile, ...]:
    if architecture == INTERPRETER:
        k = 64 if kind == "half" else 32
        return tuple(t if kernel == "weight_gradient" else t._replace(k=k) for t in INTERPRETED[kernel])
    return CANDIDATES[kind][architecture][kernel]


def grid(kernel: str, kind: str, size: tuple[int, int, int], columns: int, batch: int) -> str:
    """A grid's name in a tuned file: positions, columns of the result and batch."""
    return f"{kernel} {kind} {'x'.join(map(str, size))} {columns} b{batch}"


@functools.cache
def measured(architecture: str) -> dict[str, int]:
    """What ``benchmarks.gpu.tune`` found best on this architecture; empty where it never ran."""
    path = TUNED / f"{architecture}.json"
    return json.loads(path.read_text())["tiles"] if path.exists() else {}


def choose_tile(
    kernel: str, architecture: str, kind: str, size: tuple[int, int, int], columns: int, batch: int, small: bool = False
) -> Tile:
    """The tile of a grid. ``small`` wants at most 128 columns, for an epilogue that needs the registers."""
    if kernel in _forced:
        return _forced[kernel]
    every = candidates(kernel, architecture, kind)
    fitting = [tile for tile in every if not (small and tile.n > 128)]
    index = measured(architecture).get(grid(kernel, kind, size, columns, batch), -1)
    if 0 <= index < len(every) and every[index] in fitting:
        return every[index]
    positions = size[0] * size[1] * size[2]
    for tile in fitting:
        rows = tile.m if kernel != "weight_gradient" else 0
        if tile.n <= next_power(max(columns, 16)) and rows <= next_power(max(positions, 64)):
            return tile
    return fitting[-1]
