"""What the runs came to, as Markdown and JSON: arms, contrasts, counterfactuals, gates and information."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .analysis import Difference, Tested, compared, costs_of, difference, mean_interval
from .settings import ARMS, CONTRASTS, TASKS, arms_of

__all__ = ["figures_text", "markdown", "summary", "tried_text"]

MARKER = "<!-- table: python -m examples.protocol --print{} -->"  # before each table: benchmarks/report/pages.py
Records = Mapping[str, Mapping[int, Mapping[str, Any]]]
CHANGES = (
    "random routing",
    "permuted neurons",
    "best single neuron",
    "gates flipped",
    "random gates",
    "all spatial",
    "all temporal",
)


def points(found: Difference, plus: bool = True) -> str:
    """``+1.2 (0.3 to 2.1)``, in points of top-1."""
    sign = "+" if plus else ""
    if not math.isfinite(found.low):
        return f"{100 * found.mean:{sign}.1f}"
    return f"{100 * found.mean:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def flat(record: Mapping[str, Any], key: str) -> list[float]:
    """All numbers of a record's field, layers and neurons in a row."""
    return [one for own in record[key] for one in (own if isinstance(own, list) else [own])]


def average(records: Mapping[int, Mapping[str, Any]], key: str) -> float:
    """Mean over seeds, layers and neurons."""
    values = [one for record in records.values() for one in flat(record, key)]
    return sum(values) / len(values)


def beyond_chance(records: Mapping[int, Mapping[str, Any]]) -> float:
    """Share of all neurons whose spatial share lies outside the band of random gates."""
    hits = []
    for record in records.values():
        for shares, (low, high) in zip(record["spatial"], record["band"], strict=True):
            hits += [not low <= share <= high for share in shares]
    return sum(hits) / len(hits)


