"""Several saved runs of whole backbones in one table: ``python -m benchmarks.report.overheads FILE...``.

Each run timed some steps, in many rounds and without memory, or in few rounds and with it. A step is shown by the run
with the most rounds of its clock; memory is taken from whichever run has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .backbones import FULL, GOALS, MODES, OURS, STRETCH, TITLES, percent

__all__ = ["main", "markdown"]

NAMES = {"tpn": "TPN", "swin3d_b": "Swin-B"}
COLUMNS = ("step", "variant", "ms", "overhead", "95% of it", "goal", "GFLOP", "M numbers", "MiB", "peak MiB")
LEFT = ("step", "variant", "goal")


def short(share: float) -> str:
    """In percent: one digit behind the point up to 100%."""
    return f"{share:+.0%}" if share >= 1 else f"{share:+.1%}"


def goal(name: str, row: dict[str, Any]) -> str:
    limit = GOALS["cpu"].get((row["mode"], row["variant"], name))
    if limit is None:
        return ""
    said = f"at most {percent(limit).replace('.0%', '%')}"
    return said + (f", stretch {STRETCH:+.0%}" if (name, row["variant"]) == ("tpn", "frozen") else "")


def steps(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """By backbone, mode and clock, the rows of the run with the most rounds."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        timed = [row for row in run["backbones"] if "mode" in row]
        for key in dict.fromkeys((row["case"].partition(" ")[0], row["mode"], row["clock"]) for row in timed):
            rows = [row for row in timed if (row["case"].partition(" ")[0], row["mode"], row["clock"]) == key]
            if key not in found or rows[0]["rounds"] > found[key][0]["rounds"]:
                found[key] = rows
    return found


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Overheads by step and variant, our own in bold."""
    by_step, variants = steps(runs), list(TITLES)
    peaks = {
        (row["case"], row["mode"], row["variant"]): row["peak_mib"]
        for run in runs
        for row in run["backbones"]
        if row.get("peak_mib") is not None
    }
    lines = ["| " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "|".join(" --- " if name in LEFT else " ---: " for name in COLUMNS) + "|")
    order = [(name, mode, clock) for name in FULL for mode in MODES for clock in ("wall", "processor")]
    for name, mode, clock in (key for key in order if key in by_step):
        rows = sorted(by_step[name, mode, clock], key=lambda row: variants.index(row["variant"]))
        again = clock != "wall"
        step = "the same, time of one processor" if again else f"{NAMES[name]}, {mode}"
        step += f", {rows[0]['rounds']} rounds"
        for row in rows:
            ours = row["variant"] in OURS
            title, over, between = TITLES[row["variant"]], "-", "-"
            if "overhead" in row:
                over = f"**{short(row['overhead'])}**" if ours else short(row["overhead"])
                digits = percent if row["overhead"] < 1 else short
                between = f"{digits(row['low'])} to {digits(row['high'])}"
            held = ["", "", ""]
            if not again:
                peak = peaks.get((row["case"], mode, row["variant"]))
                held = [
                    f"{row['parameters_m']:.1f}",
                    f"{row['weights_mib']:.0f}",
                    "-" if peak is None else f"{peak:.0f}",
                ]
            cells = [step, f"**{title}**" if ours else title, f"{row['ms']:.0f}", over, between, goal(name, row)]
            lines.append("| " + " | ".join([*cells, f"{row['gflop']:.1f}", *held]) + " |")
            step = ""
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.overheads", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON written by bench_backbone.py --save-results")
    given = parser.parse_args()
    print(markdown([json.loads(path.read_text(encoding="utf-8")) for path in given.results]))


if __name__ == "__main__":
    main()
