"""Everything that needs a GPU, in one command that ends by itself: ``python -m benchmarks.gpu``, or ``make gpu``.

Parts run one after another, each within nine minutes, so that a job of ten holds any of them alone. A step of a part is
a process of its own; it gets the part's remaining time less the later steps' minimum, and one that does not fit is
reported as not run. Output goes to the terminal and to ``gpu.log``; a short table comes last, and the exit code says
whether anything failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.gpu import goals
from benchmarks.gpu.timing import NOT_RUN, require_gpu, slug

PARTS = ("build", "tests", "sanitize", "changes", "bench", "sweep", "tune", "cpu")
GPU_BACKENDS = ("triton", "cuda")
MINUTES = 9.0  # for a part
LATE = "not run: time"
SANITIZER = "compute-sanitizer"
GRACE_S = 8.0  # from being asked to stop to being stopped
CLOSING_S = 15.0  # for the table, at the end
LIMIT_MARGIN_S = 30.0  # what a step that keeps to a limit of its own may need beyond it, its start included
TOOL_FOUND_ERRORS = 86  # exit code asked of compute-sanitizer


@dataclass(frozen=True)
class Step:
    """One process: its part, what it needs at the least to be worth starting, and the most it may take (seconds)."""

    part: str
    name: str
    command: list[str] | None  # None: it cannot run, and ``note`` says why
    least: float
    most: float
    environment: dict[str, str] = field(default_factory=dict)
    takes_seconds: str = ""  # the command's option for its own time limit
    note: str = ""


@dataclass
class Outcome:
    """A line of the closing table; ``ok`` is ``None`` for what was not run."""

    step: Step
    ok: bool | None
    seconds: float
    note: str


def allowance(steps: Sequence[Step], index: int, left: float) -> float:
    """Seconds for ``steps[index]`` when ``left`` remain: what later steps do not need at the least; 0 is too few."""
    later = sum(step.least for step in steps[index + 1 :] if step.command is not None)
    seconds = min(steps[index].most, left - later)
    if seconds < steps[index].least:  # squeezed by late steps: an earlier one goes first
        seconds = min(steps[index].least, left)
    return seconds if seconds >= steps[index].least else 0.0


def find_sanitizer() -> str | None:
    """``compute-sanitizer`` on the path, in a CUDA toolkit, or in one of NVIDIA's Python packages."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in (None, *(f"{home}/bin" for home in (*homes, "/usr/local/cuda"))):
        tool = shutil.which(SANITIZER, path=folder)
        if tool:
            return tool
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob(SANITIZER)):
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def workers(count: int) -> list[str]:
    """pytest-xdist's options where it is installed: Triton compiles for as long as the tests run, one core a worker."""
    return ["-n", str(count), "--dist", "loadfile"] if importlib.util.find_spec("xdist") and count > 1 else []


def sanitize_steps() -> list[Step]:
    """The script alone, which also fills Triton's cache of compiled kernels, then each backend under each tool."""
    python = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
    tool = find_sanitizer()
    missing = "" if tool else f"{SANITIZER} not found on PATH, in CUDA_HOME, /usr/local/cuda or NVIDIA's packages"
    steps = [Step("sanitize", "its script alone", python, 15, 60)] if tool else []
    for name in ("memcheck", "racecheck"):
        options = ["--tool", name, "--error-exitcode", str(TOOL_FOUND_ERRORS), "--print-limit", "20"]
        options += ["--target-processes", "application-only"]
        options += ["--report-api-errors", "no"] if name == "memcheck" else []
        # Without torch's cache each tensor is an allocation of its own, and what lies beyond it is out of bounds.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for backend in GPU_BACKENDS:
            command = [tool, *options, *python, "--backend", backend] if tool else None
            steps.append(Step("sanitize", f"{name}, {backend}", command, 20, 70, environment, note=missing))
    return steps


def measuring(part: str, out: Path, commit: str | None, most: float, *options: str) -> Step:
    """A benchmark that keeps to a time of its own and writes into ``out``."""
    named = ["--commit", commit] if commit else []
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", "--out", str(out), *named, *options]
    return Step(part, f"benchmarks.gpu.{part}", command, 120, most, takes_seconds="--seconds")


