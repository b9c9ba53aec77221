"""Boxes and the choice of tiles: plain Python, without a GPU and without the interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsts_kernels.backends.gpu.grids import Box, best_box, cdiv, next_power
from dsts_kernels.backends.gpu.lists import Plan
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.backends.triton import tuning
from dsts_kernels.backends.triton.tuning import ARCHITECTURES, CANDIDATES, INTERPRETER, KERNELS, Tile

KINDS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
SIZES = [(8, 16, 16), (16, 7, 7), (1, 1, 1), (3, 5, 4), (1, 1, 300), (600, 1, 1), (1, 56, 56), (2, 13, 9), (5, 3, 2)]
everywhere = pytest.mark.parametrize(
    "kind, architecture, kernel", list(itertools.product(CANDIDATES, (*ARCHITECTURES, INTERPRETER), KERNELS))
)


def test_rounding():
    """Quotients rounded up, powers of two rounded up."""
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("positions", [16, 32, 64, 128, 256])
def test_best_box(positions, size):
    """Sides are powers of two that a descriptor can load, and no other box covers the features with fewer tiles."""
    box = best_box(positions, *size)
    assert box.t * box.h * box.w == positions
    assert all(side == next_power(side) <= 256 for side in box)
    sides = [1 << i for i in range(9)]
    others = [Box(*s) for s in itertools.product(sides, repeat=3) if s[0] * s[1] * s[2] == positions]
    assert box.tiles(*size) == min(other.tiles(*size) for other in others)
    assert box.tiles(*size) * positions >= size[0] * size[1] * size[2]


def test_best_box_is_wide():
    """Among equals the widest, for neighbours in memory to stay in one tile, and no side beyond 256."""
    assert best_box(128, 8, 16, 16) == Box(1, 8, 16) and best_box(64, 4, 4, 4) == Box(4, 4, 4)
    assert best_box(512, 1, 1, 9999) == Box(1, 2, 256) and best_box(16, 2, 8, 8) == Box(1, 2, 8)


@everywhere
def test_candidates_are_well_formed(kind, architecture, kernel):
    """Different tiles, in the K block that filters are packed in, all of which the table's own check lets pass."""
    tiles = tuning.candidates(kernel, architecture, kind)
    assert tiles and len(set(tiles)) == len(tiles) and tuning.block_k(kind) == tile_channels(KINDS[kind])
    for tile in tiles:
        tuning.check_tile(kernel, architecture, kind, tile)


GOOD = Tile(128, 128, 64, 8, 4, True)
BAD = {
    "side-not-a-power": GOOD._replace(n=96),
    "side-too-small": GOOD._replace(m=8),
    "side-too-large": GOOD._replace(m=512),
    "warps": GOOD._replace(warps=2),
    "stages": GOOD._replace(stages=0),
    "k-block": GOOD._replace(k=32),
    "accumulators": GOOD._replace(m=256, n=256),
    "programs": GOOD._replace(per_sm=0),
}


def test_operands_fit_shared_memory():
    """Of the smallest chip of a family: 128 by 256 in four stages is for Hopper."""
    tile = Tile(128, 256, 64, 8, 4, False)
    tuning.check_tile("conv", "sm_90", "half", tile)
    with pytest.raises(ValueError, match="operands of 192 KiB, wanted at most 100"):
        tuning.check_tile("conv", "sm_80", "half", tile)


@pytest.mark.parametrize("tile", BAD.values(), ids=BAD)
def test_a_bad_tile_is_refused(tile, monkeypatch):
    """By name, when the table is read."""
    tuning.check_tile("conv", "sm_90", "half", GOOD)
    with pytest.raises(ValueError, match=r"conv half sm_90: got Tile.*wanted"):
        tuning.check_tile("conv", "sm_90", "half", tile)
    monkeypatch.setitem(CANDIDATES["half"]["sm_90"], "conv", (GOOD, tile))
    with pytest.raises(ValueError, match="conv half sm_90"):
        tuning.check_candidates()


def test_descriptors_are_for_hopper_and_later():
    with pytest.raises(ValueError, match="tma"):
        tuning.check_tile("conv", "sm_80", "half", GOOD)


@everywhere
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_tile_for_every_problem(kind, architecture, kernel, size):
    """The first candidate no larger than the problem, else the last; a large epilogue gets at most 128 columns."""
    tiles = tuning.candidates(kernel, architecture, kind)
    for columns, small in itertools.product((1, 24, 64, 256, 1024), (False, True)):
        tile = tuning.choose_tile(kernel, architecture, kind, size, columns, small)
        assert tile in tiles and not (small and tile.n > 128)
    assert tuning.choose_tile(kernel, architecture, kind, (64, 64, 64), 1024) == tiles[0]
    assert tuning.choose_tile(kernel, architecture, kind, (1, 1, 1), 1) == tiles[-1] or tiles[-1].n > 16


def test_an_epilogue_of_nine_sums_gets_the_next_tile():
    """The first candidate of 256 columns is passed over where the epilogue needs the registers."""
    shipped = CANDIDATES["half"]["sm_90"]["conv"]
    assert tuning.choose_tile("conv", "sm_90", "half", (8, 16, 16), 1024) == shipped[0] and shipped[0].n == 256
    assert tuning.choose_tile("conv", "sm_90", "half", (8, 16, 16), 1024, small=True) == shipped[1]


def test_forced_tiles():
    """A forced tile wins over everything within its block, nests, and is forgotten after an error."""
    arguments = ("sm_90", "half", (8, 16, 16), 1024)
    one, two = Tile(16, 16, 64, 4, 1, False), Tile(32, 16, 64, 4, 1, False)
    before = {kernel: tuning.choose_tile(kernel, *arguments) for kernel in KERNELS}
    with pytest.raises(ZeroDivisionError), tuning.forced(conv=one):
        with tuning.forced(conv=two, data_gradient=one):
            assert tuning.choose_tile("conv", *arguments, small=True) == two
            assert tuning.choose_tile("data_gradient", *arguments) == one
        assert tuning.choose_tile("conv", *arguments) == one
        assert tuning.choose_tile("data_gradient", *arguments) == before["data_gradient"]
        raise ZeroDivisionError
    assert {kernel: tuning.choose_tile(kernel, *arguments) for kernel in KERNELS} == before


@pytest.mark.parametrize("precision, kind", [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_kinds(precision, kind):
    """float32 honours torch's matmul precision; half types do not ask."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert tuning.kind_of(torch.float32) == kind
        assert tuning.kind_of(torch.bfloat16) == tuning.kind_of(torch.float16) == "half"
    finally:
        torch.set_float32_matmul_precision(before)


def test_architectures():
    """The family of a device."""
    for capability, name in (((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100")):
        assert tuning.architecture_of(capability) == name


def test_fields_of_plans_lie_where_their_record_says():
    pytest.importorskip("triton")
    from dsts_kernels.backends.triton import common

    at = common.plan_at.fn
    assert [at(0, 0, name) for name in Plan._fields] == list(range(len(Plan._fields)))
    assert at(0, 1, Plan._fields[0]) == len(Plan._fields) == common.PLAN.value
