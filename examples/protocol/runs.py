"""One run at a time, a file a run: what is there is kept, and the command goes on with what is missing.

A run's file says all that it depends on: the task, the arm, the seed. Where that changed it is run anew. The backbone
of a seed lies beside the runs until all of them are done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report.machine import describe
from dsts_kernels import files
from dsts_kernels.learning import load_checkpoint, save_checkpoint

from .branches import Seeded, measure
from .settings import FIRST_RECIPE, TASKS, TRIED, Arm, Task, arms_of
from .tasks import backbone_of, branch_clips, draw, train_backbone

__all__ = ["Run", "load", "path_of", "planned", "run_all", "tried"]

Run = tuple[Task, str, Arm, int]
"""Task, name of the arm, arm, seed."""


def slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def path_of(folder: Path, task: Task, name: str, seed: int) -> Path:
    return folder / task.name / f"{slug(name)}-{seed}.json"


def settings_of(task: Task, arm: Arm) -> dict[str, Any]:
    """What a run's numbers depend on, as it is read from its file again."""
    return json.loads(json.dumps({"task": asdict(task), "arm": arm.to_dict()}))


def planned(tasks: Sequence[str], seeds: Sequence[int], arms: Sequence[str] | None = None) -> Iterator[Run]:
    """Runs in the order in which they are done: a seed with all of its arms, so that its backbone is made once.

    Seeds of both tasks take turns, so that what is done at any time are whole pairs.
    """
    for seed in seeds:
        for name in tasks:
            for own, arm in arms_of(name).items():
                if arms is None or own in arms:
                    yield TASKS[name], own, arm, seed


def tried(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """Variants of the first guess, for the seeds on which settings are chosen."""
    for seed in seeds:
        for name in tasks:
            for own, (of_task, of_arm) in TRIED.items():
                task = TASKS[name]
                task = replace(task, **{key: getattr(task, key) * factor for key, factor in of_task.items()})
                changed = dict(of_arm)
                if "dsts" in changed:
                    changed["dsts"] = {**FIRST_RECIPE.dsts, **changed["dsts"]}
                yield task, own, replace(FIRST_RECIPE, title=own, **changed), seed


def load(folder: Path, run: Run) -> dict[str, Any] | None:
    """A run's record, or ``None`` where there is none of these settings."""
    task, name, arm, seed = run
    path = path_of(folder, task, name, seed)
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["settings"] == settings_of(task, arm) else None


BACKBONE = (
    "name",
    "backbone_clips",
    "size",
    "noise",
    "backbone_epochs",
    "batch",
    "width",
    "channels",
    "backbone_rate",
    "weight_decay",
    "clip_norm",
)  # what a backbone depends on
SHARED = (*BACKBONE, "branch_clips", "test_clips")  # what all that is kept of a seed depends on


class Seeds:
    """What arms of a seed share; the last seed's stays in memory, backbones on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.shared = folder, None, None

    def of(self, task: Task, seed: int) -> Seeded:
        key = json.dumps([{name: getattr(task, name) for name in SHARED}, seed])
        if key != self.key:
            self.key, self.shared = None, None  # let go of the last one first
            test = draw(task, seed, "test")
            self.shared = Seeded(
                task, seed, self.backbone(task, seed, len(test.class_names)), branch_clips(task, seed), test
            )
            self.key = key
        self.shared.task = task  # of other rates, it may be
        return self.shared

    def backbone(self, task: Task, seed: int, num_classes: int) -> torch.nn.Module:
        path = self.folder / task.name / f"backbone-{seed}.pt"
        wanted = {name: getattr(task, name) for name in BACKBONE}
        if path.exists() and (kept := load_checkpoint(path))["settings"] == wanted:
            net = backbone_of(task, num_classes)
            net.load_state_dict(kept["model"])
            return net.eval()
        began = time.process_time()
        net = train_backbone(task, seed)
        print(f"{task.name}, seed {seed}: backbone in {time.process_time() - began:.0f} s of CPU time", flush=True)
        save_checkpoint(path, {"model": net.state_dict(), "settings": wanted})
        return net


def rounded(value: Any) -> Any:
    """Floats to six digits: a run's file is read by people too, and kept in the repository."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    return [rounded(own) for own in value] if isinstance(value, (list, tuple)) else value


def run_all(runs: Sequence[Run], folder: Path, cache: Path, minutes: float, part: tuple[int, int] = (0, 1)) -> int:
    """Do what is missing until the time is over; how many runs are still missing.

    Args:
        runs: in order.
        folder: of the files.
        cache: of the backbones.
        minutes: after which no other run is begun.
        part: this process's seeds, ``(k, n)``: those at places ``k``, ``k + n``, ...
    """
    until = time.monotonic() + 60 * minutes
    seeds = list(dict.fromkeys(run[3] for run in runs))
    mine = [run for run in runs if seeds.index(run[3]) % part[1] == part[0]]
    shared, missing = Seeds(cache), 0
    for run in mine:
        if load(folder, run) is not None:
            continue
        if time.monotonic() >= until:
            missing += 1
            continue
        task, name, arm, seed = run
        began = time.process_time()
        of_seed = shared.of(task, seed)
        record = rounded(measure(of_seed, arm))
        record = {
            "task": task.name,
            "arm": name,
            "seed": seed,
            **record,
            "seconds": round(time.process_time() - began, 1),
            "settings": settings_of(task, arm),
            "machine": describe(torch.device("cpu")),
        }
        with files.replacing(path_of(folder, task, name, seed)) as beside:
            beside.write_text(json.dumps(record) + "\n", encoding="utf-8")
        print(
            f"{task.name}, seed {seed}, {name}: top-1 {record['accuracy']:.1%}, {record['seconds']:.0f} s of CPU time",
            flush=True,
        )
    return missing
