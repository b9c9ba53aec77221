"""The GPU benchmark: every variant checked against the oracle, then timed; single kernels; the speed goals.

Our own variants run on each GPU backend in turn, beside the same baselines.

``python -m benchmarks.gpu.bench --out DIR`` writes ``DIR/<device>.json`` after every row, so a run that is stopped
leaves what it has. Rows that no longer fit into ``--seconds`` are written with the reason in place of a number, and
torch.compile comes last. :mod:`benchmarks.gpu` runs this as one of its parts; :mod:`benchmarks.report.tables` draws the
table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import RESULTS
from benchmarks.gpu.baselines import AutocastDSTS, PickedEval, padded
from benchmarks.gpu.handwritten import BY_SAMPLE, GROUPINGS, GpuTrain
from benchmarks.gpu.ops import OP_NEEDS, OPS, cycling, op_rows, route_rows
from benchmarks.gpu.record import Bench, describe
from benchmarks.gpu.rows import (
    CASES,
    ROW_NEEDS,
    TRAINING_SHAPES,
    captured_training_row,
    evaluation_rows,
    graph_rows,
    kernel_rows,
    training_cycle,
    training_row,
)
from benchmarks.gpu.timing import require_gpu, slug
from benchmarks.gpu.workload import TRAINING_BATCH, Workload
from benchmarks.report import tables
from benchmarks.shapes import Problem
from benchmarks.variants import adopt, build
from dsts_kernels.bench.handwritten import HandwrittenEval

SETUP_SECONDS = 15.0  # the two rates, weights, features and oracles
SECONDS = 470.0
FROZEN_CASES = [(shape, batch) for batch in (8, 1, 32) for shape in ("tpn", "swin")]
GRAPH_CASES = CASES[:2]  # of the live module


def frozen_rows(bench: Bench) -> None:
    """Frozen, in graphs, and its kernels by name, on every backend."""
    work = bench.work
    for backend in bench.backends:
        frozen = build("frozen", "evaluation", work.problem("tpn", TRAINING_BATCH), work.half, backend)
        evaluation_rows(bench, f"frozen {backend}", frozen, FROZEN_CASES)
        graph_rows(bench, f"graph {backend}", frozen)
        name = f"frozen {backend}"
        kernel_rows(bench, name, lambda shape, run=frozen: cycling(run, work.inputs(shape, TRAINING_BATCH)))
        route_rows(bench, backend)
        work.drop()


def fused_rows(bench: Bench) -> None:
    """The live module in evaluation and in training, in graphs too, and the kernels of both, on every backend."""
    work = bench.work
    problem = work.problem("tpn", TRAINING_BATCH)
    for backend in bench.backends:
        name = f"fused {backend}"
        module = build("fused", "evaluation", problem, work.half, backend)
        evaluation_rows(bench, name, module, CASES)
        graph_rows(bench, f"captured {backend}", module, GRAPH_CASES)
        step_of = lambda shape, run=module: cycling(run, work.inputs(shape, TRAINING_BATCH))  # noqa: E731
        kernel_rows(bench, f"evaluation {backend}", step_of)
        module = build("fused", "training", problem, work.half, backend)
        for shape in TRAINING_SHAPES:
            training_row(bench, name, shape, module, work.half)
            captured_training_row(bench, f"captured {backend}", shape, module, work.half)
        kernel_rows(bench, f"training {backend}", lambda shape, run=module: training_cycle(bench, shape, run))
        work.drop(module)


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
        graph_rows(bench, "handwritten graph", PickedEval(work.half), CASES)
        work.drop()
        for shape in TRAINING_SHAPES:
            training_row(bench, "literal", shape, literal.train(), work.single)
        handwritten_training(bench)
    finally:
        torch.backends.cudnn.benchmark = False
        work.drop()


def fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of rows that stand for one baseline; one that was not timed only where none was."""
    return min(rows, key=lambda row: row["ms"] or float("inf"))


def handwritten_training(bench: Bench) -> None:
    """Each way to group samples; the fastest is the baseline, and the row says which. The one that asks nothing of the
    host is captured as well."""
    work = bench.work
    module = adopt(GpuTrain, work.problem("tpn", TRAINING_BATCH), work.half).train()
    best = {}
    for shape in TRAINING_SHAPES:
        tried = []
        for grouping in GROUPINGS:
            training_row(bench, "handwritten", shape, module.group(grouping), work.half, grouping)
            tried.append(bench.results["rows"].pop())
        bench.results["rows"].append(fastest(tried))
        best[shape] = fastest(tried)["note"] if fastest(tried)["ms"] else BY_SAMPLE
        captured_training_row(bench, "handwritten graph", shape, module.group(BY_SAMPLE), work.half, BY_SAMPLE)
    kernel_rows(bench, "training handwritten", lambda shape: training_cycle(bench, shape, module.group(best[shape])))
    work.drop(module)


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
    ours = len(FROZEN_CASES) + 2 * len(CASES) + len(GRAPH_CASES)  # frozen, graphs, live, graphs
    ours += 2 * 2 * shapes  # training and its graph: each takes twice as long
    baselines = 3 * len(CASES) + 2 * shapes * (2 + groupings)
    kernels = shapes * ((3 + len(OPS)) * backends + 1)
    return SETUP_SECONDS + ROW_NEEDS * (ours * backends + baselines) + OP_NEEDS * kernels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bench",
        description="Benchmarks on a CUDA GPU: writes <device>.json and prints a table.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS)
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