def all_steps(out: Path, commit: str | None, gpu_workers: int) -> list[Step]:
    """Every step of every part, in order: what says whether results are right, then what is asked most of a GPU."""
    python, cores = sys.executable, os.cpu_count() or 1
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    one_thread = {"OMP_NUM_THREADS": "2"} if workers(cores // 2) else {}
    return [
        Step("build", "pip install -e .", [*pip, "-e", "."], 10, 300),
        Step("tests", "pytest -m gpu tests", [*pytest, "-m", "gpu", "tests", *workers(gpu_workers)], 60, 520),
        *sanitize_steps(),
        measuring("changes", out, commit, 480),
        measuring("bench", out, commit, 500),
        measuring("sweep", out, commit, 520, "--rules"),
        measuring("tune", out, commit, 500),
        Step(
            "cpu",
            "pytest (default tests)",
            [*pytest, "-m", "not slow and not gpu and not emulated", *workers(min(8, cores // 2))],
            30,
            500,
            one_thread,
        ),
    ]


def chosen_steps(steps: Sequence[Step], parts: Sequence[str]) -> list[Step]:
    return [step for step in steps if step.part in parts]


def parse_parts(text: str) -> tuple[str, ...]:
    """``"build,tests"`` to parts; raises ``argparse.ArgumentTypeError`` for one that does not exist."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        got = unknown[0] if unknown else text
        raise argparse.ArgumentTypeError(f"got {got!r}, wanted some of {', '.join(PARTS)}, separated by commas")
    return parts


def stop(process: subprocess.Popen) -> None:
    """Ask a step and its children to end, then end them."""
    for sign, wait in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, sign)
            process.wait(wait)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_step(step: Step, seconds: float, log: TextIO) -> Outcome:
    """Runs a step for at most ``seconds``; its last line of output is its note."""
    time_limit = [step.takes_seconds, str(int(seconds - LIMIT_MARGIN_S))] if step.takes_seconds else []
    command = [*step.command, *time_limit]
    last = [""]

    def say(line: str) -> None:
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    def follow(stream: TextIO) -> None:
        for line in stream:
            say(line.rstrip("\n"))
            last[0] = line.strip() or last[0]

    say(f"\n== {step.part}: {step.name} (at most {seconds:.0f} s)")
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    reader = threading.Thread(target=follow, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code = process.wait(max(1.0, seconds - GRACE_S))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            stop(process)
    reader.join(GRACE_S)
    note = last[0] if code is not None else f"stopped after {seconds:.0f} s; {last[0]}"
    return Outcome(step, None if code == NOT_RUN else code == 0, time.monotonic() - began, note)


def run_parts(
    steps: Sequence[Step], parts: Sequence[str], seconds: float, run: Callable[[Step, float], Outcome]
) -> list[Outcome]:
    """Every part in turn, each within ``seconds``."""
    outcomes = []
    for part in parts:
        outcomes += run_steps(chosen_steps(steps, [part]), time.monotonic() + seconds, run)
    return outcomes


def run_steps(steps: Sequence[Step], deadline: float, run: Callable[[Step, float], Outcome]) -> list[Outcome]:
    """The steps of a part in turn, within ``deadline`` of :func:`time.monotonic`."""
    outcomes = []
    for index, step in enumerate(steps):
        if step.command is None:
            outcomes.append(Outcome(step, None, 0.0, f"not run: {step.note}"))
            continue
        seconds = allowance(steps, index, deadline - time.monotonic())
        outcomes.append(run(step, seconds) if seconds else Outcome(step, None, 0.0, LATE))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Part, step, verdict, seconds and the last line each step printed."""
    verdict = {True: "ok", False: "FAILED", None: "-"}
    cells = [[o.step.part, o.step.name, verdict[o.ok], f"{o.seconds:.0f} s", o.note[:100]] for o in outcomes]
    widths = [max(len(row[i]) for row in cells) for i in range(4)] if cells else []
    return ["  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[4]]) for row in cells]


def goal_lines(path: Path, since: float) -> list[str]:
    """Goals of a results file that this run wrote."""
    if not path.is_file() or path.stat().st_mtime < since:
        return []
    return goals.lines(json.loads(path.read_text())["goals"])


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", type=parse_parts, default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip-build", action="store_true", help="use what is installed")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for each part ({MINUTES:g})")
    parser.add_argument("--out", type=Path, help="folder of the JSON (or benchmarks/results) and of gpu.log (or build)")
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    parser.add_argument("--workers", type=int, default=6, help="processes of the GPU tests, with pytest-xdist")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    began, wall = time.monotonic(), time.time()
    options = read_options(arguments)
    device = require_gpu()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a step is ended too
    out = (options.out or RESULTS).resolve()
    logs = out if options.out else ROOT / "build"
    for folder in (out, logs):
        folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part in options.parts and not (options.skip_build and part == "build")]
    steps, seconds = all_steps(out, options.commit, options.workers), 60 * options.minutes - CLOSING_S
    with open(logs / "gpu.log", "w") as log:
        outcomes = run_parts(steps, parts, seconds, lambda step, seconds: run_step(step, seconds, log))
        name = torch.cuda.get_device_name(device)
        reached = goal_lines(out / f"{slug(name)}.json", wall)
        for line in ("", f"{name}, {time.monotonic() - began:.0f} s", *table(outcomes), "", *reached):
            print(line)
            log.write(line + "\n")
    return 1 if any(outcome.ok is False for outcome in outcomes) else 0
