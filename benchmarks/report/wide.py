"""Milliseconds of saved runs with a column for each variant: ``python -m benchmarks.report.wide FILE...``."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from .tables import SHORT, TITLES

__all__ = ["main", "markdown"]

STEPS = {"evaluation": "evaluation", "training": "training step"}


def markdown(*runs: dict[str, Any]) -> str:
    """A row for each step and shape of every run, the fastest in bold; what was not timed is left empty."""
    plain = [name for name in TITLES if " " not in name]  # no way to convolve was forced
    timed = [[row for row in run["rows"] if row["variant"] in plain and row["ms"] is not None] for run in runs]
    variants = [name for name in plain if any(row["variant"] == name for rows in timed for row in rows)]
    lines = [f"| step | shape | {' | '.join(TITLES[name] for name in variants)} |"]
    lines.append("| --- | --- |" + " ---: |" * len(variants))
    for (mode, title), (run, rows) in itertools.product(STEPS.items(), zip(runs, timed, strict=True)):
        for shape in dict.fromkeys(row["shape"] for row in rows if row["mode"] == mode):
            ms = {row["variant"]: row["ms"] for row in rows if (row["mode"], row["shape"]) == (mode, shape)}
            named = SHORT.get(shape.partition(" ")[0], shape)
            cells = []
            for name in variants:
                shown = "" if name not in ms else f"{ms[name]:.{1 if ms[name] >= 10 else 2}f}"
                cells.append(f"**{shown}**" if name in ms and ms[name] == min(ms.values()) else shown)
            line = f"| {title}, {run['dtype']} | {named} | {' | '.join(cells)} |"
            lines.append(line.replace("|  |", "| |"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.wide", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON written by pytest benchmarks/ --save-results")
    print(markdown(*(json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().results)))


if __name__ == "__main__":
    main()
