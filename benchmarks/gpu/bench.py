"""The GPU benchmark: every variant checked against the oracle, then timed; single kernels; the speed goals.

Our own variants run on each GPU backend in turn, beside the same baselines.

``python -m benchmarks.gpu.bench --out DIR`` writes ``DIR/<device>.json`` after every row, so a run that is stopped
leaves what it has. Rows that no longer fit into ``--seconds`` are written with the reason in place of a number, and
torch.compile comes last. :mod:`benchmarks.gpu` runs this as one of its parts; :mod:`benchmarks.report.tables` draws the
table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.baselines import HandwrittenEval, HandwrittenTrain
from benchmarks.gpu import goals
from benchmarks.gpu.baselines import GROUPINGS, AutocastDSTS, padded, training_grouping
from benchmarks.gpu.ops import OP_NEEDS, OPS, cycling, op_rows, route_rows
from benchmarks.gpu.timing import (
    Timing,
    captured,
    copy_rate,
    kernel_times,
    matrix_rate,
    peak_extra_mib,
    require_gpu,
    slug,
    time_steps,
)
from benchmarks.gpu.workload import TRAINING_BATCH, Workload, gpu_backends
from benchmarks.parity import assert_parity, relative_error, training_errors
from benchmarks.report import machine, tables
from benchmarks.shapes import Problem
from benchmarks.variants import adopt, build, restore_statistics, time_limit, training_step
from dsts_kernels.backends.cuda import native_targets

ROW_SECONDS = 0.6
ROW_NEEDS = 4.0  # seconds that a row takes with its parity check, roughly
SETUP_SECONDS = 15.0  # the two rates, weights, features and oracles
COMPILE_SECONDS = 100
LATE = "not run: time"
FROZEN_CASES = [(shape, batch) for batch in (8, 1, 32) for shape in ("tpn", "swin")]
CASES = [(shape, batch) for batch in (8, 1) for shape in ("tpn", "swin")]
TRAINING_SHAPES = ("tpn", "swin")


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What :func:`benchmarks.report.machine.describe` says, and versions of the driver, of Triton and of nvcc."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    nvcc, _ = native_targets() or ("", [])
    facts = machine.describe(device) | {"driver": driver.strip(), "triton": triton, "nvcc": nvcc}
    return facts | ({"commit": commit} if commit else {})


class Bench:
    """Collects rows, keeps to its time, and saves after each."""

    def __init__(self, work: Workload, seconds: float, target: Path, facts: dict[str, Any]) -> None:
        self.work, self.target = work, target
        self.deadline = time.monotonic() + seconds
        self.failures: list[str] = []
        reasons = gpu_backends(work.device, work.dtype)
        self.backends = [name for name, reason in reasons.items() if reason is None]
        rate = matrix_rate(work.device, work.dtype)
        self.results: dict[str, Any] = {
            "machine": facts,
            "dtype": str(work.dtype).removeprefix("torch."),
            "backends": reasons,
            "features": "none",
            "rate": rate,
            "copy_gb_s": copy_rate(work.device),
            "rows": [],
            "ops": [],
            "kernels": {},
            "goals": [],
            "scaling": [],
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        self.results["features"] = self.work.features_text
        self.results["goals"] = goals.evaluate(self.results)
        self.target.write_text(json.dumps(self.results, indent=1) + "\n")

    def row(
        self, mode: str, variant: str, problem: Problem, measure: Callable[[], dict[str, Any]], needs: float
    ) -> None:
        """One row: what ``measure`` returns, or why there is no number."""
        name = f"{mode} {problem.label} {variant}"
        try:
            measured = measure() if self.left() > needs else {"note": LATE}
        except Exception as error:
            text = str(error).strip()
            measured = {"note": "not timed: " + (text.splitlines()[0][:100] if text else type(error).__name__)}
            if variant != "compiled" or isinstance(error, AssertionError):
                self.failures.append(f"{name}: {measured['note']}")
        empty = {"ms": None, "ms_min": None, "rounds": 0, "peak_mib": None, "error": None, "note": ""}
        counted = {
            "literal_gflop": 2 * problem.literal_macs(mode) / 1e9,
            "useful_gflop": 2 * problem.useful_macs(mode) / 1e9,
        }
        row = {"mode": mode, "shape": problem.label, "variant": variant} | empty | counted | measured
        self.results["rows"].append(row)
        print(f"{name}: " + (f"{row['ms']:.3f} ms" if row["ms"] is not None else row["note"]), flush=True)
        self.save()


def timed(timing: Timing, error: float, peak: float | None, note: str = "") -> dict[str, Any]:
    numbers = {"ms": timing.median, "ms_min": timing.least, "rounds": timing.rounds}
    return numbers | {"error": error, "peak_mib": peak, "note": note}


def evaluation_rows(
    bench: Bench, variant: str, module: nn.Module, cases: Sequence[tuple[str, int]], compiled: bool = False
) -> None:
    """One row a case; every input of a case is the next samples of the pool."""
    work = bench.work

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return module(x)

    for shape, batch in cases:

        def measure(shape: str = shape, batch: int = batch) -> dict[str, Any]:
            inputs = work.inputs(shape, batch)
            wanted = work.evaluation_output(shape, batch)
            with time_limit(int(min(COMPILE_SECONDS, bench.left())) if compiled else 0):
                error = assert_parity({"output": relative_error(run(inputs[0]), wanted)}, work.dtype)
                steps = [lambda x=x: run(x) for x in inputs]
                timing = time_steps(steps, ROW_SECONDS)
            return timed(timing, error, None if compiled else peak_extra_mib(steps[0]))

        bench.row("evaluation", variant, work.problem(shape, batch), measure, ROW_NEEDS)


def graph_rows(bench: Bench, backend: str, module: nn.Module, cases: Sequence[tuple[str, int]] = CASES) -> None:
    """The frozen module replayed: a graph an input, for a static input that is written first would be in the cache."""
    work = bench.work
    for shape, batch in cases:

        def measure(shape: str = shape, batch: int = batch) -> dict[str, Any]:
            inputs, graphs, outputs = work.inputs(shape, batch), [], []
            for x in inputs:
                graph, y = captured(module, x, graphs[0].pool() if graphs else None)
                graphs.append(graph)
                outputs.append(y)
            for graph in graphs:
                graph.replay()
            first = relative_error(outputs[0], work.evaluation_output(shape, batch))
            last = relative_error(outputs[-1], module(inputs[-1]))
            error = assert_parity({"output": max(first, last)}, work.dtype)
            return timed(time_steps([graph.replay for graph in graphs], ROW_SECONDS), error, None)

        bench.row("evaluation", f"graph {backend}", work.problem(shape, batch), measure, ROW_NEEDS)


def training_row(bench: Bench, variant: str, shape: str, module: nn.Module, source: nn.Module, note: str = "") -> None:
    """A training step with every gradient, none left from the step before."""
    work = bench.work

    def measure() -> dict[str, Any]:
        draws, grad = work.draws(shape), work.output_gradient(shape)
        inputs = [x.detach().requires_grad_() for x in work.inputs(shape, TRAINING_BATCH)]
        with time_limit(int(min(COMPILE_SECONDS, bench.left())) if variant == "compiled" else 0):
            restore_statistics(module, source)
            errors = training_errors(module, inputs[0], draws, grad, work.training_oracle(shape))
            error = assert_parity(errors, work.dtype)

            def drop() -> None:
                module.zero_grad(set_to_none=True)
                for x in inputs:
                    x.grad = None

            steps = [lambda x=x: training_step(module, x, draws, grad) for x in inputs]
            drop()
            peak = None if variant == "compiled" else peak_extra_mib(steps[0])
            timing = time_steps(steps, ROW_SECONDS, before=drop)
            drop()
        return timed(timing, error, peak, note)

    bench.row("training", variant, work.problem(shape, TRAINING_BATCH), measure, 2 * ROW_NEEDS)
    work.drop(module)


def frozen_rows(bench: Bench) -> None:
    """Frozen, in graphs, and its kernels by name, on every backend."""
    work = bench.work
    for backend in bench.backends:
        frozen = build("frozen", "evaluation", work.problem("tpn", TRAINING_BATCH), work.half, backend)
        evaluation_rows(bench, f"frozen {backend}", frozen, FROZEN_CASES)
        graph_rows(bench, backend, frozen)
        name = f"frozen {backend}"
        kernel_rows(bench, name, lambda shape, run=frozen: cycling(run, work.inputs(shape, TRAINING_BATCH)))
        route_rows(bench, backend)
        work.drop()


def fused_rows(bench: Bench) -> None:
    """The live module in evaluation and in training, and its training kernels by name, on every backend."""
    work = bench.work
    problem = work.problem("tpn", TRAINING_BATCH)
    for backend in bench.backends:
        name = f"fused {backend}"
        evaluation_rows(bench, name, build("fused", "evaluation", problem, work.half, backend), CASES)
        module = build("fused", "training", problem, work.half, backend)
        for shape in TRAINING_SHAPES:
            training_row(bench, name, shape, module, work.half)

        def training_cycle(shape: str, module: nn.Module = module) -> Callable[[], object]:
            draws, grad = work.draws(shape), work.output_gradient(shape)
            inputs = itertools.cycle([x.detach().requires_grad_() for x in work.inputs(shape, TRAINING_BATCH)])

            def step() -> None:
                module.zero_grad(set_to_none=True)
                training_step(module, next(inputs), draws, grad)

            return step

        kernel_rows(bench, f"training {backend}", training_cycle)
        work.drop(module)


def kernel_rows(bench: Bench, name: str, step_of: Callable[[str], Callable[[], object]]) -> None:
    """Device time of every kernel of a step, by the profiler."""
    for shape in TRAINING_SHAPES:
        label = f"{name} {bench.work.problem(shape, TRAINING_BATCH).label}"
        if bench.left() < ROW_NEEDS:
            continue
        try:
            step = step_of(shape)
            for _ in range(3):
                step()
            bench.results["kernels"][label] = kernel_times(step)
        except Exception as error:
            bench.failures.append(f"kernels of {label}: {str(error).strip()[:100]}")
    bench.save()


def autocast(bench: Bench, problem: Problem) -> nn.Module:
    """The literal module in the benchmark's half precision."""
    module = adopt(AutocastDSTS, problem, bench.work.single)
    module.half = bench.work.dtype
    return module


