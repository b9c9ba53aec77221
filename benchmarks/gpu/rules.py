"""What follows from the points of :mod:`benchmarks.gpu.sweep`: where ours loses, and by which rules another runs.

A rule (:mod:`dsts_kernels.backends.gpu.measured`) stands where another backend was faster by more than 5% than the
first that can run, at every share, in every mode and dtype of the kind that was measured there. It holds between two
measured neighbours where it holds at both. The smallest sizes stand for smaller ones, the most positions for more.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsts_kernels.backends.gpu import measured
from dsts_kernels.backends.gpu.dtypes import DTYPES

__all__ = ["ALLOWED", "derive", "losing", "ratio", "summary", "words", "write"]

ALLOWED = 1.05
HANDWRITTEN = "handwritten"
FARTHEST = 2**62  # positions beyond the largest that was measured
# Ops that a choice by size may move, and the modes that must all agree. A frozen layer is chosen by channels alone.
LIVE = ("tap_sums", "gated_conv3d", "mixing_conv3d")
FAMILIES = {LIVE: ("evaluation", "training"), measured.BY_CHANNELS: ("frozen",)}

Row = dict[str, Any]
Cell = dict[str, float]  # the largest ratio of another backend to the first, by name


def ratio(ms: dict[str, float], first: str) -> float:
    """Of ours, the first backend that can run, to handwritten."""
    return ms[first] / ms[HANDWRITTEN]


def first_of(ms: dict[str, float]) -> str:
    return next(iter(ms))


def words(row: Row) -> str:
    where = f"C {row['channels']}, {row['plane']}, batch {row['batch']}, share {row['share']:g}"
    return f"{row['mode']}, {row['dtype']}, {where}"


def losing(row: Row) -> str | None:
    """A row where ours is slower than handwritten, in words; ``None`` where it is not."""
    if not row["ms"] or ratio(row["ms"], first_of(row["ms"])) <= ALLOWED:
        return None
    times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row["ms"].items())
    return f"{ratio(row['ms'], first_of(row['ms'])):.2f}: {words(row)}: {times}"


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for each mode, then every point where ours loses, the worst first."""
    lines, timed = [], [row for row in rows if row["ms"]]
    for mode in dict.fromkeys(row["mode"] for row in timed):
        ratios = [ratio(row["ms"], first_of(row["ms"])) for row in timed if row["mode"] == mode]
        slower = sum(one > ALLOWED for one in ratios)
        lines.append(
            f"{mode}: {len(ratios)} points, ours / handwritten: median {statistics.median(ratios):.2f}, largest "
            f"{max(ratios):.2f}, above {ALLOWED}: {slower}"
        )
    lost = sorted(filter(None, map(losing, timed)), key=lambda text: -float(text.split(":")[0]))
    return [*lines, *(["where ours loses:"] if lost else []), *(f"  {text}" for text in lost)]


def cells(rows: Sequence[Row], kind: str, modes: tuple[str, ...]) -> dict[int, dict[int, Cell]]:
    """By channels and positions; one that lacks a mode is left out."""
    seen: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["ms"] and row["mode"] in modes and DTYPES[getattr(torch, row["dtype"])].kind == kind:
            seen.setdefault((row["channels"], row["positions"]), []).append(row)
    found: dict[int, dict[int, Cell]] = {}
    for (channels, positions), here in sorted(seen.items()):
        if {row["mode"] for row in here} != set(modes):
            continue
        names = set.intersection(*(set(row["ms"]) for row in here)) - {HANDWRITTEN, first_of(here[0]["ms"])}
        worst = {n: max(row["ms"][n] / row["ms"][first_of(row["ms"])] for row in here) for n in sorted(names)}
        found.setdefault(channels, {})[positions] = worst
    return found


def winner(cell: Cell) -> str | None:
    """The backend that beats the first by more than 5% everywhere; ``None`` where none does."""
    name = min(cell, key=lambda n: cell[n], default=None)
    return name if name is not None and cell[name] < 1 / ALLOWED else None


def runs(
    values: Sequence[int], winners: Sequence[str | None], lowest: int, highest: int
) -> Iterator[tuple[str, int, int]]:
    """Stretches of neighbours with one winner; those at the ends reach to ``lowest`` and ``highest``."""
    start = 0
    for index in range(1, len(values) + 1):
        if index < len(values) and winners[index] == winners[start]:
            continue
        if winners[start] is not None:
            low = lowest if start == 0 else values[start]
            yield winners[start], low, highest if index == len(values) else values[index - 1]
        start = index


def stretches(by_positions: dict[int, Cell], by_channels: bool) -> list[tuple[str, int, int] | tuple[str, None]]:
    """What holds at one number of channels: stretches of positions, or one winner at all of them."""
    values = sorted(by_positions)
    winners = [winner(by_positions[value]) for value in values]
    if by_channels:
        return [(winners[0], None)] if winners[0] is not None and set(winners) == {winners[0]} else []
    return list(runs(values, winners, 1, FARTHEST))


def derive(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rules as :data:`measured.FILE` holds them."""
    found = []
    kinds = dict.fromkeys(products.kind for products in DTYPES.values())
    for kind in kinds:
        for ops, modes in FAMILIES.items():
            by_channels = ops == measured.BY_CHANNELS
            table = {c: stretches(row, by_channels) for c, row in cells(rows, kind, modes).items()}
            order = sorted(table)
            for index, channels in enumerate(order):
                for backend, *ends in table[channels]:
                    low = 1 if index == 0 else channels
                    # Between two measured neighbours with the same rule it holds as well.
                    joined = index + 1 < len(order) and (backend, *ends) in table[order[index + 1]]
                    high = order[index + 1] - 1 if joined else channels
                    found.append(
                        {
                            "ops": list(ops),
                            "kind": kind,
                            "backend": backend,
                            "channels": [low, high],
                            "positions": None if by_channels else ends,
                        }
                    )
    return found


def write(rows: Sequence[Row], architecture: str, facts: dict[str, Any], path: Path = measured.FILE) -> Path:
    """The rules of an architecture, in place of those that were there."""
    table = json.loads(path.read_text(encoding="utf-8"))
    about = {name: facts[name] for name in ("device", "torch", "triton", "commit", "date")}
    table[architecture] = about | {"points": len(rows), "rules": derive(rows)}
    text = json.dumps(table, indent=1) + "\n"
    measured.read(text)
    path.write_text(text, encoding="utf-8")
    return path
