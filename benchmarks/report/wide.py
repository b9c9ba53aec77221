"""Milliseconds of a saved run with a column for each variant: ``python -m benchmarks.report.wide FILE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .tables import SHORT, TITLES

__all__ = ["main", "markdown"]

STEPS = {"evaluation": "evaluation", "training": "training step"}


def markdown(results: dict[str, Any]) -> str:
    """A row for each step and shape, the fastest in bold; what was not timed is left empty."""
    rows = [row for row in results["rows"] if row["variant"] in TITLES and row["ms"] is not None]
    variants = [name for name in TITLES if any(row["variant"] == name for row in rows)]
    lines = [f"| step | shape | {' | '.join(TITLES[name] for name in variants)} |"]
    lines.append("| --- | --- |" + " ---: |" * len(variants))
    for mode, title in STEPS.items():
        for shape in dict.fromkeys(row["shape"] for row in rows if row["mode"] == mode):
            ms = {row["variant"]: row["ms"] for row in rows if (row["mode"], row["shape"]) == (mode, shape)}
            named = SHORT.get(shape.partition(" ")[0], shape)
            cells = []
            for name in variants:
                shown = "" if name not in ms else f"{ms[name]:.{1 if ms[name] >= 10 else 2}f}"
                cells.append(f"**{shown}**" if name in ms and ms[name] == min(ms.values()) else shown)
            line = f"| {title}, {results['dtype']} | {named} | {' | '.join(cells)} |"
            lines.append(line.replace("|  |", "| |"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.wide", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON written by pytest benchmarks/ --save-results")
    print(markdown(json.loads(parser.parse_args().results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
