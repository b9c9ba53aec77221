"""The GPU command without a GPU: what it plans, how it keeps to its time, and names of devices and kernels."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT
from benchmarks.gpu import bench, suite
from benchmarks.gpu.suite import Outcome, Step, allowance, chosen_steps, parse_parts, run_step, run_steps
from benchmarks.gpu.timing import NOT_RUN, rotation_count, short_name, slug

BOTH = ("triton", "cuda")


def step(name: str, least: float = 10, most: float = 100, command: list[str] | None = None, **more: Any) -> Step:
    return Step("tests", name, command or ["true"], least, most, **more)


def test_time_is_shared() -> None:
    """A step gets what the later ones do not need at the least, and no more than its own most."""
    steps = [step("first"), step("second", least=30), step("third", least=20)]
    assert allowance(steps, 0, left=500) == 100
    assert allowance(steps, 0, left=90) == 40, "90 less what the others need"
    assert allowance(steps, 2, left=90) == 90
    assert allowance(steps, 1, left=35) == 30, "too little for all: the earlier step goes first"
    assert allowance(steps, 1, left=29) == 0, "too little for itself"


def test_steps_that_do_not_fit_are_reported() -> None:
    """Late steps are not run and say so; a step that cannot run says why; neither counts as a failure."""
    ran = []

    def run(one: Step, seconds: float) -> Outcome:
        ran.append((one.name, seconds))
        return Outcome(one, True, seconds, "")

    missing = Step("sanitize", "memcheck", None, 30, 80, note="no such tool")
    outcomes = run_steps([step("first"), missing, step("long", least=1000)], time.monotonic() + 60, run)
    assert [o.ok for o in outcomes] == [True, None, None]
    assert [o.note for o in outcomes[1:]] == ["not run: no such tool", suite.LATE]
    assert [name for name, _ in ran] == ["first"] and 10 <= ran[0][1] <= 60
    lines = suite.table(outcomes)
    assert lines[0].split()[:3] == ["tests", "first", "ok"] and "no such tool" in lines[1]


def test_everything_fits_into_its_minutes(tmp_path: Path) -> None:
    """What the default parts need at the least is well under their time, build first and default tests last."""
    steps = chosen_steps(suite.all_steps(tmp_path, 9, None, 4), suite.DEFAULT_PARTS)
    assert sum(one.least for one in steps) < 0.75 * 60 * suite.MINUTES
    assert [steps[0].part, steps[-1].name] == ["build", "pytest (default tests)"]
    assert {one.part for one in steps} == set(suite.DEFAULT_PARTS)


def test_the_default_tests_are_the_default_ones(tmp_path: Path) -> None:
    """``-m`` takes the place of the project's own, so it leaves out the same marks, and what another step runs."""
    (one,) = [one for one in suite.all_steps(tmp_path, 9, None, 4) if one.name == "pytest (default tests)"]
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    expression = one.command[one.command.index("-m", 3) + 1]  # the first is Python's
    assert sorted(expression.split(" and ")) == sorted([*re.search("'(.*)'", options)[1].split(" and "), "not gpu"])


def test_parts_have_their_time(tmp_path: Path) -> None:
    """The commands of docs/gpu.md give parts that run apart the most that each step may take; tuning takes the rest."""
    commands = re.findall(r"--parts (\S+) --minutes (\d+)", (ROOT / "docs" / "gpu.md").read_text())
    assert {part for parts, _ in commands for part in parts.split(",")} == set(suite.PARTS)
    for parts, minutes in commands:
        steps = chosen_steps(suite.all_steps(tmp_path, float(minutes), None, 4), parse_parts(parts))
        most = sum(one.most for one in steps if one.part != "tune")
        assert most + suite.CLOSING_S <= 60 * int(minutes), f"{parts}: {most} s"


def test_the_benchmark_fits_into_its_step(tmp_path: Path) -> None:
    """Every row of both backends, at its most; what one backend needs is less."""
    (one,) = chosen_steps(suite.all_steps(tmp_path, 9, None, 4), ["bench"])
    assert bench.needed_seconds(1) < bench.needed_seconds(2) <= one.most - suite.LIMIT_MARGIN_S
    assert one.most + suite.CLOSING_S < 60 * suite.MINUTES, "alone it fits into the command's time"


