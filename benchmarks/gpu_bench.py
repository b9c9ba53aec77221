"""The GPU benchmark: every variant checked against the oracle, then timed; single kernels; the speed goals.

``python -m benchmarks.gpu_bench --out DIR`` writes ``DIR/<device>.json`` after every row, so a run that is stopped
leaves what it has. Rows that no longer fit into ``--seconds`` are written with the reason in place of a number, and
torch.compile comes last. :mod:`benchmarks.gpu` runs this as one of its parts; :mod:`benchmarks.report` draws the
table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_goals, machine, report
from benchmarks.baselines import HandwrittenEval, HandwrittenTrain
from benchmarks.bench_module import assert_parity
from benchmarks.gpu_baselines import PLANS, AutocastDSTS, padded, training_plan
from benchmarks.gpu_timing import (
    Timing,
    captured,
    copy_rate,
    device_events,
    kernel_times,
    matrix_rate,
    peak_extra_mib,
    require_gpu,
    slug,
    time_steps,
)
from benchmarks.gpu_workload import DTYPE, TRAINING_BATCH, Workload
from benchmarks.parity import relative_error, training_errors
from benchmarks.shapes import Problem
from benchmarks.variants import adopt, build, restore_statistics, time_limit, training_step
from dsts_kernels.functional import semhash_gate
from dsts_kernels.ops import tap_sums

ROW_SECONDS = 0.6
ROW_NEEDS = 4.0  # seconds that a row takes with its parity check, roughly
COMPILE_SECONDS = 100
PACK_KERNEL = re.compile(r"route|pack")
LATE = "not run: time"
FROZEN_CASES = [(shape, batch) for batch in (8, 1, 32) for shape in ("tpn", "swin")]
CASES = [(shape, batch) for batch in (8, 1) for shape in ("tpn", "swin")]
TRAINING_SHAPES = ("tpn", "swin")


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What :func:`benchmarks.machine.describe` says, the driver and Triton's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    found = machine.describe(device) | {"driver": driver.strip(), "triton": triton}
    return found | ({"commit": commit} if commit else {})


class Bench:
    """Collects rows, keeps to its time, and saves after each."""

    def __init__(self, work: Workload, seconds: float, target: Path, facts: dict[str, Any]) -> None:
        self.work, self.target = work, target
        self.deadline = time.monotonic() + seconds
        self.failures: list[str] = []
        rate = matrix_rate(work.device, DTYPE)
        self.results: dict[str, Any] = {
            "machine": facts,
            "dtype": str(DTYPE).removeprefix("torch."),
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
        self.results["goals"] = gpu_goals.evaluate(self.results)
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
    found = {"ms": timing.median, "ms_min": timing.least, "rounds": timing.rounds}
    return found | {"error": error, "peak_mib": peak, "note": note}


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
                error = assert_parity({"output": relative_error(run(inputs[0]), wanted)}, DTYPE)
                steps = [lambda x=x: run(x) for x in inputs]
                timing = time_steps(steps, ROW_SECONDS)
            return timed(timing, error, None if compiled else peak_extra_mib(steps[0]))

        bench.row("evaluation", variant, work.problem(shape, batch), measure, ROW_NEEDS)


def graph_rows(bench: Bench, module: nn.Module) -> None:
    """The frozen module replayed: a graph an input, for a static input that is written first would be in the cache."""
    work = bench.work
    for shape, batch in CASES:

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
            error = assert_parity({"output": max(first, last)}, DTYPE)
            return timed(time_steps([graph.replay for graph in graphs], ROW_SECONDS), error, None)

        bench.row("evaluation", "graph", work.problem(shape, batch), measure, ROW_NEEDS)


def training_row(bench: Bench, variant: str, shape: str, module: nn.Module, source: nn.Module, note: str = "") -> None:
    """A training step with every gradient, none left from the step before."""
    work = bench.work

    def measure() -> dict[str, Any]:
        draws, grad = work.draws(shape), work.output_gradient(shape)
        inputs = [x.detach().requires_grad_() for x in work.inputs(shape, TRAINING_BATCH)]
        with time_limit(int(min(COMPILE_SECONDS, bench.left())) if variant == "compiled" else 0):
            restore_statistics(module, source)
            errors = training_errors(module, inputs[0], draws, grad, work.training_oracle(shape))
            error = assert_parity(errors, DTYPE)

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
    """Frozen, in graphs, and its kernels by name."""
    work = bench.work
    frozen = build("frozen", "evaluation", work.problem("tpn", TRAINING_BATCH), work.half)
    evaluation_rows(bench, "frozen", frozen, FROZEN_CASES)
    graph_rows(bench, frozen)
    kernel_rows(bench, "frozen", lambda shape: cycling(frozen, work.inputs(shape, TRAINING_BATCH)))
    pack_rows(bench)


def fused_rows(bench: Bench) -> None:
    """The live module in evaluation and in training, and its training kernels by name."""
    work = bench.work
    problem = work.problem("tpn", TRAINING_BATCH)
    evaluation_rows(bench, "fused", build("fused", "evaluation", problem, work.half), CASES)
    module = build("fused", "training", problem, work.half)
    for shape in TRAINING_SHAPES:
        training_row(bench, "fused", shape, module, work.half)

    def training_cycle(shape: str) -> Callable[[], object]:
        draws, grad = work.draws(shape), work.output_gradient(shape)
        inputs = itertools.cycle([x.detach().requires_grad_() for x in work.inputs(shape, TRAINING_BATCH)])

        def step() -> None:
            module.zero_grad(set_to_none=True)
            training_step(module, next(inputs), draws, grad)

        return step

    kernel_rows(bench, "training", training_cycle)
    work.drop(module)


def cycling(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A step that takes the next input each time."""
    turn = itertools.cycle(inputs)

    @torch.inference_mode()
    def step() -> object:
        return call(next(turn))

    return step


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


