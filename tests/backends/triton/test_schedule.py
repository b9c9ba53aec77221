"""Stream-K in the interpreter: who computes what, and that how a chip shares the work changes nothing but rounding."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.gpu.grids import best_box, cdiv, next_power
from dsts_kernels.backends.gpu.lists import Plan
from dsts_kernels.ops.frozen_layer import frozen_layer
from dsts_kernels.testing import assert_close

from ...support.inputs import TILES, gated_inputs
from ...support.oracles import literal_gated, wide
from ...support.stand_ins import BACKEND
from .support import MODULES, interpreted, spy_on, tl, triton

pytestmark = interpreted
schedule = MODULES["schedule"]
iteration_ranges, shared_iterations, tile_of = schedule.iteration_ranges, schedule.shared_iterations, schedule.tile_of
dealt_waves = schedule.dealt_waves
CHIPS = (1, 2, 3, 5, 7, 13)


@triton.jit
def schedule_kernel(
    plan, begin, end, tiles, dealt, batch, per_sample, waves, width,
    UNIFORM: tl.constexpr, SPATIAL_TAPS: tl.constexpr, TEMPORAL_TAPS: tl.constexpr, BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr, MIN_K_BLOCKS: tl.constexpr, IDLE_PERCENT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Every program writes its waves, all ranges, and the tiles at both ends of its own with the iterations they start
    at."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    waves = dealt_waves(
        plan, batch, per_sample, waves, programs, width,
        UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, PROGRAMS, IDLE_PERCENT, BK,
    )  # fmt: skip
    tl.store(dealt + pid, waves)
    starts, stops = iteration_ranges(
        plan, batch, per_sample, waves, programs, width,
        UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, PROGRAMS, MIN_K_BLOCKS, BK,
    )  # fmt: skip
    q = tl.arange(0, PROGRAMS)
    tl.store(begin + q, starts, mask=q < programs)
    tl.store(end + q, stops, mask=q < programs)
    lengths, first, iterations, until = shared_iterations(
        plan, batch, per_sample, waves * programs, width, UNIFORM, SPATIAL_TAPS, TEMPORAL_TAPS, BATCH, BK
    )
    own = tl.sum(tl.where(q == pid, starts, 0), 0)
    last = tl.sum(tl.where(q == pid, stops, 0), 0) - 1
    tile, start = tile_of(own, lengths, first, iterations, until, batch, BATCH)
    tl.store(tiles + pid * 4, tile)
    tl.store(tiles + pid * 4 + 1, start)
    tile, start = tile_of(last, lengths, first, iterations, until, batch, BATCH)
    tl.store(tiles + pid * 4 + 2, tile)
    tl.store(tiles + pid * 4 + 3, start)


def dealt_out(
    blocks: list[tuple[int, int]], per_sample: int, programs: int, idle: int, uniform: bool = False
) -> tuple[list[tuple[int, int]], torch.Tensor, list[int], int]:
    """Ranges of every program, its tiles ``(programs, 4)``, the length of every tile, and whole waves."""
    batch = len(blocks)
    empty = Plan(0, 0, 0, 0, 0, 0)
    plan = torch.tensor([empty._replace(spatial_blocks=one, temporal_blocks=two) for one, two in blocks]).int()
    begin, end = torch.empty(programs, dtype=torch.int32), torch.empty(programs, dtype=torch.int32)
    tiles, dealt = torch.empty(programs, 4, dtype=torch.int32), torch.empty(programs, dtype=torch.int32)
    schedule_kernel[(programs,)](
        plan, begin, end, tiles, dealt, batch, per_sample, grids.whole_waves(batch * per_sample, programs), 5 * 32,
        UNIFORM=uniform, SPATIAL_TAPS=9, TEMPORAL_TAPS=0 if uniform else 3, BATCH=next_power(batch),
        PROGRAMS=next_power(programs), MIN_K_BLOCKS=grids.MIN_K_BLOCKS, IDLE_PERCENT=idle, BK=32,
    )  # fmt: skip
    (waves,) = set(dealt.tolist())  # all programs decide alike
    lengths = [5 * 9 if uniform else 9 * one + 3 * two for one, two in blocks for _ in range(per_sample)]
    return list(zip(begin.tolist(), end.tolist(), strict=True)), tiles, lengths, waves


BATCHES = {
    "equal": [(2, 2)] * 4,
    "unequal": [(16, 0), (0, 1), (1, 1), (0, 16), (8, 9)],
    "one": [(3, 4)],
    "short": [(0, 1), (0, 1)],
    "many": [(i % 5, 1 + i * 3 % 7) for i in range(9)],
}


@pytest.mark.parametrize("uniform", [False, True], ids=["lists", "uniform"])
@pytest.mark.parametrize("blocks", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("per_sample, programs", [(1, 1), (1, 7), (3, 2), (4, 5), (9, 13), (6, 3), (5, 11)])
@pytest.mark.parametrize("idle", [grids.IDLE_PERCENT, grids.ALWAYS_SHARE], ids=["whole", "shared"])
def test_iteration_ranges(blocks, per_sample, programs, uniform, idle):
    """What waves leave over is covered once and in order, as grids say; programs end together; no range is short."""
    ranges, tiles, lengths, waves = dealt_out(blocks, per_sample, programs, idle, uniform)
    assert waves == grids.dealt_waves(lengths[::per_sample], per_sample, programs, idle)
    assert ranges == grids.iteration_ranges(lengths[::per_sample], per_sample, programs, idle)
    if waves * programs >= len(lengths):
        busiest, mean_tile = max(sum(lengths[q::programs]) for q in range(programs)), sum(lengths) / len(lengths)
        assert idle != grids.ALWAYS_SHARE
        assert busiest <= sum(lengths) / programs + idle / 100 * mean_tile
        assert ranges == [(0, 0)] * programs
        return
    shared = sum(lengths[waves * programs :])
    assert ranges[0][0] == 0 and max(stop for _, stop in ranges) == shared
    assert all(start <= stop for start, stop in ranges)
    assert all(ranges[i][1] == ranges[i + 1][0] for i in range(programs - 1))
    taken = [stop - start for start, stop in ranges]
    if waves == 0:
        assert all(own >= min(8, shared) for own in taken if own)
        assert max(taken) - min(own for own in taken if own) <= 1
    else:
        dealt = [sum(lengths[q + wave * programs] for wave in range(waves)) for q in range(programs)]
        mean = sum(lengths) / programs
        if uniform or max(dealt) <= mean:
            ends = [before + own for before, own in zip(dealt, taken, strict=True)]
            assert max(ends) - min(ends) <= 3
        assert all(own <= 1 for before, own in zip(dealt, taken, strict=True) if not uniform and before > mean + 1)
    starts = torch.tensor([0, *lengths[waves * programs :]]).cumsum(0)
    for (start, stop), found in zip(ranges, tiles.tolist(), strict=True):
        for iteration, tile, first in ((start, *found[:2]), (stop - 1, *found[2:])):
            if start < stop:
                index = int((starts <= iteration).sum()) - 1
                assert (tile, first) == (waves * programs + index, int(starts[index]))


@pytest.mark.parametrize("least", [1, 8, 1000])
def test_the_least_a_program_takes(least, min_k_blocks):
    """No range is shorter than that, and where all the work is shorter one program takes it."""
    min_k_blocks(least)
    ranges, _, lengths, waves = dealt_out([(3, 4)], 1, 13, grids.ALWAYS_SHARE)
    assert waves == 0
    taken = [stop - start for start, stop in ranges if start < stop]
    assert sum(taken) == sum(lengths) == 39
    assert len(taken) == max(1, min(13, 39 // least)) and min(taken) >= min(least, 39)


def test_gated_convolution_on_any_chip(multiprocessors, monkeypatch, in_any_order):
    """Very unequal lists, by 1 to 13 multiprocessors: equal to rounding, and again bit for bit in another order."""
    inputs = gated_inputs(4, 40, 24, TILES, neuron=[1, 0, 1, 2])
    inputs[1][0], inputs[1][1], inputs[1][2], inputs[1][3] = 1, 0, 0.5, torch.cat([torch.ones(1), torch.zeros(39)])
    ref, spy, found = literal_gated(*wide(inputs)), spy_on(monkeypatch, "conv_kernel"), {}
    for count in CHIPS:
        multiprocessors(count)
        found[count] = BACKEND.gated_conv3d(*inputs)
        assert_close(found[count], ref, name=f"{count} multiprocessors")
    assert [grid[0] for grid, _ in spy.launches] == list(CHIPS)
    assert sum(not torch.equal(found[1], out) for out in found.values()) > 0, "no tile was ever split"
    in_any_order()
    for count in (3, 13):
        multiprocessors(count)
        assert torch.equal(BACKEND.gated_conv3d(*inputs), found[count])


@pytest.mark.parametrize("batch, size", [(1, (1, 3, 3)), (2, (1, 5, 3))], ids=str)
def test_small_batches_are_split(batch, size, multiprocessors, min_k_blocks, monkeypatch, in_any_order):
    """Fewer tiles than multiprocessors: several programs a tile, added up by the last to come, in order."""
    inputs = gated_inputs(batch, 100, 24, size, gate="all-half")
    ref, spy = literal_gated(*wide(inputs)), spy_on(monkeypatch, "conv_kernel")
    tiles = batch * best_box(32, *size).tiles(*size)
    for least in (8, 1):
        min_k_blocks(least)
        for count in (7, 13):
            multiprocessors(count)
            out = BACKEND.gated_conv3d(*inputs)
            assert_close(out, ref)
            assert spy.launches[-1][0][0] == min(count, cdiv(tiles * 5 * 12, least)) > tiles
    in_any_order()
    assert torch.equal(BACKEND.gated_conv3d(*inputs), out)


SKIPS = {
    "none": lambda x: None,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "channels-first": lambda x: x,
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize(
    "mixing_kernel, count, skip",
    [
        ((1, 1, 1), 1, "none"),
        ((1, 1, 1), 5, "channels-last"),
        ((1, 1, 1), 13, "channels-first"),
        ((1, 1, 1), 3, "expanded"),
        ((3, 1, 1), 5, "channels-first"),
    ],
    ids=str,
)
def test_epilogue_on_any_chip(taps, mixing_kernel, count, skip, multiprocessors, min_k_blocks, in_any_order):
    """A frozen layer's activation, skip in either memory format, and sums of whole and of split tiles."""
    dsts = FusedDSTS(40, num_layers=1, num_neurons=2, mixing_kernel=mixing_kernel, backend="eager").eval()
    with torch.no_grad():
        dsts.layers[0].gate.normal_()
        dsts.layers[0].norm.bias.normal_()
    layer, x = dsts.freeze(backend="triton").layers[0], torch.randn(2, 40, 2, 5, 3)
    arguments = (layer.weights(), layer.options(taps))
    wanted, skip = dsts.double()(x.double()) - x, SKIPS[skip](x)
    min_k_blocks(2)
    multiprocessors(count)
    y, sums, *_ = frozen_layer(x, None, skip, *arguments, backend="triton")
    assert_close(y, wanted if skip is None else wanted + skip, factor=2)
    assert_close(sums, BACKENDS["eager"].tap_sums(y.double(), taps), dtype=torch.float32)
    assert skip is None or y.stride() == torch.empty_like(skip).stride()
    in_any_order()
    again = frozen_layer(x, None, skip, *arguments, backend="triton")
    assert torch.equal(again[0], y) and torch.equal(again[1], sums)
