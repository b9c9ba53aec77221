"""Remembered launches: whatever comes, what is run is what Triton would compile for it. No GPU, nothing is compiled.

Triton's own binder says what it would compile for given arguments (its *specialization*); kernels are stood in for by
that. A launch under a key that is too coarse would run another specialization, which :class:`Compiler` notices.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import load

from ...support.inputs import LAYOUTS, gated_inputs
from .compiling import (
    IN_GLUON,
    MODULES,
    REMEMBERED,
    STREAM,
    Driver,
    all_cases,
    forget_launches,
    launch,
    specialization,
    tl,
    triton,
)


@pytest.fixture(autouse=True)
def not_recorded() -> Iterator[None]:
    """Every launch by itself: test_recorded.py has whole calls."""
    with switched(record_calls=False):
        yield


@triton.jit
def one_kernel(x, channels, BLOCK: tl.constexpr):
    tl.store(x, channels)


@triton.jit
def another_kernel(x, channels, BLOCK: tl.constexpr):
    tl.store(x + 1, channels)


class Compiler:
    """Stands in for Triton's compiler and for the driver: what was compiled, what was run and with what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: list[str] = []
        self.run: list[str] = []
        self.wrong: list[tuple] = []
        self.driver = Driver()
        self.asked: tuple = ()
        monkeypatch.setattr(launch, "driver", type("Active", (), {"active": self.driver}))
        monkeypatch.setattr(launch, "chip", functools.cache(lambda device: ("sm_90", 132)))
        self.problems: list[tuple] = []
        original = launch.start
        forget_launches(monkeypatch)

        def start(kernel: object, one: object, tensors: tuple) -> None:
            self.asked = (kernel, one.grid, (*tensors, *one.numbers), one.constants)
            self.problems.append((kernel, one.grid, one.numbers, one.constants))
            original(kernel, one, tensors)

        monkeypatch.setattr(launch, "start", start)
        monkeypatch.setattr(launch.JITFunction, "run", self.compile)

    def compile(self, *args: object, grid: tuple, warmup: bool, **constants: object) -> object:
        kernel = self.asked[0]
        mine = specialization(kernel, args, constants)
        self.compiled.append(mine)
        device, names = self.driver.device, kernel.arg_names

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
            asked, grid, arguments, wanted = self.asked
            self.run.append(mine)
            assert (x, y, z) == (*grid, 1, 1)[:3] and stream == STREAM and len(values) == len(names)
            bound = (*arguments, *(wanted[name] for name in names[len(arguments) :]))
            plain = tuple(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in bound)
            now = specialization(asked, arguments, wanted)
            if values != plain or (mine, device) != (now, self.driver.device):
                self.wrong.append((mine, now, values, plain))

        return type("CompiledKernel", (), {"run": staticmethod(run), "function": 1, "packed_metadata": (4, 1, 0)})


@pytest.fixture
def compiler(monkeypatch) -> Iterator[Compiler]:
    yield Compiler(monkeypatch)


def test_what_runs_is_what_triton_would_run(compiler):
    """Every kernel, dtypes, channels, sizes and alignments in turns, twice: compiled at most once, and run rightly."""
    all_cases()
    first = len(compiler.compiled)
    assert not compiler.wrong, compiler.wrong[0]
    all_cases()
    assert not compiler.wrong, compiler.wrong[0]
    assert len(compiler.compiled) == first, "the second time everything is remembered"
    assert len(compiler.run) > 3 * first
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    seen = {text.partition(":")[0] for text in compiler.run}
    frozen = {"route_and_gather_kernel", "route_and_gather_rows_kernel"}
    assert kernels - seen == frozen, "the frozen module's alone: see test_a_frozen_module"


def test_a_frozen_module(compiler, monkeypatch):
    """Its launches likewise, of two modules in turns that differ in their dtype."""
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda self, op, device, dtype: None)
    modules = [
        FusedDSTS(16, num_layers=2, num_neurons=3, dtype=dtype).eval().freeze(backend="triton")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for _ in range(2):
        for size in ((2, 16, 2, 4, 4), (2, 16, 2, 4, 5), (1, 16, 2, 4, 4)):
            for fast in modules:
                fast(torch.zeros(size, dtype=fast.dtype))
    assert not compiler.wrong, compiler.wrong[0]
    assert {text.partition(":")[0] for text in compiler.run} == {
        "tap_sums_kernel", "route_and_gather_kernel", "conv_kernel",
    }  # fmt: skip


def test_the_gather_in_gluon(compiler, monkeypatch):
    """Gluon's kernel likewise, of two dtypes in turns."""
    rows = load("route_rows")
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda self, op, device, dtype: None)
    kinds = torch.float32, torch.bfloat16
    modules = [FusedDSTS(16, num_neurons=3, dtype=dtype).eval().freeze(backend="triton") for dtype in kinds]
    with switched(gluon_gather=True, record_calls=False):
        for size in ((2, 16, 2, 4, 4), (2, 16, 2, 4, 5), (2, 16, 2, 4, 4)):
            for fast in modules:
                x = torch.zeros(size, dtype=fast.dtype).contiguous(memory_format=torch.channels_last_3d)
                if (reason := rows.why_not(x)) is not None:
                    pytest.skip(reason)
                fast(x)
    assert not compiler.wrong, compiler.wrong[0]
    assert any("route_and_gather_rows_kernel" in text for text in compiler.run)
    assert sum("route_and_gather_rows_kernel" in text for text in compiler.compiled) <= 4


