"""Never slower: one layer against the best handwritten PyTorch over channels, grids, batches and gate shares (CPU).

``python -m benchmarks.cpu.sweep`` times, at every point of the grid, a frozen layer beside the handwritten folded one,
a ``FusedDSTS`` beside the handwritten one in evaluation (both on live parameters) and in training, taking turns in one
process, after checking that they agree. Frozen layers are also timed with ``algorithm="direct"``. A ratio is a
median of at least five turns; one above 1.05 is measured again, twice, with more turns, and the median of the three
counts. Points beyond a limit of multiply-adds are left out and counted.
``--save`` writes the points as JSON, ``--figure`` draws ratios over time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report.machine import describe
from benchmarks.variants import training_step
from dsts_kernels import FusedDSTS
from dsts_kernels.bench.handwritten import HandwrittenEval, HandwrittenTrain
from dsts_kernels.reference import DSTS, Draws
from dsts_kernels.testing import relative_error

CHANNELS = (16, 32, 64, 128, 256, 512, 1024)
FRAMES = (1, 4, 8, 16)
PLANES = (1, 7, 14, 16, 28, 56)
BATCHES = (1, 4, 16)
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
MODES = ("frozen", "evaluation", "training")
NEURONS = 2  # the cost does not depend on it, the memory does
ALLOWED = 1.05
PARITY = 1e-4
TICKS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5)


def reference_of(channels: int, share: float) -> DSTS:
    """One literal layer with ``share`` of its channels on the spatial operator."""
    reference = DSTS(channels, num_layers=1, num_neurons=NEURONS).eval()
    with torch.no_grad():
        for gate in reference.layers[0].gate:
            gate.fill_(-5.0)[torch.randperm(channels)[: round(share * channels)]] = 5.0
    return reference


def modules_of(mode: str, reference: DSTS) -> dict[str, nn.Module]:
    """Ours first, then the handwritten one, then what else is timed beside them."""
    channels, state = reference.layers[0].gate.shape[1], reference.state_dict()
    fused = FusedDSTS(channels, num_layers=1, num_neurons=NEURONS)
    fused.load_state_dict(state)
    if mode == "frozen":
        fused.eval()
        return {
            "ours": fused.freeze(),
            "handwritten": HandwrittenEval(reference),
            "direct": fused.freeze(algorithm="direct"),
        }
    handwritten = HandwrittenTrain(channels, num_layers=1, num_neurons=NEURONS)
    handwritten.load_state_dict(state)
    return {name: m.train(mode == "training") for name, m in (("ours", fused), ("handwritten", handwritten))}


def step_of(mode: str, module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    if mode != "training":

        def evaluate() -> Tensor:
            with torch.inference_mode():
                return module(x)

        return evaluate
    batch, channels = x.shape[:2]
    generator = torch.Generator().manual_seed(0)
    draws = Draws(
        torch.randn(1, batch, channels, generator=generator),
        (torch.arange(batch) % 2 == 0)[None],
        torch.zeros(1, batch, NEURONS),
    )
    grad = torch.randn(x.shape, generator=generator)

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        return training_step(module, x.detach().requires_grad_(), draws, grad)

    return train


def medians(steps: dict[str, Callable], seconds: float, turns: int = 5) -> dict[str, float]:
    """Median seconds of each step, taking turns for about ``seconds``."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while len(spent["ours"]) < turns or (time.perf_counter() - start < seconds and len(spent["ours"]) < 50):
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            spent[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in spent.items()}


