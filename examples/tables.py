"""The paper's tables at the scale of the synthetic task: ``python examples/tables.py`` (about an hour on two cores).

Every row is trained with each seed by ``examples/train.py``, one process and thread a run, so runs side by side give
the same numbers. What is finished is kept: interrupted, the command goes on where it was. Times are measured
afterwards, alone, the variants taking turns. Results go to ``docs/results.json`` and ``docs/results.md``, figures to
``docs/training``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report.machine import describe
from dsts_kernels import viz
from dsts_kernels.learning import load_checkpoint
from examples.options import parse
from examples.train import Trainer

SEEDS = (0, 1, 2)
MARKER = "<!-- table: python examples/tables.py --print -->"  # before each table: benchmarks/report/pages.py
NOTES = "## What to make of it"  # what follows it in results.md is written by hand and kept
BASE = "DSTS"


# What each row asks of examples/train.py beyond the defaults.
ROWS = {
    "backbone": ("--no-dsts",),
    BASE: (),
    "joint": ("--learning", "joint"),
    "fast gates": ("--upstream-rate", "4e-3"),
    "joint, fast gates": ("--upstream-rate", "4e-3", "--learning", "joint"),
    "no skip": ("--no-skip",),
    "scoring 1x3x3": ("--scoring-kernel", "1x3x3"),
    "scoring width 2": ("--scoring-width", "2"),
    "mixing 1x3x3": ("--mixing-kernel", "1x3x3"),
    "mixing 3x1x1": ("--mixing-kernel", "3x1x1"),
    "sum, joint": ("--score-reduction", "sum", "--learning", "joint"),
}
# Title, and its rows with the title each has there; the first is what the others are held against.
TABLES = (
    (
        "Table 4: DSTS beside the backbone",
        (("backbone", "backbone"), (BASE, "with DSTS, upstream-downstream"), ("joint", "with DSTS, joint")),
    ),
    ("Table 1: skip connection", ((BASE, "with"), ("no skip", "without"))),
    (
        "Table 2: scoring kernel",
        ((BASE, "1x1x1"), ("scoring 1x3x3", "1x3x3"), ("scoring width 2", "1x1x1, twice the outputs")),
    ),
    ("Table 3: mixing kernel", ((BASE, "1x1x1"), ("mixing 1x3x3", "1x3x3"), ("mixing 3x1x1", "3x1x1"))),
    (
        "Learning, and the rate of gates and scores",
        (
            ("joint", "joint, 1e-3"),
            (BASE, "upstream-downstream, 1e-3"),
            ("joint, fast gates", "joint, 4e-3, the rate of the rest"),
            ("fast gates", "upstream-downstream, 4e-3"),
        ),
    ),
    ("Ours: scale of the scores, joint", (("joint", "mean over positions"), ("sum, joint", "sum, as the paper"))),
)
BY_SEED = {
    "backbone": "backbone",
    BASE: "with DSTS, upstream-downstream, 1e-3",
    "joint": "with DSTS, joint, 1e-3",
    "joint, fast gates": "with DSTS, joint, 4e-3",
}
IN_README = {BASE: "with DSTS, upstream-downstream", "backbone": "backbone"}
TOLD = {  # rows whose routing is looked into
    BASE: "upstream-downstream",
    "joint": "joint",
    "joint, fast gates": "joint, 4e-3",
    "sum, joint": "joint, scores summed",
}
TOLD_OF = ("shape", "timing", "class")
FIGURES = {
    "gates": "Share of channels that each neuron sends to either operator",
    "activation": "Neurons that each shape and timing activates",
    "examples": "Test clips and the neurons that they activate",
    "usage": "Neurons that training samples chose, by epoch",
    "saturation": "Saturated gates and dead neurons, by epoch",
}
TIMED = {
    "backbone": ("--no-dsts",),
    "with DSTS, joint": ("--learning", "joint"),
    "with DSTS, upstream-downstream": (),
    "with literal DSTS, joint": ("--learning", "joint", "--literal"),
    "with literal DSTS, upstream-downstream": ("--literal",),
}


def folder(name: str, seed: int, runs: Path) -> Path:
    return runs / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def run_one(name: str, seed: int, runs: Path, extra: list[str]) -> list[dict]:
    """The history of one run, from disk where it is finished."""
    out = folder(name, seed, runs)
    command = ["--quiet", "--threads", "1", "--seed", str(seed), "--out", str(out), *ROWS[name], *extra]
    epochs = parse(command).epochs
    metrics = out / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.exists() else []
    if (out / "checkpoint.pt").exists():
        kept, wanted = load_checkpoint(out / "checkpoint.pt")["options"], vars(parse(command))
        changed = [k for k in wanted if k not in ("resume", "out") and kept.get(k) != wanted[k]]
        if changed:
            raise SystemExit(
                f"error: {out} was trained with other options ({', '.join(changed)}); remove it or give --runs"
            )
    if len(found) < epochs:
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        subprocess.run([sys.executable, str(ROOT / "examples" / "train.py"), *command, *resume], check=True)
        found = json.loads(metrics.read_text())
    print(f"{name}, seed {seed}: top-1 {found[-1]['top1']:.1%}", flush=True)
    return found


def time_steps(seconds: float, extra: list[str]) -> dict[str, float]:
    """Milliseconds of a training step of each variant, the median; variants take turns."""
    trainers, times = {}, {name: [] for name in TIMED}
    for name, options in TIMED.items():
        trainer = Trainer(parse(["--quiet", "--clips", "256", "--test-clips", "16", *options, *extra]))
        trainer.wrapped.train()
        trainers[name] = trainer
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name, trainer in trainers.items():
            steps = trainer.losses()
            next(steps)  # reads ahead
            began = time.perf_counter()
            next(steps)
            times[name].append((time.perf_counter() - began) * 1e3)
            steps.close()
    return {name: statistics.median(found) for name, found in times.items()}


def summary(histories: list[list[dict]]) -> dict:
    """Mean and spread (standard deviation over seeds) of the last epoch, and how the routing ended."""
    last = [history[-1] for history in histories]
    found = {"top1": [record["top1"] for record in last]}
    found["mean"] = statistics.mean(found["top1"])
    found["spread"] = statistics.stdev(found["top1"]) if len(last) > 1 else 0.0
    found["mean_class_accuracy"] = statistics.mean(record["mean_class_accuracy"] for record in last)
    found["train_loss"] = statistics.mean(record["train_loss"] for record in last)
    if "dead" in last[0]:
        found["dead"] = statistics.mean(sum(record["dead"]) for record in last)
        found["entropy"] = statistics.mean(statistics.mean(record["entropy"]) for record in last)
        found["saturated"] = statistics.mean(statistics.mean(record["saturated"]) for record in last)
    return found


def specialization(names: list[str], seeds: list[int], runs: Path) -> dict[str, list[dict]]:
    """By row and layer, the mean over seeds: bits that a test clip's neuron tells of its shape, timing and class."""
    found = {}
    for name in names:
        tables = [
            viz.information_table(load_checkpoint(folder(name, s, runs) / "checkpoint.pt")["routing"]) for s in seeds
        ]
        layers = sorted({row["layer"] for row in tables[0]})
        found[name] = [
            {
                f"{attribute} {kind}": statistics.mean(
                    row[column]
                    for table in tables
                    for row in table
                    if (row["layer"], row["attribute"]) == (layer, attribute)
                )
                for attribute in TOLD_OF
                for kind, column in (("bits", "bits"), ("shuffled", "shuffled_bits"))
            }
            for layer in layers
        ]
    return found


