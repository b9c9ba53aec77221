"""The roofline of the CUDA backend: its launchers, whose native calls are recorded, and cycles worked out by hand."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from benchmarks import cuda_compilers, cuda_loops
from dsts_kernels.backends.cuda import CudaBackend, kernels
from dsts_kernels.roofline import CHIPS, SHAPES, STEPS, Case, Chip, frozen_step, total, training_step
from dsts_kernels.roofline import cuda as model
from dsts_kernels.roofline.loops import COUNTED, KERNELS, passes, pitch_of, step_of, store_passes, volta_fragment
from dsts_kernels.roofline.tables import run_on

from .test_roofline import features_of, run_frozen, run_training_layer

CHOSEN = ("v100", "t4", "a100")
CASES = {
    "tpn": Case(*SHAPES["tpn"]),
    "swin": Case(*SHAPES["swin"]),
    "one": Case(*SHAPES["tpn"], batch=1),
    "ragged": Case(100, (3, 5, 9), batch=3, layers=2, neurons=4, share=0.37),
    "float32": Case(*SHAPES["swin"], dtype=torch.float32, kind="ieee"),
    "tf32": Case(*SHAPES["swin"], dtype=torch.float32, kind="tf32"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tap_sum_blocks(size, strides, sums, b, c, parts, taps, vector, dtype, target) -> int:
    return b * parts * cdiv(c, 8 * (4 if dtype == 0 else 8) if vector else 32)


def filter_blocks(outputs: int, channels: int, taps: int, by_channel: bool, pitch: int) -> int:
    across, along = (pitch, channels * taps) if by_channel else (outputs, pitch * taps)
    return cdiv(across, 64) * cdiv(along, 64)


def products(a: tuple) -> int:
    """Of the grid of a filter gradient."""
    return cdiv(a[11], 128) * cdiv(a[12], 128) * (math.prod(a[14]) + 3 * a[15]) * a[13]


# Blocks of each native launch by its arguments, as the launchers at the end of every csrc/cuda/*.cu work them out.
GRIDS: dict[str, Callable[[tuple], int]] = {
    "semhash": lambda a: (a[7] if a[9] else a[6]) * cdiv(a[8], 256),
    "tap_sums": lambda a: tap_sum_blocks(*a[1:]),
    "group_samples": lambda a: a[6],
    "list_channels": lambda a: a[8],
    "pack_features": lambda a: a[4] * cdiv(math.prod(a[1]), 64) * a[7],
    "route_and_pack": lambda a: a[4] * cdiv(math.prod(a[1]), 64) * a[7],
    "pack_filters": lambda a: filter_blocks(a[3], a[4], a[5], a[8], a[9]) * a[10],
    "unpack_filters": lambda a: filter_blocks(a[5], a[6], a[7], a[10], a[11]) * a[12],
    "conv": lambda a: a[17],
    "data_gradient": lambda a: a[10] * cdiv(math.prod(a[8]), 128) * cdiv(a[11], 128),
    "weight_gradient": products,
}
NAMES = {"group_samples": "group", "list_channels": "list", "pack_features": "pack"}


class Call(NamedTuple):
    """One recorded native launch."""

    kernel: str
    programs: int
    arguments: tuple


def named(name: str, arguments: tuple) -> str:
    if name == "semhash" and arguments[9]:
        return "semhash_backward"
    return f"conv {arguments[13]}" if name == "conv" else NAMES.get(name, name)


@contextlib.contextmanager
def launchers(chip: Chip) -> Iterator[tuple[CudaBackend, list[Call]]]:
    """The CUDA backend on a chip that is not here, and the list of its launches, none of which runs."""
    recorded: list[Call] = []

    def record(name: str) -> Callable[..., None]:
        return lambda *arguments: recorded.append(Call(named(name, arguments), GRIDS[name](arguments), arguments))

    native = SimpleNamespace(**{name: record(name) for name in GRIDS})
    found = kernels.Chip(chip.capability, chip.processors)
    with contextlib.ExitStack() as stack:
        for name, stand_in in (("native", native), ("chip", found), ("target", None)):
            stack.enter_context(mock.patch.object(kernels, name, lambda *_, value=stand_in: value))
        yield CudaBackend(), recorded


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if case.kind == "ieee" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@every_case
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("step", STEPS)
def test_launches_are_those_of_the_launchers(case, name, step):
    """Kernels in their order and blocks of each."""
    chip = CHIPS[name]
    case = run_on(case, chip)
    with precision(case), launchers(chip) as (launch, recorded):
        (run_frozen if step == "frozen" else run_training_layer)(launch, case)
    case = case if step == "frozen" else case._replace(layers=1)
    ours = [one for one in STEPS[step](case, chip, "cuda") if one.programs]
    ends = " mixing", " union"
    names = [
        next((one.kernel.removesuffix(end) for end in ends if one.kernel.endswith(end)), one.kernel) for one in ours
    ]
    assert names == [call.kernel for call in recorded]
    assert [one.programs for one in ours] == [call.programs for call in recorded]


@every_case
@pytest.mark.parametrize("name", CHOSEN)
def test_schedule_is_the_launchers(case, name):
    """Programs and whole waves of the persistent convolution, counters zeroed for it, parts of tap sums."""
    chip = CHIPS[name]
    case = run_on(case, chip)
    with precision(case), launchers(chip) as (launch, recorded):
        run_frozen(launch, case)
        theirs = kernels.conv_problem(features_of(case), case.channels, case.channels + 64, 9, 1)
        held = kernels.resident(features_of(case))
    tile, per_sample, programs = model.conv_problem(case, chip, case.channels + 64, 9)
    assert tile.per_sm == held and programs == theirs.programs
    assert max(0, case.batch * per_sample // programs - 1) == theirs.waves
    calls = {call.kernel: call.arguments for call in recorded}
    assert calls["tap_sums"][6] == model.tap_sums(case, chip)[1]
    assert calls["route_and_pack"][-3] == theirs.flags == programs + case.batch * model.tiles_of(case)[1]
    assert calls["conv packed"][17:19] == (programs, theirs.waves)


@every_case
@pytest.mark.parametrize("name", CHOSEN)
def test_padding_is_the_launchers(case, name):
    """Operands are copied where their rows are no whole 16 bytes, and only there."""
    chip = CHIPS[name]
    case = run_on(case, chip)._replace(layers=1)
    copies = []
    with (
        precision(case),
        launchers(chip) as (launch, _),
        mock.patch.object(kernels.F, "pad", wraps=kernels.F.pad) as pad,
    ):
        run_training_layer(launch, case)
        copies = [call.args[0].numel() * case.element for call in pad.call_args_list]
    ours = [one.dram / 3 for one in training_step(case, chip, "cuda") if one.kernel == "torch: rows padded"]
    assert sorted(ours) == sorted(copies) and bool(copies) == bool(case.channels % model.vector(case))


def test_passes_by_hand():
    """Lanes side by side fill every bank; lanes 128 bytes apart meet in one; equal addresses are read once."""
    assert [passes((lane * width for lane in range(32)), width) for width in (4, 8, 16)] == [1, 2, 4]
    assert passes((lane * 128 for lane in range(32)), 4) == 32
    assert passes((0 for _ in range(32)), 16) == 4
    assert passes((lane % 8 * 128 for lane in range(32)), 16) == 32


def test_volta_fragments():
    """By K, rows 0 to 3 and 8 to 11 of the left operand go together: 8 rows of 16 bytes meet, at any pitch of those."""
    assert volta_fragment(True, True, 80) == 16 and volta_fragment(False, True, 80) == 8
    assert all(volta_fragment(True, True, 16 * pitch) >= 16 for pitch in range(4, 20))
    # By column a pitch of 16 bytes more than all banks makes neighbours meet, one of 32 does not.
    assert [volta_fragment(side, False, pitch) for side in (True, False) for pitch in (272, 288)] == [16, 8, 16, 8]


def test_steps_by_hand():
    """The convolution's step on a V100: fragments, stores, and what goes through L1."""
    fragments, stores, through = 4 * 2 * 4 * (16 + 8), 2 * 16 * 4, 128
    assert step_of(70, "float16", "by_k", 128) == (773.0, fragments + stores + through)
    fragments = 4 * (64 + 64) * 64 // 128  # 4 warps, 64 rows of either side, 64 bytes of K
    assert step_of(75, "float16", "by_k", 64).shared == 2 * (fragments + stores + through)
    for kernel in KERNELS:
        assert step_of(80, "float16", kernel, 128).shared == fragments + stores
        assert step_of(80, "tf32", kernel, 128) == (COUNTED[80]["tf32"][KERNELS.index(kernel)], fragments + stores)


