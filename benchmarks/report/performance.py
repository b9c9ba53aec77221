"""Tables of docs/performance.md from saved results of a CPU: ``python -m benchmarks.report.performance FILE SWEEP``.

Goals beside what was measured; floors, which are counted operations over the rate of the library's best product; and
the sweep.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cpu.sweep import ALLOWED, BATCHES, CHANNELS, FRAMES, PLANES, SHARES
from dsts_kernels.roofline import SHAPES, Case

from .tables import SHORT as TITLES
from .tables import speedup

__all__ = ["floors", "goals", "main", "sweep"]

COMMAND = "`pytest benchmarks/ --benchmark-only`"
MORE_NEURONS, LARGE_BATCH, IMPORT, PEAK = 1.15, 8.2, 0.2, 0.4  # goals: ratios, but for seconds of an import
# Multiplications of fast convolution for each output, tiles of 4x4 positions and of 8 frames: spatial, temporal.
TILE, SPATIAL, TEMPORAL = 4, 36, 10 / 8


def find(results: dict[str, Any], mode: str, shape: str, variant: str) -> dict[str, Any]:
    rows = (row for row in results["rows"] if (row["mode"], row["variant"]) == (mode, variant))
    return next(row for row in rows if row["shape"].startswith(f"{shape} "))


def bold_if(missed: bool, text: str) -> str:
    return f"**{text}**" if missed else text


def ratio_row(results: dict[str, Any], title: str, baseline: str, mode: str, variant: str, wanted: tuple) -> list[str]:
    found = [speedup(find(results, mode, shape, variant), baseline, results["rows"]) for shape in TITLES]
    shown = [bold_if(ratio < least, f"{ratio:.2f}") for ratio, least in zip(found, wanted, strict=True)]
    return [title, " and ".join(f"{least:g}" for least in wanted), *shown]


def goals(results: dict[str, Any]) -> str:
    """Goals that a run of the module's benchmark shows; what is missed is in bold."""
    lines = ["| | goal | TPN | Swin-B | command |", "| --- | --- | ---: | ---: | --- |"]
    rows = [
        ratio_row(results, "literal reference / frozen", "literal", "evaluation", "frozen", (9, 7)),
        ratio_row(results, "best handwritten PyTorch / frozen", "handwritten", "evaluation", "frozen", (2.2, 1.8)),
        ratio_row(results, "literal / FusedDSTS training step", "literal", "training", "fused", (3.5, 3)),
    ]
    peaks = [
        find(results, "training", shape, "fused")["peak_mib"] / find(results, "training", shape, "literal")["peak_mib"]
        for shape in TITLES
    ]
    shown = [bold_if(peak > PEAK, f"{peak:.2f}") for peak in peaks]
    rows.append(["peak extra memory of a training step, fused / literal", f"at most {PEAK}", *shown])
    ends = [COMMAND, "the same", "the same", "the same"]
    by_text = {kind: [r for r in results["scaling"] if kind in r["text"]] for kind in ("neurons", "one by one", "over")}
    # Of a batch of 8 the baseline is eight calls of one sample.
    ratios = [row["ms"] / row["baseline_ms"] for row in by_text["neurons"]]
    batches = [8 * row["ms"] / row["baseline_ms"] for row in by_text["one by one"]]
    width = next(row["name"] for row in by_text["neurons"]).split("x")[1]
    for title, wanted, digits, found in (
        (f"evaluation, 100 neurons / 10, C = {width}, fused and frozen", MORE_NEURONS, 2, ratios),
        (f"batch 8 / batch 1, C = {width}, fused and frozen", LARGE_BATCH, 1, batches),
    ):
        shown = ", ".join(bold_if(one > wanted, f"{one:.{digits}f}") for one in found)
        rows.append([title, f"at most {wanted}", shown, ""])
    seconds = by_text["over"][0]["ms"] / 1e3
    shown = bold_if(seconds >= IMPORT, f"{seconds:.3f} s")
    rows.append(["`import dsts_kernels` over `import torch`", f"under {IMPORT} s", shown, ""])
    ends += ["`... --scaling`"] * 3
    return "\n".join([*lines, *(line([*row, end]) for row, end in zip(rows, ends, strict=True))])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def fast_gflop(case: Case) -> float:
    """Multiplications and additions of fast convolution, half the channels spatial."""
    _, height, width = case.size
    reach = -(-height // TILE) * -(-width // TILE) * SPATIAL / (height * width)
    spatial, temporal = case.split
    return 2e-9 * case.layers * case.positions * case.channels * (reach * spatial + TEMPORAL * temporal)


def floors(results: dict[str, Any]) -> str:
    """Operations, what they take at the library's best rate, and what was measured."""
    rate = results["rate"][results["rate"]["best"]]
    lines = [f"| | GFLOP | floor at {rate:.0f} GFLOP/s | measured |", "| --- | ---: | ---: | ---: |"]
    for shape, title in TITLES.items():
        case = Case(*SHAPES[shape], batch=1)
        row = find(results, "evaluation", shape, "literal")
        for what, gflop, variant, note in (
            (", literal evaluation", row["literal_gflop"], "literal", ""),
            (", folded and gated, direct convolution", row["useful_gflop"], "handwritten", " (handwritten)"),
            (", folded, gated, Winograd", fast_gflop(case), "frozen", ""),
        ):
            shown = f"{gflop:.1f}" if variant == "frozen" else f"{gflop:.0f}"
            measured = find(results, "evaluation", shape, variant)["ms"]
            cells = [title + what, shown, f"{gflop / rate * 1e3:.0f} ms", f"{measured:.0f} ms{note}"]
            lines.append(line(cells))
    return "\n".join(lines)


def sweep(results: dict[str, Any]) -> str:
    """Ours over the handwritten time, over all points; what is no row was beyond the limit."""
    points = math.prod(map(len, (CHANNELS, FRAMES, PLANES, BATCHES, SHARES)))
    lines = [
        "| | points | beyond the limit | median of ours / handwritten | largest | above 1.05 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    titles = {
        "frozen": "frozen",
        "evaluation": "`FusedDSTS`, evaluation",
        "training": "`FusedDSTS`, training step",
    }
    for mode, rows in results["modes"].items():
        ratios = sorted(row["ours"] / row["handwritten"] for row in rows)
        slower = sum(one > ALLOWED for one in ratios)
        counts = [str(len(rows)), str(points - len(rows)), f"{statistics.median(ratios):.2f}", f"{ratios[-1]:.2f}"]
        lines.append(line([titles[mode], *counts, str(slower)]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.performance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="JSON written by pytest benchmarks/ --scaling --save-results")
    parser.add_argument("sweep", type=Path, help="JSON written by python -m benchmarks.cpu.sweep --save")
    given = parser.parse_args()
    results, swept = (json.loads(path.read_text(encoding="utf-8")) for path in (given.results, given.sweep))
    print(goals(results), floors(results), sweep(swept), sep="\n\n")


if __name__ == "__main__":
    main()
