"""Remembered launches: whatever comes, what is run is what Triton would compile for it. No GPU, nothing is compiled.

Triton's own binder says what it would compile for given arguments (its *specialization*); kernels are stood in for by
that. A launch under a key that is too coarse would run another specialization, which :class:`Compiler` notices.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import LAUNCHERS, load
from dsts_kernels.routing import sample_draws

from ...support.inputs import LAYOUTS, gated_inputs
from ...support.targets import INTERPRETED, require_triton

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
require_triton()
tl, triton = map(importlib.import_module, ("triton.language", "triton"))
launch = load("launch")
MODULES = [load(name) for name in LAUNCHERS]
IN_GLUON = [load(f"gluon.{name}") for name in ("conv", "data_gradient", "weight_gradient")]
REMEMBERED = [
    (module, name, function)
    for module in (*MODULES, *IN_GLUON)
    for name, function in vars(module).items()
    if name.endswith("_launch") and function.__module__ == module.__name__
]
DEVICE, STREAM = 3, 77


@triton.jit
def one_kernel(x, channels, BLOCK: tl.constexpr):
    tl.store(x, channels)


@triton.jit
def another_kernel(x, channels, BLOCK: tl.constexpr):
    tl.store(x + 1, channels)


class Driver:
    """Of a device that is not there."""

    device = DEVICE

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        assert device == self.device
        return STREAM


@functools.cache
def binder_of(kernel: object) -> Callable:
    """What Triton reads a specialization off, for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


def specialization(kernel: object, args: tuple, constants: dict) -> str:
    """What Triton compiles for these arguments: types, alignment, constants and options."""
    _, found, options = binder_of(kernel)(*args, **constants)
    return f"{kernel.__name__}: {found} {sorted(options.items())}"


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
        for module, name, function in REMEMBERED:
            monkeypatch.setattr(module, name, launch.remembered(function.__wrapped__))

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


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, one element away from where memory is aligned."""
    storage = t.new_empty(t.numel() + 1)[1:]
    return storage.as_strided(t.shape, t.stride()).copy_(t) if t.is_contiguous() else storage.view(t.shape).copy_(t)


def everything(channels: int, outputs: int, size: tuple[int, int, int], batch: int, dtype: torch.dtype, change) -> None:
    """Every op of the backend, forward and backward."""
    backend, kernels = BACKENDS["triton"], load("kernels")
    x, gate, neuron, spatial, temporal = gated_inputs(batch, channels, outputs, size, dtype)
    x, gate, spatial = change(x), change(gate), change(spatial)
    draws = sample_draws(batch, channels, 3, 1)
    noise, hard, gumbel = (field[0] for field in draws)
    scoring = torch.zeros(3, channels, 1)
    for drawn in ((None, None, None), (noise, hard, gumbel)):
        kernels.route(x, scoring, gate[:1].expand(3, -1).contiguous(), *drawn, 1, 1.0, True)
    scores, sums, grads = torch.zeros(batch, 3), torch.zeros(batch, channels), (torch.zeros(batch, 3), gate, gate[:, 0])
    for gradients in (grads, (None, *grads[1:])):
        kernels.route_backward(
            gradients, scores, gumbel, neuron, sums, scoring, gate[:1].expand(3, -1).contiguous(), noise, 1, 1.0,
            (True, True, True),
        )  # fmt: skip
    for taps in (1, 9):
        backend.tap_sums(x, taps)
    for noise, hard in ((None, None), (draws.noise[0], draws.hard[0])):
        backend.semhash_gate(gate, None, noise, hard)
        backend.semhash_gate_backward(gate, gate, torch.zeros(batch, dtype=torch.int64), noise)
    y = backend.gated_conv3d(x, gate, neuron, spatial, temporal)
    for needs in ([True] * 4, [True, False, False, False], [False, False, True, False]):
        backend.gated_conv3d_backward(y, x, gate, neuron, spatial, temporal, needs)
    for kernel in ((1, 1, 1), (1, 3, 3)):
        mixing = torch.zeros(3, outputs, outputs, *kernel, dtype=dtype)
        backend.mixing_conv3d(y, neuron, mixing)
        backend.mixing_conv3d_backward(y, y, neuron, mixing, [True, True])


CASES = [
    (channels, outputs, size, batch, dtype, layout)
    for channels, outputs in ((16, 24), (17, 16), (1, 1))
    for size, batch in (((2, 4, 4), 3), ((1, 1, 1), 1), ((2, 4, 4), 16))
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (*LAYOUTS, "shifted")
]


def all_cases() -> None:
    for channels, outputs, size, batch, dtype, layout in CASES:
        change = shifted if layout == "shifted" else LAYOUTS[layout]
        of_features = change if change is shifted else lambda t, change=change: change(t) if t.dim() == 5 else t
        everything(channels, outputs, size, batch, dtype, of_features)


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
    launch._descriptor.cache_clear()
    panel = torch.zeros(64, 64)
    found = launch._descriptor(panel.data_ptr(), panel.dtype, panel.shape, (16, 32))
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