def test_sanitizers_watch_either_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool on each backend, a step of its own; without the tool they say what is missing."""
    monkeypatch.setattr(suite, "find_sanitizer", lambda: "/tools/compute-sanitizer")
    steps = suite.sanitize_steps()
    assert [one.name for one in steps[1:]] == [f"{tool}, {b}" for tool in ("memcheck", "racecheck") for b in BOTH]
    for one in steps[1:]:
        assert one.command[-2:] == ["--backend", one.name.split(", ")[1]]
    monkeypatch.setattr(suite, "find_sanitizer", lambda: None)
    assert all(one.command is None and "not found" in one.note for one in suite.sanitize_steps())


def test_parts() -> None:
    """Chosen by name; one that does not exist is refused with the list of those that do."""
    assert parse_parts("bench, tests") == ("bench", "tests")
    assert suite.read_options(["--parts", "tune"]).parts == ("tune",)
    for text in ("bench,fly", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="wanted some of build, tests"):
            parse_parts(text)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_step_is_followed_and_ended() -> None:
    """Its last line is the note, its exit code the verdict; one that takes too long is stopped with its children."""
    log = io.StringIO()
    good = run_step(step("good", command=python("print('one'); print('two')")), 60, log)
    assert (good.ok, good.note) == (True, "two") and "one\ntwo" in log.getvalue()
    bad = run_step(step("bad", command=python("import sys; sys.exit('broken')")), 60, log)
    assert (bad.ok, bad.note) == (False, "broken")
    program = f"import sys; print('not run: no such chip'); sys.exit({NOT_RUN})"
    skipped = run_step(step("skipped", command=python(program)), 60, log)
    assert (skipped.ok, skipped.note) == (None, "not run: no such chip")
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    late = run_step(step("late", command=python(sleeper)), suite.GRACE_S + 1, log)
    assert late.ok is False and late.note.startswith("stopped after") and time.monotonic() - began < 30


def test_a_step_learns_its_own_limit() -> None:
    """The benchmark stops by itself before it is stopped."""
    program = "import sys; print(sys.argv[1:])"
    found = run_step(step("timed", command=python(program), takes_seconds="--seconds"), 100, io.StringIO())
    assert found.note == f"['--seconds', '{int(100 - suite.LIMIT_MARGIN_S)}']"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "module", ["benchmarks.gpu", "benchmarks.gpu.bench", "benchmarks.gpu.sanitize", "benchmarks.gpu.tune"]
)
def test_without_a_gpu(module: str) -> None:
    """One line that says so and an exit code, not a traceback."""
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (2 if module.endswith("tune") else 1)
    assert ("no CUDA GPU here" in done.stderr or "torch finds none" in done.stderr) and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["cpu.memory", "cpu.stages", "cpu.sweep", "gpu.bench", "gpu.sanitize", "op"])
def test_help_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As it is typed, also where there is no GPU."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{name} ")


def test_inputs_exceed_the_cache() -> None:
    """Enough copies for twice the cache, and never fewer than two."""
    megabyte = 2**20
    for size in (1, 4, 33, 50, 134, 1000):
        copies = rotation_count(size * megabyte, 50 * megabyte)
        assert copies >= 2 and copies * size > 2 * 50
        assert copies == 2 or (copies - 1) * size <= 2 * 50, "not one more than needed"


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L4", "nvidia-l4"),
    ],
)
def test_file_names(name: str, wanted: str) -> None:
    assert slug(name) == wanted


def test_kernel_names_are_short() -> None:
    assert short_name("void at::native::(anonymous namespace)::sum<float, 4>(int, float*)") == "at::native::sum"
    assert short_name("route_and_gather_kernel") == "route_and_gather_kernel"
    assert short_name("Memcpy DtoD (Device -> Device)").startswith("Memcpy DtoD")