def add_op(bench: Bench, op: str, shape: str, us: float | None, moved: int) -> None:
    bench.results["ops"].append({"op": op, "shape": shape, "us": us, "bytes": moved})
    text = "not measured" if us is None else f"{us:.1f} us, {moved / us / 1e3:.0f} GB/s"
    print(f"{op} {shape}: {text}", flush=True)
    bench.save()


def pack_rows(bench: Bench) -> None:
    """Route-and-pack, the first of a frozen layer's two kernels: reads features, writes as much in panels."""
    for shape in TRAINING_SHAPES:
        label = bench.work.problem(shape, TRAINING_BATCH).label
        kernels = bench.results["kernels"].get(f"frozen {label}", [])
        found = [kernel["us"] for kernel in kernels if PACK_KERNEL.search(kernel["name"])]
        x = bench.work.inputs(shape, TRAINING_BATCH)[0]
        add_op(bench, "route and pack", label, max(found, default=None), 2 * x.numel() * x.element_size())


def op_rows(bench: Bench) -> None:
    """Channel sums and SemHash on their own: device time of their kernels, all of a call together."""

    def device_us(step: Callable[[], object], repeats: int = 20) -> float | None:
        if bench.left() < ROW_NEEDS:
            return None
        for _ in range(3):
            step()
        return sum(us for _, us in device_events(step, repeats)) / repeats

    work = bench.work
    for shape in TRAINING_SHAPES:
        inputs = work.inputs(shape, TRAINING_BATCH)
        moved = inputs[0].numel() * inputs[0].element_size()
        step = cycling(lambda x: tap_sums(x, 1), inputs)
        add_op(bench, "channel sums", work.problem(shape, TRAINING_BATCH).label, device_us(step), moved)

    logits = work.half.layers[0].gate.detach().clone().requires_grad_()
    size = (TRAINING_BATCH, logits.shape[1])
    noise, grad = (torch.randn(size, device=work.device).to(DTYPE) for _ in range(2))
    hard = torch.arange(TRAINING_BATCH, device=work.device) % 2 == 0
    neuron = torch.arange(TRAINING_BATCH, device=work.device) % logits.shape[0]
    text, row = f"{size[0]}x{size[1]}", noise.numel() * noise.element_size()
    forward = device_us(lambda: semhash_gate(logits.detach(), noise, hard, neuron=neuron))
    add_op(bench, "SemHash forward", text, forward, 3 * row)
    gate = semhash_gate(logits, noise, hard, neuron=neuron)
    backward = device_us(lambda: torch.autograd.grad(gate, logits, grad, retain_graph=True))
    add_op(bench, "SemHash backward", text, backward, 3 * row + logits.numel() * logits.element_size())


def baseline_rows(bench: Bench) -> None:
    """Literal under autocast and handwritten, with cuDNN's own search of algorithms."""
    work = bench.work
    problem = work.problem("tpn", TRAINING_BATCH)
    torch.backends.cudnn.benchmark = True
    try:
        literal = adopt(AutocastDSTS, problem, work.single)
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
        for plan in PLANS:
            with training_plan(plan):
                training_row(bench, "handwritten", shape, module, bench.work.half, plan)
            tried.append(bench.results["rows"].pop())
        bench.results["rows"].append(min(tried, key=lambda row: row["ms"] or float("inf")))
        bench.save()


def compiled_rows(bench: Bench) -> None:
    """torch.compile of the literal module at its best effort, last because it may take minutes."""
    work = bench.work
    for shape in TRAINING_SHAPES:
        for mode in ("evaluation", "training"):
            literal = adopt(AutocastDSTS, work.problem(shape, TRAINING_BATCH), work.single).train(mode == "training")
            module = torch.compile(literal, mode="max-autotune", dynamic=False)
            if mode == "evaluation":
                evaluation_rows(bench, "compiled", module, [(shape, TRAINING_BATCH)], compiled=True)
            else:
                training_row(bench, "compiled", shape, module, work.single)
            torch.compiler.reset()
            work.drop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Benchmarks on a CUDA GPU: writes <device>.json and prints a table.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    parser.add_argument("--seconds", type=float, default=240.0)
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
    print("\n".join(report.plain(bench.results)))
    print(f"results written to {target}")
    for failure in bench.failures:
        print(f"FAILED {failure}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