def arms_table(records: Records, task: str) -> list[str]:
    lines = ["| arm | seeds | top-1 % | beyond the backbone | training loss | usage in evaluation, bits | with noise |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    base = {seed: record["accuracy"] for seed, record in records.get("backbone", {}).items()}
    for name, arm in arms_of(task).items():
        own = records.get(name)
        if not own:
            continue
        accuracy = {seed: record["accuracy"] for seed, record in own.items()}
        beyond = points(difference(accuracy, base)[1]) if name != "backbone" and accuracy.keys() & base.keys() else "-"
        usage = "- | -"
        if "counterfactuals" in next(iter(own.values())):
            usage = f"{average(own, 'test_entropy'):.2f} | {average(own, 'entropy'):.2f}"
        loss = sum(record["train_loss"] for record in own.values()) / len(own)
        found = points(mean_interval(list(accuracy.values())), plus=False)
        lines.append(f"| {arm.title} | {len(own)} | {found} | {beyond} | {loss:.2f} | {usage} |")
    return lines


def contrasts_table(tested: Sequence[Tested]) -> list[str]:
    lines = ["| claim | difference in top-1, points | p | after Holm | counterfactual costs | resolution | |"]
    lines += ["| --- | ---: | ---: | ---: | --- | ---: | --- |"]
    for one in tested:
        costs = "; ".join(f"{name} {points(cost)}" for name, cost in one.costs.items()) or "-"
        claim = one.contrast.claim + (" (ours)" if one.contrast.extension else "")
        resolution = f"{100 * one.found.resolution:.1f}" if math.isfinite(one.found.resolution) else "-"
        lines.append(
            f"| {claim} | {points(one.found)} | {one.p:.3f} | {one.holm_p:.3f} | {costs} | {resolution} | "
            f"{one.verdict} |"
        )
    return lines


def counterfactuals_table(records: Records, task: str) -> list[str]:
    lines = ["| arm | " + " | ".join(CHANGES) + " |", "| --- |" + " ---: |" * len(CHANGES)]
    for name, arm in arms_of(task).items():
        own = records.get(name)
        if not own or "counterfactuals" not in next(iter(own.values())):
            continue
        measured = {row["name"] for row in next(iter(own.values()))["counterfactuals"]}
        cells = [points(costs_of(own, change)) if change in measured else "-" for change in CHANGES]
        lines.append(f"| {arm.title} | " + " | ".join(cells) + " |")
    return lines


def routing_table(records: Records, task: str) -> list[str]:
    lines = ["| arm | layer | class, bits | chance | gates beyond chance | gates that crossed |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, arm in arms_of(task).items():
        own = records.get(name)
        if not own or "counterfactuals" not in next(iter(own.values())):
            continue
        for layer in range(len(next(iter(own.values()))["layers"])):
            rows = [
                row
                for record in own.values()
                for row in record["information"]
                if (row["layer"], row["attribute"]) == (layer, "class")
            ]
            bits, chance = (sum(row[key] for row in rows) / len(rows) for key in ("bits", "chance_bits"))
            alone = {
                seed: {
                    "spatial": record["spatial"][layer : layer + 1],
                    "band": record["band"][layer : layer + 1],
                    "test_flipped": record["test_flipped"][layer : layer + 1],
                }
                for seed, record in own.items()
            }
            lines.append(
                f"| {arm.title} | {layer} | {bits:.2f} | {chance:.2f} | {beyond_chance(alone):.0%} | "
                f"{average(alone, 'test_flipped'):.0%} |"
            )
    return lines


def answers_table(tested: Mapping[str, Sequence[Tested]]) -> list[str]:
    """A row a claim, a column a task: the verdict and the difference."""
    lines = [f"| claim | {' | '.join(tested)} |", "| --- |" + " --- |" * len(tested)]
    for contrast in CONTRASTS:
        cells = []
        for own in tested.values():
            found = next((one for one in own if one.contrast == contrast), None)
            cells.append("not run" if found is None else f"{found.verdict}: {points(found.found)}")
        if set(cells) != {"not run"}:
            lines.append(f"| {contrast.claim}{' (ours)' if contrast.extension else ''} | {' | '.join(cells)} |")
    return lines


def task_text(records: Records, task: str) -> list[str]:
    own = TASKS[task]
    classes = {"dives": 16, "cells": 8}[task]
    tested, marker = compared(records, CONTRASTS), MARKER.format(f" --tasks {task}")
    lines = [
        f"## {task.capitalize()}",
        "",
        f"There are {classes} classes. A branch is trained on {own.branch_clips} clips, its backbone on "
        f"{own.backbone_clips} others, and both are tested on {own.test_clips} more. A branch takes {own.steps} steps "
        f"of {own.batch} clips. DSTS has {own.layers} {'layer' if own.layers == 1 else 'layers'} and {own.neurons} "
        f"neurons on {own.channels} channels. Intervals are 95%, over seeds.",
        "",
        marker,
        "",
        *arms_table(records, task),
        "",
        f"### {task.capitalize()}: claims",
        "",
        marker,
        "",
        *contrasts_table(tested),
        "",
        "p: exact sign flips, two-sided; Holm over all named contrasts of the task. *Resolution*: the true difference, "
        "in points, that would show in four of five repetitions at the spread seen here.",
        "",
        f"### {task.capitalize()}: what changes cost, in points of top-1",
        "",
        marker,
        "",
        *counterfactuals_table(records, task),
        "",
        f"### {task.capitalize()}: routing and gates",
        "",
        marker,
        "",
        *routing_table(records, task),
        "",
        "*Chance*: bits that shuffled labels give in at most 5 of 100 permutations. *Beyond chance*: neurons whose "
        "share of spatial channels no figure of random gates would show, in 95 of 100; gates that start apart "
        "lie there from the start. *Crossed*: gates on the other side of the threshold than at the start.",
        "",
    ]
    return lines


def markdown(records: Mapping[str, Records], command: str) -> str:
    """Every task that has runs; ``docs/results.md`` shows most of it."""
    every = [record for task in records.values() for arm in task.values() for record in arm.values()]
    machines = sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}" for r in every})
    commits = sorted({str(r["machine"].get("commit", "unknown")) for r in every})
    seconds = sum(record["seconds"] for record in every)
    lines = [
        "# Results",
        "",
        f"`{command}`: {len(every)} runs, {seconds / 3600:.1f} hours of CPU time; {'; '.join(machines)}; commits "
        f"{', '.join(commits)}. Each seed fixes clips, backbone and order for all arms; raw results are in "
        "`docs/protocol/`, one file a run. Contrasts were named before these seeds ran, and settings chosen on three "
        "others (`--tune`).",
        "",
    ]
    tested = {task: compared(own, CONTRASTS) for task, own in records.items()}
    lines += ["## Answers", "", MARKER.format(""), "", *answers_table(tested), ""]
    for task, own in records.items():
        if own:
            lines += task_text(own, task)
    return "\n".join(lines)


def summary(records: Mapping[str, Records]) -> dict[str, Any]:
    """What the tables say, for programs."""
    found: dict[str, Any] = {}
    for task, own in records.items():
        if not own:
            continue
        found[task] = {
            "arms": {
                name: mean_interval([record["accuracy"] for record in seeds.values()])._asdict()
                for name, seeds in own.items()
                if name in ARMS
            },
            "contrasts": [
                {
                    "claim": one.contrast.claim,
                    "first": one.contrast.first,
                    "second": one.contrast.second,
                    **one.found._asdict(),
                    "by_seed": one.values,
                    "p": one.p,
                    "holm_p": one.holm_p,
                    "costs": {name: cost._asdict() for name, cost in one.costs.items()},
                    "verdict": one.verdict,
                }
                for one in compared(own, CONTRASTS)
            ],
        }
    return found


def figures_text(records: Mapping[str, Records]) -> str:
    """Numbers that pages may quote, one a line: top-1 of arms, differences of contrasts and costs, in points."""
    lines = []

    def told(found: Difference, what: str) -> None:
        lines.extend(f"{100 * abs(value):.1f}: {what}" for value in (found.mean, found.low, found.high))
        lines.append(f"{100 * found.mean:.1f}%: {what}")

    for task, own in records.items():
        for name, seeds in own.items():
            told(mean_interval([record["accuracy"] for record in seeds.values()]), f"{task}, {name}, top-1")
            if "counterfactuals" in next(iter(seeds.values())):
                for row in next(iter(seeds.values()))["counterfactuals"]:
                    told(costs_of(seeds, row["name"]), f"{task}, {name}, cost of {row['name']}")
        for one in compared(own, CONTRASTS):
            told(one.found, f"{task}, {one.contrast.claim}")
    return "\n".join(lines)


def tried_text(records: Records) -> str:
    """Variants of the recipe on the seeds on which settings are chosen: accuracy, and what two changes cost."""
    lines = [f"{'variant':<22} {'seeds':>5} {'top-1 %':>8} {'permuted':>9} {'flipped':>8} {'bits':>6}"]
    for name, own in records.items():
        accuracy = mean_interval([record["accuracy"] for record in own.values()]).mean
        costs = [costs_of(own, change).mean for change in ("permuted neurons", "gates flipped")]
        lines.append(
            f"{name:<22} {len(own):>5} {100 * accuracy:>8.1f} {100 * costs[0]:>+9.1f} {100 * costs[1]:>+8.1f} "
            f"{average(own, 'test_entropy'):>6.2f}"
        )
    return "\n".join(lines)