def test_gluon_kernels(compiler, monkeypatch):
    """Likewise those of a frozen module and of both gradients, by sizes, memory formats and dtypes in turns."""
    monkeypatch.setattr(launch, "chip", functools.cache(lambda device: ("sm_90", 2)))
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda self, op, device, dtype: None)
    launch.gluon_runs.cache_clear()
    backend, half = BACKENDS["triton"], (torch.bfloat16, torch.float16)
    modules = [
        FusedDSTS(128, num_layers=1, num_neurons=2, dtype=dtype).eval().freeze(backend="triton") for dtype in half
    ]
    counts = []
    with switched(gluon_conv=True, gluon_data_gradient=True, gluon_weight_gradient=True):
        for _ in range(2):
            for batch, size in ((2, (2, 8, 8)), (4, (2, 8, 8)), (2, (3, 8, 8))):
                for fast, change in itertools.product(modules, (LAYOUTS["channels-first"], LAYOUTS["channels-last"])):
                    x, gate, neuron, *filters = gated_inputs(batch, 128, 128, size, fast.dtype)
                    x = change(x)
                    for needs in ([True] * 4, [False, True, False, False]):
                        backend.gated_conv3d_backward(x, x, gate, neuron, *filters, needs)
                    for kernel in ((1, 1, 1), (1, 3, 3)):
                        mixing = torch.zeros(3, 128, 128, *kernel, dtype=fast.dtype)
                        backend.mixing_conv3d_backward(x, x, neuron, mixing, [False, True])
                    fast(x)
            counts.append(len(compiler.compiled))
    launch.gluon_runs.cache_clear()
    assert not compiler.wrong, compiler.wrong[0]
    assert counts[0] == counts[1], "the second time everything is remembered"
    names = {name for module in IN_GLUON for name in vars(module) if name.endswith("_gluon_kernel")}
    assert len(names) == 3 and names <= {text.partition(":")[0] for text in compiler.run}


def test_what_is_remembered_of_a_problem(compiler, monkeypatch):
    """Grid, numbers and constants, as they would be worked out anew for every launch."""
    all_cases()
    compiler.problems.clear()
    all_cases()
    remembered, compiler.problems = compiler.problems, []
    for module, name, function in REMEMBERED:
        monkeypatch.setattr(module, name, function.__wrapped__)
    all_cases()
    assert len(REMEMBERED) >= 13 and len(remembered) > 1000
    for mine, theirs in zip(remembered, compiler.problems, strict=True):
        assert mine == theirs and repr(mine) == repr(theirs)  # 1, 1.0 and True are equal, and three kernels


# What a key must not leave out, and how it looks without.
MUTATIONS = {
    "device": lambda device, kinds: (0, kinds),
    "dtypes": lambda device, kinds: (device, [k if k is None else type(k) for k in kinds]),
    "alignment": lambda device, kinds: (device, [k[0] if type(k) is tuple and len(k) == 1 else k for k in kinds]),
    "absent-tensors": lambda device, kinds: (device, [k or torch.float32 for k in kinds]),
    "boxes": lambda device, kinds: (device, [k[0] if type(k) is tuple and len(k) > 1 else k for k in kinds]),
}


def boxes(rounds: int = 1) -> None:
    """The same memory, by its address and in boxes of two shapes."""
    panel, one = torch.zeros(64, 64, dtype=torch.bfloat16), launch.Launch((1,), (3,), BLOCK=4)
    for operand in (panel, launch.descriptor(panel, (16, 64)), launch.descriptor(panel, (32, 64)), panel) * rounds:
        launch.start(one_kernel, one, (operand,))


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_no_part_of_the_key_can_be_left_out(compiler, monkeypatch, mutation):
    """Without any one part something else is run, and noticed."""
    original = launch.key_of
    monkeypatch.setattr(launch, "key_of", lambda *parts: original(*mutation(*parts)))
    for device in (3, 0, 3):
        compiler.driver.device = device
        boxes()
        all_cases()
        if compiler.wrong:
            break
    assert compiler.wrong


def test_kernels_do_not_share(compiler):
    """One problem's launch under two kernels, as a test's spy and a kernel take turns."""
    x, one = torch.zeros(4), launch.Launch((1,), (3,), BLOCK=4)
    for kernel in (one_kernel, another_kernel, one_kernel, one_kernel):
        launch.start(kernel, one, (x,))
    assert not compiler.wrong and len(compiler.compiled) == 3


def test_box_of_a_descriptor(compiler):
    """The same memory in boxes of another shape, or by its address, is another kernel's argument."""
    boxes(rounds=2)
    assert not compiler.wrong and len(compiler.compiled) == 3


def test_descriptors_keep_no_memory_alive():
    """Those that are kept know addresses; a tensor that is gone leaves its memory to others."""
    launch.described_at.cache_clear()
    panel = torch.zeros(64, 64)
    found = launch.described_at(panel.data_ptr(), panel.dtype, panel.shape, (16, 32))
    assert found.base.data_ptr() == panel.data_ptr() and found.base.dtype == panel.dtype
    gone = weakref.ref(panel)
    del panel
    assert gone() is None


def test_a_profiler_sees_launches(compiler, monkeypatch):
    """Triton's own way wherever somebody listens, and by the switch."""
    x, one = torch.zeros(4), launch.Launch((1,), (3,), BLOCK=4)

    def start() -> None:
        launch.start(one_kernel, one, (x,))

    start()
    start()
    assert (len(compiler.compiled), len(compiler.run)) == (1, 1)
    hook = lambda metadata: None  # noqa: E731
    launch.knobs.runtime.launch_enter_hook.add(hook)
    try:
        start()
    finally:
        launch.knobs.runtime.launch_enter_hook.remove(hook)
    with switched(remember_launches=False):
        start()
    assert (len(compiler.compiled), len(compiler.run)) == (3, 1)
