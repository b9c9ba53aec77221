"""README's first figures from saved results: ``python -m benchmarks.report.headline CPU_FILE GPU_FILE``.

How many times faster ours is on TPN's features, and the share of memory that a training step adds, as they are rounded
in prose.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .tables import speedup

__all__ = ["lines", "main"]


def times(ratio: float) -> str:
    """With two figures, or three just above 1."""
    return f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 2 else 2}f}"


def of(results: dict[str, Any], mode: str, variant: str) -> dict[str, Any]:
    """The first row of a mode and variant: TPN's."""
    return next(row for row in results["rows"] if (row["mode"], row["variant"]) == (mode, variant))


def lines(cpu: dict[str, Any], gpu: dict[str, Any]) -> list[str]:
    """One for each figure, which comes first."""
    found = []
    for where, results, backend in (("on the CPU", cpu, ""), ("on the GPU, Triton", gpu, " triton")):
        for mode, variant in (("evaluation", "frozen"), ("training", "fused")):
            row = of(results, mode, variant + backend)
            for baseline in ("literal", "handwritten"):
                ratio = speedup(row, baseline, results["rows"])
                found.append(f"{times(ratio)} times: {baseline} / {variant}, {mode}, {row['shape']} {where}")
    share = of(cpu, "training", "fused")["peak_mib"] / of(cpu, "training", "literal")["peak_mib"]
    found.append(f"{share:.0%}: memory of a training step, fused / literal, on the CPU")
    batches = [row["shape"].split()[1].partition("x")[0] for row in (of(cpu, "evaluation", "frozen"), gpu["rows"][0])]
    return [
        *found,
        *(f"{batch}: batch {where}" for batch, where in zip(batches, ("on the CPU", "on the GPU"), strict=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.headline", description=__doc__.splitlines()[0])
    parser.add_argument("cpu", type=Path, help="JSON written by pytest benchmarks/ --save-results")
    parser.add_argument("gpu", type=Path, help="JSON of a GPU, written by make gpu")
    given = parser.parse_args()
    print("\n".join(lines(*(json.loads(path.read_text(encoding="utf-8")) for path in (given.cpu, given.gpu)))))


if __name__ == "__main__":
    main()
