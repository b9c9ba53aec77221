"""The paper's row, ``python -m benchmarks.gpu.v100``: a V100's time on the module, backbone left out, beside ours.

The paper gives 870 ms with the module and 741 without, as the design quotes them. Here the literal module, the best
handwritten PyTorch, FusedDSTS and FrozenDSTS evaluate TPN's features at the same batch, each compared with the float32
reference before it is timed. It runs on any CUDA GPU and says which. Without one it says what it needs. Either way the
last lines are the roofline's prediction for a V100, which is no measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.gpu.baselines import padded
from benchmarks.gpu.bench import autocast
from benchmarks.gpu.record import Bench, describe
from benchmarks.gpu.rows import evaluation_rows, graph_rows
from benchmarks.gpu.workload import Workload
from benchmarks.report.tables import TITLES, heading
from benchmarks.variants import build
from dsts_kernels.bench.handwritten import HandwrittenEval
from dsts_kernels.roofline import CHIPS, SHAPES, Case, report
from dsts_kernels.roofline.tables import table

WITH_MODULE, WITHOUT = 870.0, 741.0  # ms a batch on the paper's V100
PAPER_MS = WITH_MODULE - WITHOUT
SHAPE, BATCH = "tpn", 8
ROWS = [(SHAPE, BATCH)]
SECONDS = 200.0
OUT = ROOT / "build" / "v100.json"
PAPER = f"the paper, V100 ({WITH_MODULE:g} - {WITHOUT:g})"
NO_GPU = (
    "benchmarks.gpu.v100: no CUDA GPU here (torch.cuda.is_available() is False), so nothing was measured. It needs one "
    "of compute capability 7.0 or later, and a torch and our kernels that were built for it: docs/v100.md"
)


def measure(bench: Bench) -> None:
    """Baselines as cuDNN runs them best, then our modules on every GPU backend."""
    work = bench.work
    problem = work.problem(SHAPE, BATCH)
    torch.backends.cudnn.benchmark = True
    try:
        evaluation_rows(bench, "literal", autocast(bench, problem).eval(), ROWS)
        evaluation_rows(bench, "handwritten", padded(HandwrittenEval(work.half)), ROWS)
    finally:
        torch.backends.cudnn.benchmark = False
        work.drop()
    for backend in bench.backends:
        evaluation_rows(bench, f"fused {backend}", build("fused", "evaluation", problem, work.half, backend), ROWS)
        frozen = build("frozen", "evaluation", problem, work.half, backend)
        evaluation_rows(bench, f"frozen {backend}", frozen, ROWS)
        graph_rows(bench, f"graph {backend}", frozen, ROWS)
        work.drop()


def row(name: str, ms: float, error: float | None = None) -> tuple[str, ...]:
    return name, f"{ms:.3g}", f"{PAPER_MS / ms:.1f}", "-" if error is None else f"{error:.1e}"


def measured(bench: Bench) -> str:
    """The paper's row first, then those of this device, and every backend that could not run."""
    rows = [row(PAPER, PAPER_MS)]
    for timed in bench.results["rows"]:
        title = TITLES[timed["variant"]]
        rows.append(row(title, timed["ms"], timed["error"]) if timed["ms"] else (title, timed["note"], "-", "-"))
    head = f"evaluation, {bench.work.problem(SHAPE, BATCH).label}", "ms", "paper / this", "error"
    refused = [f"{name} did not run: {reason}" for name, reason in bench.results["backends"].items() if reason]
    return "\n".join([heading(bench.results), table(head, rows), *refused])


def predicted() -> str:
    """The frozen module on a V100, as the roofline's table has it."""
    text = report([Case(*SHAPES[SHAPE], batch=BATCH)], [CHIPS["v100"]], ("frozen",), "cuda")
    sums = next(block for block in text.split("\n\n") if block.startswith("predicted\n"))
    head = (
        f"PREDICTION, NOT A MEASUREMENT, for a V100 (the paper's: {PAPER_MS:g} ms), by python -m dsts_kernels roofline"
    )
    return "\n".join([head, *sums.splitlines()[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every row was compared and timed; 1 where one was not, or nothing could be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.v100", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON that is written (build/v100.json)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all rows together ({SECONDS:g})")
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"{NO_GPU}\n\n{PAPER}: {PAPER_MS:g} ms a batch of {BATCH}\n{predicted()}")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    work = Workload(device, torch.cuda.get_device_properties(device).L2_cache_size)
    bench = Bench(work, options.seconds, options.out, describe(device, options.commit))
    measure(bench)
    for part in ("", measured(bench), "", predicted(), *(f"FAILED {failure}" for failure in bench.failures)):
        print(part)
    return 1 if bench.failures or not bench.backends else 0


if __name__ == "__main__":
    sys.exit(main())
