"""A GPU's saved results by step and backend: ``python -m benchmarks.report.gpu FILE``, with shapes and with names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .tables import SHORT

__all__ = ["main", "markdown"]

BATCH = "8x"  # of the shapes that are shown
STEPS = {  # title: mode, variant of ours
    "FrozenDSTS": ("evaluation", "frozen"),
    "FrozenDSTS in a CUDA graph": ("evaluation", "graph"),
    "training step": ("training", "fused"),
    "training step in a CUDA graph": ("training", "captured"),
}
GRAPHS = ("graph", "captured")  # variants of ours; the literal module asks the host
COLUMNS = ("literal PyTorch", "best handwritten PyTorch", "Triton", "CUDA C++", "literal / Triton")
COLUMNS += ("handwritten / Triton",)


def milliseconds(ms: float) -> str:
    return f"{ms:.{1 if ms >= 10 else 2}f} ms"


def ratio(times: float) -> str:
    return f"{times:.{1 if times >= 2 else 2}f}x"


def markdown(results: dict[str, Any], short: bool = False) -> str:
    """Milliseconds by step and shape, ours in bold where it is the faster of the two backends; ``short`` names.

    A graph of ours stands beside a graph of the handwritten module, and is compared with its faster form.
    """
    ms = {(row["mode"], row["shape"], row["variant"]): row["ms"] for row in results["rows"]}
    shapes = [shape for shape in dict.fromkeys(row["shape"] for row in results["rows"]) if f" {BATCH}" in shape]
    lines = [f"| step | shape | {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * len(COLUMNS)]
    for title, (mode, variant) in STEPS.items():
        for shape in shapes:
            ours = [ms.get((mode, shape, f"{variant} {backend}")) for backend in ("triton", "cuda")]
            if None in ours:
                continue  # a run from before it was timed
            theirs = [ms[mode, shape, name] for name in ("literal", "handwritten")]
            shown = [f"**{milliseconds(one)}**" if one == min(ours) else milliseconds(one) for one in ours]
            alone = [milliseconds(one) for one in theirs]
            if variant in GRAPHS:
                graph = ms.get((mode, shape, "handwritten graph"))
                alone = ["-", milliseconds(graph) if graph else "-"]
                theirs[1] = min(theirs[1], graph or theirs[1])
            named = SHORT[shape.partition(" ")[0]] if short else shape
            cells = [title, named, *alone, *shown, *(ratio(one / ours[0]) for one in theirs)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of a GPU, written by make gpu")
    results = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))
    print(markdown(results), markdown(results, short=True), sep="\n\n")


if __name__ == "__main__":
    main()
