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
from benchmarks.gpu import bench, changes, suite, sweep, timing
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


def test_every_part_fits_into_nine_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of it at its most, the closing table included: a job of ten minutes holds any of them whole."""
    monkeypatch.setattr(suite, "find_sanitizer", lambda: "/tools/compute-sanitizer")
    steps = suite.all_steps(tmp_path, None, 4)
    assert list(dict.fromkeys(one.part for one in steps)) == list(suite.PARTS) and suite.MINUTES == 9
    for part in suite.PARTS:
        most = sum(one.most for one in chosen_steps(steps, [part]))
        assert most + suite.CLOSING_S <= 60 * suite.MINUTES, f"{part}: {most} s"
    assert suite.read_options([]).parts == suite.PARTS, "without a word everything runs"


def test_parts_have_times_of_their_own() -> None:
    """One that takes long leaves the next its whole time; parts run in the suite's order."""
    ran = []

    def run(one: Step, seconds: float) -> Outcome:
        ran.append((one.name, round(seconds)))
        time.sleep(0.6)
        return Outcome(one, True, seconds, "")

    steps = [Step(part, part, ["true"], 10, 1000) for part in ("build", "bench", "tune")]
    outcomes = suite.run_parts(steps, ["build", "tune"], 60, run)
    assert ran == [("build", 60), ("tune", 60)] and all(outcome.ok for outcome in outcomes)


def test_the_default_tests_are_the_default_ones(tmp_path: Path) -> None:
    """``-m`` takes the place of the project's own, so it leaves out the same marks, and what another step runs."""
    (one,) = [one for one in suite.all_steps(tmp_path, None, 4) if one.name == "pytest (default tests)"]
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    expression = one.command[one.command.index("-m", 3) + 1]  # the first is Python's
    assert sorted(expression.split(" and ")) == sorted([*re.search("'(.*)'", options)[1].split(" and "), "not gpu"])


def test_the_documentation_names_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they run, with the most that each may take."""
    monkeypatch.setattr(suite, "find_sanitizer", lambda: "/tools/compute-sanitizer")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) s \|$", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    steps = suite.all_steps(tmp_path, None, 4)
    assert rows == [(p, f"{sum(one.most for one in chosen_steps(steps, [p])):.0f}") for p in suite.PARTS]


def test_the_benchmark_fits_into_its_step(tmp_path: Path) -> None:
    """Every row of both backends, at its most; what one backend needs is less."""
    (one,) = chosen_steps(suite.all_steps(tmp_path, None, 4), ["bench"])
    assert bench.needed_seconds(1) < bench.needed_seconds(2) <= one.most - suite.LIMIT_MARGIN_S == bench.SECONDS


def test_changes_and_sweep_fit_into_their_time(tmp_path: Path) -> None:
    """Old beside new in eight minutes, the sweep in ten, their starts included; each stops before it is stopped."""
    for part, module, most in (("changes", changes, 480), ("sweep", sweep, 600)):
        (one,) = chosen_steps(suite.all_steps(tmp_path, None, 4), [part])
        assert one.most <= most and module.SECONDS <= most - suite.LIMIT_MARGIN_S and one.takes_seconds == "--seconds"


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
    assert suite.read_options(["--parts", "sweep,changes"]).parts == ("sweep", "changes")
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
    "module", [f"benchmarks.gpu{name}" for name in ("", ".bench", ".changes", ".sanitize", ".sweep", ".tune")]
)
def test_without_a_gpu(module: str) -> None:
    """One line that says so and an exit code, not a traceback."""
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA GPU here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "cpu.memory",
        "cpu.stages",
        "cpu.sweep",
        *(f"gpu.{n}" for n in ("bench", "changes", "sanitize", "sweep", "tune")),
        "op",
    ],
)
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


def test_kernel_time_is_the_sum_of_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three large launches and six small ones of one name: the median over all would tell a third of their time."""
    step = [("conv_kernel", 85.0), ("conv_kernel", 85.0), ("conv_kernel", 560.0), ("void fill<int>(int)", 1.0)] * 3
    events = step * 9 + [(name, 2 * us) for name, us in step]  # one step was disturbed
    events += [("rare_kernel", 4.0)] * 5
    monkeypatch.setattr(timing, "device_events", lambda step, repeats: events)
    conv, fill, rare = timing.kernel_times(lambda: None, repeats=10)
    assert conv == {"name": "conv_kernel", "calls": 9, "us": 2190 / 9, "launches": [85.0, 85.0, 560.0] * 3}
    assert (fill["name"], fill["calls"], fill["us"]) == ("fill", 3, 1.0)
    assert rare == {"name": "rare_kernel", "calls": 0.5, "us": 4.0, "launches": None}
    assert timing.kernel_sum([conv, fill, rare]) == pytest.approx(2190 + 3 + 2)


def test_the_host_is_timed_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step begins after a synchronisation, and its own end is not waited for."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    us = timing.host_us(lambda: order.append("step") or time.sleep(0.002), before=lambda: order.append("before"))
    assert order == ["before", "wait", "step"] * (timing.WARM_UP + timing.HOST_ROUNDS) + ["wait"]
    assert us >= 2000


def test_kernel_names_are_short() -> None:
    assert short_name("void at::native::(anonymous namespace)::sum<float, 4>(int, float*)") == "at::native::sum"
    assert short_name("route_and_gather_kernel") == "route_and_gather_kernel"
    assert short_name("Memcpy DtoD (Device -> Device)").startswith("Memcpy DtoD")