def baseline_rows(bench: Bench) -> None:
    """Literal under autocast and handwritten, with cuDNN's own search of algorithms."""
    work = bench.work
    problem = work.problem("tpn", TRAINING_BATCH)
    torch.backends.cudnn.benchmark = True
    try:
        literal = autocast(bench, problem)
        evaluation_rows(bench, "literal", literal.eval(), CASES)
        evaluation_rows(bench, "handwritten", padded(HandwrittenEval(work.half)), CASES)
        work.drop()
        for shape in TRAINING_SHAPES:
            training_row(bench, "literal", shape, literal.train(), work.single)
        handwritten_training(bench)
    finally:
        torch.backends.cudnn.benchmark = False
        work.drop()


def handwritten_training(bench: Bench) -> None:
    """Each way to group samples; the faster one is the baseline, and the row says which."""
    module = adopt(HandwrittenTrain, bench.work.problem("tpn", TRAINING_BATCH), bench.work.half).train()
    for shape in TRAINING_SHAPES:
        tried = []
        for grouping in GROUPINGS:
            with training_grouping(grouping):
                training_row(bench, "handwritten", shape, module, bench.work.half, grouping)
            tried.append(bench.results["rows"].pop())
        bench.results["rows"].append(min(tried, key=lambda row: row["ms"] or float("inf")))
        bench.save()