def markdown(results: dict) -> str:
    """``docs/results.md``."""
    rows, machine = results["rows"], results["machine"]
    lines = [
        "# Results on the synthetic task",
        "",
        f"`{results['command']}` trained these runs and wrote the tables: seeds "
        f"{', '.join(map(str, results['seeds']))}, {machine['device']}, "
        f"torch {machine['torch']}, commit {machine.get('commit', 'unknown')}. "
        f"There are {results['options']['clips']} training and {results['options']['test_clips']} test clips of 16 "
        f"classes, and {results['options']['epochs']} epochs.",
        "",
        "- *Top-1* is that of the last epoch on the test set: mean and standard deviation over seeds.",
        "- *Loss* is the training loss of the last epoch.",
        "- *Dead* counts neurons, over all layers, that took no training sample in the last epoch.",
        "- *Usage* is the entropy of a layer's choices in training: 0 bits where one neuron takes all samples, 2 bits "
        "where four neurons share them evenly.",
        "- *Joint* training learns all parameters from all clips. With *upstream-downstream*, gates and scores learn "
        "from a quarter of an epoch's clips, and all else from the rest. So its epoch has three quarters of the steps.",
        "",
    ]
    for title, listed in TABLES:
        lines += [f"## {title}", "", MARKER, "", "| | top-1 % | against the first row | loss | dead | usage, bits |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        first = rows[listed[0][0]]["mean"]
        for name, shown in listed:
            own = rows[name]
            health = f"{own['dead']:.1f} | {own['entropy']:.2f}" if "dead" in own else "- | -"
            lines.append(
                f"| {shown} | {own['mean']:.1%} ± {own['spread']:.1%} | {(own['mean'] - first) * 100:+.1f} | "
                f"{own['train_loss']:.2f} | {health} |".replace("%", "")
            )
        lines.append("")
    lines += ["## What the neurons tell", "", MARKER, "", "| | layer | shape, bits | timing, bits | class, bits |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, layers in results["specialization"].items():
        for layer, own in enumerate(layers):
            bits = " | ".join(f"{own[f'{a} bits']:.2f} ({own[f'{a} shuffled']:.2f})" for a in TOLD_OF)
            lines.append(f"| {TOLD[name]} | {layer} | {bits} |")
    lines += [
        "",
        "The table says how much the neuron of a test clip tells about its shape, timing (2 bits each) and class (4 "
        "bits): mutual information, the mean over seeds. In brackets stands what shuffled labels give by chance. "
        "Pictures are of the first seed, upstream-downstream.",
        "",
        *(f"![{title}](training/{name}.png)" for name, title in FIGURES.items()),
        "",
    ]
    lines += ["## Training time", "", MARKER, "", "| | ms per step | against the backbone |", "| --- | ---: | ---: |"]
    base_ms = results["step_ms"]["backbone"]
    for name, ms in results["step_ms"].items():
        lines.append(f"| {name} | {ms:.1f} | {ms / base_ms:.2f}x |")
    lines += [
        "",
        "A step takes 32 clips. A step of upstream-downstream goes through lines 4, 6 and 8 of Algorithm 1, and takes "
        f"32 clips of each part. All variants took turns, on {results['timing_threads']} threads.",
        "",
        "",
    ]
    return "\n".join(lines)


def by_seed(results: dict) -> str:
    """One more table of results.md, top-1 of each seed beside the backbone's; and lines of README's figures."""
    rows, backbone = results["rows"], results["rows"]["backbone"]["top1"]
    lines = ["| | top-1 % | beyond the backbone |", "| --- | --- | --- |"]
    for name, title in BY_SEED.items():
        top1 = rows[name]["top1"]
        beyond = [f"{(own - base) * 100:+.1f}" for own, base in zip(top1, backbone, strict=True)]
        cells = [", ".join(f"{own:.1%}".rstrip("%") for own in top1), "" if name == "backbone" else ", ".join(beyond)]
        lines.append(f"| {title} | {' | '.join(cells)} |".replace("|  |", "| |"))
    lines.append("")
    for name, title in IN_README.items():
        lines.append(f"{rows[name]['mean']:.1%}: top-1, {title}")
        lines.append(f"{rows[name]['spread'] * 100:.1f}: standard deviation of it over seeds")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--runs", type=Path, default=ROOT / "runs" / "tables", help="where runs are kept")
    cli.add_argument("--out", type=Path, default=ROOT / "docs", help="of results.json and results.md")
    cli.add_argument("--jobs", type=int, default=2, help="runs side by side")
    cli.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    cli.add_argument("--timing", type=float, default=60.0, help="seconds")
    cli.add_argument("--print", action="store_true", help="every table of results.json, and run nothing")
    given, extra = cli.parse_known_args(arguments)  # the rest goes to train.py
    if given.print:
        results = json.loads((given.out / "results.json").read_text(encoding="utf-8"))
        print(markdown(results), by_seed(results), sep="\n")
        return
    work = [(name, seed) for seed in given.seeds for name in ROWS]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(lambda one: run_one(*one, given.runs, extra), work))
    histories = {name: [h for (n, _), h in zip(work, found, strict=True) if n == name] for name in ROWS}
    chosen = parse(extra)
    named = [] if tuple(given.seeds) == SEEDS else ["--seeds", *map(str, given.seeds)]
    results = {
        "command": " ".join(["python examples/tables.py", *named, *extra]),
        "seeds": list(given.seeds),
        "machine": describe(torch.device("cpu")),
        "options": {k: v for k, v in vars(chosen).items() if k not in ("out", "resume")},
        "rows": {name: summary(own) for name, own in histories.items()},
        "specialization": specialization([n for n in TOLD if n in ROWS], given.seeds, given.runs),
        "step_ms": time_steps(given.timing, extra),
        "timing_threads": torch.get_num_threads(),
    }
    viz.draw(load_checkpoint(folder(BASE, given.seeds[0], given.runs) / "checkpoint.pt"), given.out / "training")
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text, target = markdown(results), given.out / "results.md"
    before = target.read_text() if target.exists() else ""
    target.write_text(text + (before[before.index(NOTES) :] if NOTES in before else ""))
    print(text)


if __name__ == "__main__":
    main()