def test_stores_meet_in_no_bank():
    """Every padded tile is written at 128 bytes a pass, by K and by column, at every pitch; sm_70 reads it at 288."""
    for capability, element in itertools.product(COUNTED, (2, 4)):
        for by_k in (True, False):
            assert store_passes(by_k, pitch_of(capability, by_k, element), element) == 64
    assert [pitch_of(capability, False, 2) for capability in (70, 75, 80)] == [288, 272, 272]


@pytest.mark.slow
@pytest.mark.parametrize("capability", COUNTED)
def test_counts_are_of_the_compiled_kernels(capability):
    """What stands in COUNTED, and that its products and loads of fragments are those the model works with."""
    reason = cuda_compilers.missing(capability)
    if reason:
        pytest.skip(reason)
    found = cuda_loops.count(capability)
    for dtype, row in found.items():
        products = {"tf32": 64, "float32": 1024}.get(dtype, {70: 512, 75: 128}.get(capability, 64))
        matrices = {70: [0] * 4}.get(capability, [16] * 4)  # whole ones that a warp loads; words lie by column
        matrices = {"tf32": [16, 8, 16, 0], "float32": [0] * 4}.get(dtype, matrices)
        for one, loads in zip(row, matrices, strict=True):
            assert products == one.kinds["FFMA" if dtype == "float32" else "HMMA.884" if capability < 75 else "HMMA"]
            exact = dtype == "float32"  # copies or zeros: two instructions
            vectors = 4 if exact else 8  # of a thread, of both operands
            assert (one.kinds["STS"], one.kinds["LDGSTS"] // (2 if exact else 1))[capability >= 80] == vectors
            assert one.kinds["LDSM"] == loads
    # Another release of the compilers may move a few instructions; these are what the counts were taken with.
    counted = {dtype: tuple(one.instructions for one in row) for dtype, row in found.items()}
    assert counted.keys() == COUNTED[capability].keys()
    for dtype, row in COUNTED[capability].items():
        assert counted[dtype] == pytest.approx(row, rel=0.02), f"run python -m benchmarks.cuda_loops: {counted}"


@pytest.mark.parametrize("capability", COUNTED)
def test_instructions_are_at_least_the_products(capability):
    """A step needs its multiplications: by tensor cores of a warp's 64x64, of a thread's 8x8 in float32."""
    matrix = {70: 512, 75: 128}.get(capability, 64)  # of one warp, 32 deep in half
    needed = {"float16": matrix, "bfloat16": matrix, "tf32": matrix, "float32": 8 * 8 * 16}
    for dtype, counts in COUNTED[capability].items():
        assert len(counts) == len(KERNELS)
        assert all(needed[dtype] < count < 10 * needed[dtype] for count in counts), dtype


def test_tiles_on_v100():
    """TPN at batch 8: 1024 tiles on 160 programs, 5 whole waves and 224 tiles shared; no program has 1% too much."""
    chip, case = CHIPS["v100"], run_on(CASES["tpn"], CHIPS["v100"])
    conv = next(one for one in frozen_step(case, chip) if one.kernel == "conv packed")
    assert conv.programs == 160 and conv.waves == pytest.approx(6.4)
    assert 1 <= conv.busiest * chip.processors / conv.flop < 1.01


def test_v100_goal_is_predicted():
    """Frozen TPN at batch 8 in at most 10 ms, and its products at 62% of the chip's matrix rate or more."""
    chip = CHIPS["v100"]
    case = run_on(CASES["tpn"], chip)
    launches = frozen_step(case, chip)
    ms = total(launches, case.kind, chip).graph
    assert ms <= 10 and sum(one.flop for one in launches) / (ms * 1e-3) >= 0.62 * chip.half * 1e12