def compiled_rows(bench: Bench) -> None:
    """torch.compile of the literal module at its best effort, last because it may take minutes."""
    work = bench.work
    for shape in TRAINING_SHAPES:
        for mode in ("evaluation", "training"):
            literal = autocast(bench, work.problem(shape, TRAINING_BATCH)).train(mode == "training")
            module = torch.compile(literal, mode="max-autotune", dynamic=False)
            if mode == "evaluation":
                evaluation_rows(bench, "compiled", module, [(shape, TRAINING_BATCH)], compiled=True)
            else:
                training_row(bench, "compiled", shape, module, work.single)
            torch.compiler.reset()
            work.drop()


def needed_seconds(backends: int) -> float:
    """Roughly, for everything but torch.compile, which takes what is left."""
    shapes, groupings = len(TRAINING_SHAPES), len(GROUPINGS)
    ours = len(FROZEN_CASES) + 2 * len(CASES) + 2 * shapes  # frozen, graphs, fused; a training row takes twice as long
    baselines = 2 * len(CASES) + 2 * shapes * (1 + groupings)
    kernels = 2 * shapes + len(OPS) * shapes
    return SETUP_SECONDS + ROW_NEEDS * (ours * backends + baselines) + OP_NEEDS * kernels * backends


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bench",
        description="Benchmarks on a CUDA GPU: writes <device>.json and prints a table.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's rows out")
    options = parser.parse_args(arguments)
    device = require_gpu()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = describe(device, options.commit)
    target = options.out / f"{slug(facts['device'])}.json"
    work = Workload(device, torch.cuda.get_device_properties(device).L2_cache_size)
    bench = Bench(work, options.seconds, target, facts)
    parts = (frozen_rows, fused_rows, op_rows, baseline_rows, *(() if options.no_compile else (compiled_rows,)))
    for part in parts:
        try:
            part(bench)
        except KeyboardInterrupt:  # out of time: what was measured is still a result
            bench.failures.append(f"stopped in {part.__name__}")
            break
        except Exception as error:  # of building a module: rows report their own
            bench.failures.append(f"{part.__name__}: {type(error).__name__}: {str(error).strip()[:200]}")
    print("\n".join(tables.plain(bench.results)))
    print(f"results written to {target}")
    for failure in bench.failures:
        print(f"FAILED {failure}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
