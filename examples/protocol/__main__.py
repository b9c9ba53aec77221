"""``python -m examples.protocol``: do what is missing, in pieces, and say what the runs so far came to.

python -m examples.protocol --minutes 60            # an hour; again: goes on
python -m examples.protocol --tune --minutes 60     # variants of the recipe, on three other seeds
python -m examples.protocol --print                 # the report of what is there, and nothing else
python -m examples.protocol --figures               # pictures of the same
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from dsts_kernels import files

from .report import Records, figures_text, markdown, summary, tried_text
from .runs import Run, load, planned, run_all, tried
from .settings import SEEDS, TASKS, TRIED, TUNING_SEEDS, arms_of

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -m examples.protocol"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--minutes", type=float, default=60.0, help="no run is begun after them (60)")
    add("--jobs", type=int, default=2, help="processes side by side, a thread each (2)")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--arms", nargs="+", metavar="ARM", help="these alone")
    add("--seeds", type=int, nargs="+", help="these alone")
    add("--tune", action="store_true", help="variants of the recipe, on the seeds for it")
    add(
        "--out",
        type=Path,
        default=ROOT / "docs",
        help="results.json, and a folder protocol of runs, with tuning inside",
    )
    add("--cache", type=Path, default=ROOT / "runs" / "protocol", help="of backbones; not needed afterwards")
    add("--print", action="store_true", help="the report of what is there, and run nothing")
    add("--figures", action="store_true", help="draw what is there, and train one run for it")
    add("--part", metavar="K/N", help=argparse.SUPPRESS)  # of the seeds, in a process of its own
    return found


def records_of(folder: Path, runs: list[Run]) -> dict[str, Records]:
    """What is there, by task, arm and seed."""
    found: dict[str, dict] = {}
    for run in runs:
        record = load(folder, run)
        if record is not None:
            found.setdefault(run[0].name, {}).setdefault(run[1], {})[run[3]] = record
    return found


def in_processes(given: argparse.Namespace, arguments: list[str]) -> None:
    """The command again, ``--jobs`` times, each with seeds of its own."""
    command = [sys.executable, "-m", "examples.protocol", *arguments]
    started = [subprocess.Popen([*command, "--part", f"{k}/{given.jobs}"], cwd=ROOT) for k in range(given.jobs)]
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        raise
    if any(codes):
        raise SystemExit(f"error: a process ended with {max(codes, key=abs)}; what was done is kept")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    this = parser()
    given = this.parse_args(arguments)
    if given.jobs < 1 or not given.minutes >= 0:
        this.error("--jobs, --minutes: wanted at least 1 process and 0 minutes")
    known = set(TRIED) if given.tune else {name for task in given.tasks for name in arms_of(task)}
    unknown = set(given.arms or ()) - known
    if unknown:
        this.error(f"--arms: got {sorted(unknown)[0]!r}, wanted some of {', '.join(sorted(known))}")
    named = TUNING_SEEDS if given.tune else SEEDS
    seeds = given.seeds or named
    if not set(seeds) <= set(named):
        this.error(f"--seeds: got {min(set(seeds) - set(named))}, wanted some of {', '.join(map(str, named))}")
    folder = given.out / "protocol" / "tuning" if given.tune else given.out / "protocol"
    if given.print or given.figures:
        records = records_of(given.out / "protocol", list(planned(list(TASKS), SEEDS)))
        records = {task: own for task, own in records.items() if task in given.tasks}
        if given.print:
            print(markdown(records, COMMAND), figures_text(records), sep="\n")
        else:
            from .figures import draw  # wants matplotlib

            print(*draw(records, given.out / "protocol", given.cache), sep="\n")
        return 0
    runs = list(tried(given.tasks, seeds) if given.tune else planned(given.tasks, seeds))
    if given.arms:
        runs = [run for run in runs if run[1] in given.arms]
    if given.part is not None:
        torch.set_num_threads(1)
        k, n = map(int, given.part.split("/"))
        run_all(runs, folder, given.cache, given.minutes, (k, n))
        return 0
    if given.minutes > 0 and any(load(folder, run) is None for run in runs):
        in_processes(given, list(arguments))
    done = sum(load(folder, run) is not None for run in runs)
    print(f"{done} of {len(runs)} runs are done" + ("" if done == len(runs) else f"; {COMMAND} goes on"))
    # The report is of all that is there, whatever part of it was asked for.
    records = records_of(folder, list((tried if given.tune else planned)(list(TASKS), named)))
    if given.tune:
        for task, own in records.items():
            print(f"\n{task}\n{tried_text(own)}")
    elif records:
        with files.replacing(given.out / "results.json") as beside:
            beside.write_text(json.dumps(summary(records), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
