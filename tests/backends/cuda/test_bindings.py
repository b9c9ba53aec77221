"""The native functions by themselves: what they refuse, and that a launch that fails is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsts_kernels.backends.cuda import kernels

from ...support.stand_ins import BACKEND, emulated
from ...support.targets import INTERPRETED
from .test_installed import functions

if INTERPRETED:
    pytest.skip("these kernels are emulated, not interpreted: unset TRITON_INTERPRET", allow_module_level=True)
pytestmark = emulated

SIZE, STRIDES, HERE = (
    (1, 2, 3),
    (6, 6, 6, 3, 1),
    4096,
)  # HERE is no address: to read it ends the process
GATHER = dict(x=HERE, size=SIZE, x_strides=STRIDES, panel=HERE, batch=1, channels=1, pitch=64, shares=1, rows=0)
FILTER = dict(outputs=1, channels=1, taps=9, first_tap=0, all_taps=12, by_channel=True, pitch=8)
# Arguments that every function takes, in order; the target follows.
GOOD: dict[str, dict[str, Any]] = {
    "semhash": dict(
        grad=HERE, logits=HERE, noise=0, neuron=0, hard=0, out=HERE, batch=1, neurons=1, channels=1, backward=True,
        dtype=0,
    ),
    "tap_sums": dict(
        x=HERE, size=SIZE, x_strides=STRIDES, sums=HERE, batch=1, channels=1, parts=1, taps=9, vector=False, dtype=0
    ),
    "group_samples": dict(
        neuron=HERE, slots=HERE, neuron_of=HERE, slot_of=HERE, groups=HERE, members=HERE, batch=1, neurons=1,
        slot_count=1,
    ),
    "list_channels": dict(
        gate=HERE, slots=HERE, neuron_of=HERE, groups=HERE, members=HERE, order=HERE, plans=HERE, listed=HERE, rows=1,
        channels=1, block=32, by_slot=True,
    ),
    "gather_panel": dict(**GATHER, order=HERE, slots=0, plans=HERE, gate=HERE, neuron=HERE, neurons=1, dtype=0),
    "route_and_gather": dict(
        **GATHER, sums=HERE, scoring=HERE, channels_of=HERE, starts=HERE, plan=HERE, chosen=HERE, scores=HERE,
        flags=HERE, divisor=1.0, neurons=1, parts=1, taps=1, flag_count=1, dtype=0,
    ),
    "pack_filters": {"from": HERE, "into": HERE, "neuron_of": HERE} | FILTER | dict(slots=1, from_dtype=0, dtype=0),
    "unpack_filters": {"from": HERE, "into": HERE, "slot_of": HERE, "listed": 0, "bit": 1} | FILTER
    | dict(neurons=1, dtype=0),
    "conv": dict(
        addresses=(HERE,) * 12, size=SIZE, out_strides=STRIDES, batch=1, width=1, pitch=4, rows=1, slots=1, outputs=1,
        filter_pitch=4, kernel=(1, 3, 3), second=True, sign=1, form="listed", index_wide=False, relu=False,
        sum_taps=0, programs=1, waves=0, vector_out=False, dtype=0, tf32=False,
    ),
    "data_gradient": dict(
        grad=HERE, filters=HERE, order=HERE, plans=HERE, gate=HERE, x=HERE, dx=HERE, dgate=0, size=SIZE,
        x_strides=STRIDES, batch=1, channels=1, outputs=1, pitch=4, listed=True, dtype=0, tf32=False,
    ),
    "weight_gradient": dict(
        left=HERE, right=HERE, order=0, plans=0, neuron_of=HERE, groups=HERE, members=HERE, out=HERE, size=SIZE,
        left_pitch=4, right_pitch=4, rows=1, columns=1, slots=1, kernel=(1, 3, 3), second=True, sign=1, by_neuron=False,
        out_float=True, dtype=0, tf32=False,
    ),
}  # fmt: skip
SIZES = (
    "batch", "neurons", "channels", "parts", "slot_count", "rows", "block", "pitch", "shares", "outputs", "taps",
    "all_taps", "flag_count", "width", "filter_pitch", "programs", "left_pitch", "right_pitch", "columns",
)  # fmt: skip


MAY_BE_NONE = ("conv", "gather_panel", "route_and_gather")  # rows


def bad_arguments(name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """One bad argument at a time, and what is said of it."""
    for key, value in GOOD[name].items():
        if value == HERE:
            yield {key: 0}, "null"
        elif key in SIZES and not (name in MAY_BE_NONE and key == "rows"):
            yield from (({key: bad}, f"is {bad}; wanted 1 or ") for bad in (0, -1))
        elif key in ("dtype", "from_dtype"):
            said = r"wanted 0 \(float32\), 2 \(bfloat16\) or 3 \(float16\)"
            yield from (({key: bad}, f"dtype is {bad}; {said}") for bad in (1, 4, -1))
        elif key == "size":
            yield {key: (1, 0, 3)}, "a size is 0"
            yield {key: (1 << 11, 1 << 10, 1 << 10)}, "too many positions"
    if name in ("gather_panel", "route_and_gather"):
        lying = {"channels": 8, "x_strides": (48, 1, 48, 24, 8)}
        yield {"rows": 1}, "rows is 1; wanted 0 where channels are no whole 16 bytes side by side"
        yield lying | {"rows": 1, "channels": 9}, "rows is 1; wanted 0 where"
        yield from ((lying | {"rows": bad}, f"rows is {bad}; wanted at most 16384 bytes of them") for bad in (-1, 513))
    if name in ("tap_sums", "route_and_gather"):
        yield {"taps": 3}, "taps is 3; wanted 1 or 9"
    if name in ("pack_filters", "unpack_filters"):
        yield {"first_tap": 4}, "the taps do not lie within all_taps"
        yield {"outputs": 9}, "pitch is less than a row"
    if name == "unpack_filters":
        yield from (({"bit": bad}, f"bit is {bad}; wanted 1, 2 or 3") for bad in (0, 4))
    if name == "data_gradient":
        yield {"dgate": HERE}, "dgate needs every channel"
    if name in ("conv", "weight_gradient"):
        for bad in ((3, 3, 3), (0, 3, 3), (-1, -3, 3), (1, 5, 1)):
            yield {"kernel": bad}, f"the kernel is {'x'.join(map(str, bad))}; wanted sides of 1 or 3"
    if name == "pack_filters":
        yield {"from_dtype": 3, "dtype": 2}, "from_dtype is neither dtype nor float32"
    if name == "conv":
        yield from bad_convolutions(GOOD[name]["addresses"])


def bad_convolutions(given: tuple[int, ...]) -> Iterator[tuple[dict[str, Any], str]]:
    def without(*null: int) -> dict[str, Any]:
        return {"addresses": tuple(0 if i in null else own for i, own in enumerate(given))}

    yield from ((without(*null), "an address that must be given is null") for null in ((0,), (1,), (3, 4), (7,), (10,)))
    yield {"form": "spread"}, "form is 'spread'; wanted 'packed', 'rows', 'listed' or 'columns'"
    said = "wanted 0, or 1 or 9 with part_sums and sums"
    yield {"sum_taps": 3}, f"sum_taps is 3; {said}"
    yield {"sum_taps": 9} | without(9), f"sum_taps is 9; {said}"
    yield {"sum_taps": 1} | without(8), f"sum_taps is 1; {said}"
    yield {"waves": 1}, "1 waves of 1 programs leave 0 tiles over; wanted 1 to 2 a program"
    yield {"batch": 3}, "0 waves of 1 programs leave 3 tiles over; wanted 1 to 2 a program"
    yield {"programs": 1025}, "programs is 1025; wanted at most 1024"
    yield {"waves": -1}, "a size is 0"


def call(name: str, changed: dict[str, Any], device: int = 0) -> None:
    module = kernels.native()
    getattr(module, name)(*(GOOD[name] | changed).values(), module.Target(device, BACKEND.arch // 10, 0))


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
        call("gather_panel", {"shares": 1 << 16})


def test_constants():
    """Sizes that launchers count with in Python."""
    native = kernels.native()
    for name in ("TILE", "GATHER", "LEAST", "ROWS_BYTES"):
        assert getattr(native, name) == getattr(kernels, name), name


def test_every_function_is_tried_here():
    """A kernel that is added gets its arguments above."""
    assert functions(kernels.native()) == set(GOOD)


def test_more_neurons_than_kernels_keep():
    """The launchers say so before the runtime would, which names neither."""
    with pytest.raises(ValueError, match="neurons: got 8193, wanted at most 8192 on the 'cuda' backend"):
        kernels.group_samples(torch.tensor([1, 0]), 8193)
    assert kernels.group_samples(torch.tensor([8000, 0]), 8192).slots.tolist() == [1, 0]