def measure(mode: str, modules: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
    """Milliseconds of each module, and the ratio of ours to the handwritten one."""
    steps = {name: step_of(mode, module, x) for name, module in modules.items()}
    results = {name: step() for name, step in steps.items()}
    if mode != "training":  # there BatchNorm's statistics differ by one step, and tests compare the gradients
        for name, result in results.items():
            assert relative_error(result, results["handwritten"]) < PARITY, (mode, name, tuple(x.shape))
    for step in steps.values():
        step()
    runs = [medians(steps, seconds)]
    if runs[0]["ours"] > ALLOWED * runs[0]["handwritten"]:
        runs += [medians(steps, 4 * seconds, turns=15) for _ in range(2)]
    runs.sort(key=lambda run: run["ours"] / run["handwritten"])
    chosen = runs[len(runs) // 2]
    return {name: round(1e3 * value, 4) for name, value in chosen.items()}


def points(options: argparse.Namespace) -> Iterator[tuple[int, float, int, int, int]]:
    yield from itertools.product(options.channels, options.shares, FRAMES, PLANES, BATCHES)


def sweep(mode: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Rows of the sweep, and how many points were left out."""
    rows: list[dict[str, Any]] = []
    left_out, built = 0, None
    for channels, share, frames, plane, batch in points(options):
        macs = (
            batch * frames * plane**2 * channels**2 * (9 * share + 3 * (1 - share)) * (3 if mode == "training" else 1)
        )
        lone = mode == "training" and batch * frames * plane**2 == 1  # BatchNorm refuses to train on one position
        if macs > options.limit * 1e9 or lone:
            left_out += 1
            continue
        if built is None or built[0] != (channels, share):
            torch.manual_seed(channels)
            built = ((channels, share), modules_of(mode, reference_of(channels, share)))
        x = torch.randn(batch, channels, frames, plane, plane)
        ms = measure(mode, built[1], x, options.seconds)
        rows.append({"C": channels, "share": share, "T": frames, "plane": plane, "B": batch, **ms})
        ratio = ms["ours"] / ms["handwritten"]
        if ratio > ALLOWED:
            print(f"  {ratio:.2f}: {describe_row(rows[-1])}", flush=True)
    return rows, left_out


def describe_row(row: dict[str, Any]) -> str:
    times = f"{row['ours']:.3f} ms, handwritten {row['handwritten']:.3f} ms"
    return f"C {row['C']}, T {row['T']}, {row['plane']}x{row['plane']}, batch {row['B']}, share {row['share']}: {times}"


def summary(mode: str, rows: list[dict[str, Any]], left_out: int) -> str:
    ratios = sorted(row["ours"] / row["handwritten"] for row in rows)
    slower = sum(ratio > ALLOWED for ratio in ratios)
    text = (
        f"{mode}: {len(rows)} points ({left_out} beyond the limit), ours / handwritten: median "
        f"{statistics.median(ratios):.2f}, largest {ratios[-1]:.2f}, above {ALLOWED}: {slower}"
    )
    if mode == "frozen":
        worse = sum(row["ours"] > ALLOWED * row["direct"] for row in rows)
        text += f"; auto slower than direct by more than 5%: {worse}"
    return text


def figure(results: dict[str, Any], path: Path) -> None:
    """Ratio over the handwritten time, a panel a mode, coloured by channels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = results["modes"]
    drawing, axes = plt.subplots(1, len(modes), figsize=(4.6 * len(modes), 4.2), sharey=True, layout="constrained")
    titles = {"frozen": "frozen", "evaluation": "FusedDSTS, evaluation", "training": "FusedDSTS, training step"}
    for panel, (mode, rows) in zip([axes] if len(modes) == 1 else axes, modes.items(), strict=True):
        for index, channels in enumerate(CHANNELS):
            coloured = [row for row in rows if row["C"] == channels]
            panel.scatter(
                [row["handwritten"] for row in coloured],
                [row["ours"] / row["handwritten"] for row in coloured],
                s=9,
                color=plt.cm.viridis(index / (len(CHANNELS) - 1)),
                label=f"C = {channels}",
                linewidths=0,
                alpha=0.8,
            )
        panel.axhline(ALLOWED, color="black", linewidth=1, linestyle="--")
        panel.set(xscale="log", yscale="log", title=titles[mode], xlabel="handwritten PyTorch, ms")
        panel.set_yticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    first = axes if len(modes) == 1 else axes[0]
    first.set_ylabel("ours / handwritten (dashed: 1.05)")
    first.legend(fontsize=7, markerscale=2, loc="lower left")
    facts = results["facts"]
    drawing.suptitle(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, float32, commit {facts['commit']}",
        fontsize=9,
    )
    drawing.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.sweep", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mode", action="append", choices=MODES, help="default: all of them")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of channels on the spatial operator")
    parser.add_argument("--limit", type=float, default=3.0, help="billions of multiply-adds, direct, a point")
    parser.add_argument("--seconds", type=float, default=0.06, help="a point is measured at least so long")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"facts": describe(torch.device("cpu")), "limit": options.limit, "modes": {}}
    print(", ".join(f"{key} {value}" for key, value in results["facts"].items() if value))
    lines = []
    for mode in options.mode or MODES:
        rows, left_out = sweep(mode, options)
        results["modes"][mode] = rows
        lines.append(summary(mode, rows, left_out))
        print(lines[-1], flush=True)
    if options.save:
        rows_as_lines = json.dumps(results).replace('{"C"', '\n{"C"')
        options.save.write_text(rows_as_lines + "\n", encoding="utf-8")
    if options.figure:
        figure(results, options.figure)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
