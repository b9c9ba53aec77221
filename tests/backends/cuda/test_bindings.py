"""The native functions by themselves: what they refuse, and that a launch that fails is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsts_kernels.backends.base import DTYPE_CODES
from dsts_kernels.backends.cuda import kernels, launch
from dsts_kernels.backends.gpu import dtypes, grids
from dsts_kernels.backends.gpu.lists import Plan
from dsts_kernels.backends.packing import TILE_BYTES

from ...ops.stated import HERE, stated
from ...support.stand_ins import BACKEND, emulated
from ...support.targets import INTERPRETED
from .test_installed import functions

if INTERPRETED:
    pytest.skip("these kernels are emulated, not interpreted: unset TRITON_INTERPRET", allow_module_level=True)
pytestmark = emulated

SIZE, STRIDES = (1, 2, 3), (6, 6, 6, 3, 1)
GATHER = dict(
    x=HERE, panel=HERE, size=SIZE, x_strides=STRIDES, batch=1, channels=1, pitch=64, splits=1,
    whole_positions=0, turned=0, dtype=0,
)  # fmt: skip
FILTER = dict(
    weight=HERE, filters=HERE, outputs=1, channels=1, taps=9, first_tap=0, all_taps=12, by_channel=True, pitch=8,
    dtype=0,
)  # fmt: skip
# Arguments that every function takes, besides the target: of kernels of several ops; the rest are with their op.
GOOD: dict[str, dict[str, Any]] = {
    "group_samples": dict(
        neuron=HERE, slots=HERE, neuron_of=HERE, slot_of=HERE, groups=HERE, members=HERE, batch=1, neurons=1,
        num_slots=1,
    ),
    "list_channels": dict(
        gate=HERE, slots=HERE, neuron_of=HERE, groups=HERE, members=HERE, order=HERE, plans=HERE, listed=HERE,
        num_lists=1, channels=1, k_block=32, by_slot=True,
    ),
    "gather_panel": dict(**GATHER, order=HERE, slots=0, plans=HERE, gate=HERE, neuron=HERE, neurons=1),
    "route_and_gather": dict(
        **GATHER, sums=HERE, scoring=HERE, channels_of=HERE, starts=HERE, plan=HERE, neuron=HERE, scores=HERE,
        arrival_counters=HERE, divisor=1.0, neurons=1, parts=1, taps=1, num_arrival_counters=1,
    ),
    "pack_filters": dict(**FILTER, neuron_of=HERE, slots=1, weight_dtype=0),
    "unpack_filters": dict(**FILTER, slot_of=HERE, listed=0, reader=1, neurons=1),
    "conv": dict(
        panel=HERE, filters=HERE, order=0, plan=HERE, index=0, bias=0, skip=0, out=HERE, tile_sums=0, sums=0,
        workspace=HERE, arrival_counters=HERE, size=SIZE, out_strides=STRIDES, batch=1, width=1, pitch=4, k_channels=1,
        slots=1, outputs=1, filter_pitch=4, kernel=(1, 3, 3), with_temporal=True, sign=1, form="listed",
        index_64=False, relu=False, sum_taps=0, num_ctas=1, waves=0, idle_percent=15, vector_out=False, dtype=0,
        tf32=False,
    ),
    "data_gradient": dict(
        grad=HERE, filters=HERE, order=HERE, plans=HERE, gate=HERE, x=HERE, dx=HERE, dgate=0, size=SIZE,
        x_strides=STRIDES, batch=1, channels=1, outputs=1, pitch=4, listed=True, dtype=0, tf32=False,
    ),
    "weight_gradient": dict(
        left=HERE, right=HERE, order=0, plans=0, neuron_of=HERE, groups=HERE, members=HERE, out=HERE, size=SIZE,
        left_pitch=4, right_pitch=4, rows=1, columns=1, slots=1, kernel=(1, 3, 3), with_temporal=True, sign=1,
        by_neuron=False, out_float=True, dtype=0, tf32=False,
    ),
    **stated("NATIVE"),
}  # fmt: skip
SIZES = (
    "batch", "neurons", "channels", "parts", "num_slots", "num_lists", "rows", "k_block", "pitch", "splits", "outputs",
    "taps", "all_taps", "num_arrival_counters", "width", "filter_pitch", "num_ctas", "left_pitch", "right_pitch",
    "columns",
)  # fmt: skip


def bad_arguments(name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """One bad argument at a time, and what is said of it."""
    for key, value in GOOD[name].items():
        if value == HERE:
            yield (
                {key: 0},
                "is null; wanted an address" if key in ("plan", "dx") else f"{key} is null; wanted an address",
            )
        elif key in SIZES:
            yield from (({key: bad}, f"{key} is {bad}; wanted 1 or ") for bad in (0, -1))
        elif key in ("dtype", "weight_dtype"):
            said = r"wanted 0 \(float32\), 2 \(bfloat16\) or 3 \(float16\)"
            yield from (({key: bad}, f"dtype is {bad}; {said}") for bad in (1, 4, -1))
        elif key == "size":
            yield {key: (1, 0, 3)}, r"size\[1\] is 0; wanted 1 or more"
            yield {key: (1 << 11, 1 << 10, 1 << 10)}, "size is 2048x1024x1024, too many positions"
    if name in ("gather_panel", "route_and_gather"):
        dense = {"channels": 8, "x_strides": (48, 1, 48, 24, 8)}
        said = "wanted 0 where channels are no whole 16 bytes side by side"
        yield {"whole_positions": 1}, f"whole_positions is 1; {said}"
        yield dense | {"whole_positions": 1, "channels": 9}, f"whole_positions is 1; {said}"
        for bad in (-1, 513):
            said = f"whole_positions is {bad}; wanted at most 16384 bytes of them"
            yield dense | {"whole_positions": bad}, said
        said = "wanted 0 where positions are no whole 16 bytes side by side"
        lines = {"size": (1, 2, 4), "x_strides": (128, 16, 8, 4, 1)}
        for bad in ({"whole_positions": 0, "x_strides": (128, 16, 8, 4, 2)}, {"size": (1, 1, 5)}, {"turned": 2}):
            bad = lines | {"turned": 1} | bad
            yield bad, f"turned is {bad['turned']}; {said}"
        for strides in ((128, 17, 8, 4, 1), (127, 16, 8, 4, 1)):
            yield lines | {"turned": 1, "batch": 2, "channels": 2, "x_strides": strides}, f"turned is 1; {said}"
    if name in ("tap_sums", "route_and_gather"):
        yield {"taps": 3}, "taps is 3; wanted 1 or 9"
    if name in ("pack_filters", "unpack_filters"):
        yield {"first_tap": 4}, r"first_tap is 4; wanted 9 taps from it on to lie within all_taps \(12\)"
        yield {"outputs": 9}, r"pitch is 8; wanted at least a row \(9\)"
    if name == "unpack_filters":
        yield from (({"listed": HERE, "reader": bad}, f"reader is {bad}; wanted 1, 2 or 3") for bad in (0, 4))
    if name == "data_gradient":
        yield {"dgate": HERE}, "dgate is given with listed; dgate needs every channel"
    if name in ("conv", "weight_gradient"):
        for bad in ((3, 3, 3), (0, 3, 3), (-1, -3, 3), (1, 5, 1)):
            yield {"kernel": bad}, f"kernel is {'x'.join(map(str, bad))}; wanted sides of 1 or 3"
    if name == "pack_filters":
        yield {"weight_dtype": 3, "dtype": 2}, r"weight_dtype is 3; wanted dtype \(2\) or 0 \(float32\)"
    if name == "conv":
        yield from BAD_CONVOLUTIONS


BAD_CONVOLUTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"plan": 0, "index": 0}, "index is null; wanted an address"),
    ({"form": "rows"}, "form is 'rows'; wanted 'packed', 'stored', 'listed' or 'transposed'"),
    ({"sum_taps": 3, "tile_sums": HERE, "sums": HERE}, "sum_taps is 3; wanted 0, 1 or 9"),
    ({"sum_taps": 9, "tile_sums": HERE}, "sums is null; wanted an address"),
    ({"sum_taps": 1, "sums": HERE}, "tile_sums is null; wanted an address"),
    ({"waves": 1}, "1 waves of 1 CTAs leave 0 tiles over; wanted 1 to 2 a CTA"),
    ({"batch": 3}, "0 waves of 1 CTAs leave 3 tiles over; wanted 1 to 2 a CTA"),
    ({"num_ctas": 1025}, "num_ctas is 1025; wanted at most 1024"),
    ({"waves": -1}, "waves is -1; wanted 0 or more"),
    ({"idle_percent": -2}, "idle_percent is -2; wanted -1 to 100"),
    ({"idle_percent": 101}, "idle_percent is 101; wanted -1 to 100"),
)


def call(name: str, changed: dict[str, Any], device: int = 0) -> None:
    module = launch.native()
    getattr(module, name)(**(GOOD[name] | changed), target=module.Target(device, BACKEND.arch // 10, 0))


@pytest.mark.parametrize("name", GOOD)
def test_bad_arguments(name):
    """A ValueError that names the kernel and what is wrong, before anything is launched."""
    for changed, said in bad_arguments(name):
        with pytest.raises(ValueError, match=rf"cuda\.{name}: .*({said})"):
            call(name, changed)


@pytest.mark.parametrize("name", GOOD)
def test_no_such_device(name):
    """Good arguments, those above but for one, reach the runtime; its error says in which call."""
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid argument"):
        call(name, {}, device=3)


@pytest.mark.parametrize("name", ["route_and_gather", "group_samples"])
def test_more_neurons_than_shared_memory(name):
    """A launch that the device refuses is an error at once, and the next launch works."""
    with pytest.raises(RuntimeError, match="shared memory: invalid argument"):
        call(name, {"neurons": 50_000})
    assert kernels.group_samples(torch.tensor([1, 0]), 2).slots.tolist() == [1, 0]


def test_too_large_a_grid():
    with pytest.raises(RuntimeError, match="launch: invalid configuration argument"):
        call("gather_panel", {"splits": 1 << 16})


@pytest.mark.parametrize("name", GOOD)
def test_arguments_go_by_name(name):
    """In any order, all of them, and nothing else."""
    module = launch.native()
    target, function = module.Target(3, BACKEND.arch // 10, 0), getattr(module, name)
    with pytest.raises(RuntimeError, match="cudaSetDevice"):
        function(target=target, **dict(reversed(GOOD[name].items())))
    with pytest.raises(TypeError, match=rf"cuda\.{name}: wanted its arguments by keyword only"):
        function(*GOOD[name].values(), target)
    for key in (*GOOD[name], "target"):
        others = {other: value for other, value in (GOOD[name] | {"target": target}).items() if other != key}
        with pytest.raises(TypeError, match=rf"cuda\.{name}: {key} is missing"):
            function(**others)
    count = len(GOOD[name]) + 1
    with pytest.raises(ValueError, match=rf"cuda\.{name}: got {count + 1} arguments, wanted {count}"):
        function(**GOOD[name], target=target, other=1)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"batch": 1 << 40}, "batch is 1099511627776; wanted 32 bits"),
        ({"size": (1, 2)}, "size has 2 numbers; wanted 3"),
    ],
)
def test_numbers(changed, said):
    with pytest.raises(ValueError, match=rf"cuda\.tap_sums: {said}"):
        call("tap_sums", changed)


def test_types():
    for changed in ({"batch": "1"}, {"size": 3}, {"x": -1}):
        with pytest.raises((TypeError, OverflowError)):
            call("tap_sums", changed)


def test_tables():
    """Sizes and codes that launchers count with in Python."""
    native = launch.native()
    for name in ("TILE", "MIN_K_BLOCKS", "MAX_CTAS", "GATHER_POSITIONS", "GATHER_BYTES", "PRODUCT_SMEM_KIB"):
        assert getattr(native, name) == getattr(grids, name), name
    assert native.MAX_NEURONS == launch.MAX_NEURONS and native.K_BLOCK_BYTES == TILE_BYTES
    assert native.DTYPES == {str(dtype).removeprefix("torch."): DTYPE_CODES[dtype] for dtype in dtypes.DTYPES}
    assert native.PLAN == {name: at for at, name in enumerate(Plan._fields)}


def test_every_function_is_tried_here():
    """A kernel that is added gets its arguments above."""
    assert functions(launch.native()) == set(GOOD)


def test_more_neurons_than_kernels_keep():
    """The launchers say so before the runtime would, which names neither."""
    with pytest.raises(ValueError, match="neurons: got 8193, wanted at most 8192 on the 'cuda' backend"):
        kernels.group_samples(torch.tensor([1, 0]), 8193)
    assert kernels.group_samples(torch.tensor([8000, 0]), 8192).slots.tolist() == [1, 0]
