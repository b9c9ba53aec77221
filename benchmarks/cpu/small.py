"""Small calls on a CPU: one layer at sizes where calling costs more than computing, in turns.

``python -m benchmarks.cpu.small`` times ours, ours with every layer put together from its pieces in Python, and the
handwritten PyTorch, in one process that takes turns. ``--clock processor`` counts the process's own time, on a machine
that others use; only ratios count there. Modules are those of :mod:`.sweep`, checked against one another.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.cpu.sweep import MODES, PARITY, modules_of, reference_of, step_of
from benchmarks.report.machine import describe
from dsts_kernels.backends import BACKENDS
from dsts_kernels.testing import relative_error

POINTS = ((16, 1, 1, 1), (16, 1, 4, 1), (16, 4, 7, 1), (16, 1, 7, 4), (64, 4, 7, 1))  # C, T, plane, B
SHARE = 0.5  # of channels on the spatial operator
CALLS = 5  # of a turn: one alone is near the clock's own cost


def by_pieces(step: Callable) -> Callable:
    """The step with no layer in one call."""
    backend = BACKENDS["cpu"]

    def run():
        backend.one_call = False
        try:
            return step()
        finally:
            del backend.one_call

    return run


def measure(steps: dict[str, Callable], turns: int, clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds of a call: lower quartiles, as whatever disturbs a turn makes it longer."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            start = clock()
            for _ in range(CALLS):
                step()
            if turn >= 2:
                spent[name].append((clock() - start) / CALLS * 1e6)
    return {name: statistics.quantiles(values, n=4)[0] for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.small", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mode", action="append", choices=MODES, help="default: all of them")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    options = parser.parse_args()
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    print(", ".join(f"{key} {value}" for key, value in describe(torch.device("cpu")).items() if value))
    print("| mode | C | T | plane | batch | ours, us | by pieces | handwritten | ours / handwritten |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for mode in options.mode or MODES:
        for channels, frames, plane, batch in POINTS:
            if mode == "training" and batch * frames * plane**2 == 1:
                continue  # BatchNorm refuses to train on one position
            torch.manual_seed(channels)
            modules = modules_of(mode, reference_of(channels, SHARE))
            modules.pop("direct", None)
            x = torch.randn(batch, channels, frames, plane, plane)
            steps = {name: step_of(mode, module, x) for name, module in modules.items()}
            if mode != "training":
                assert relative_error(steps["ours"](), steps["handwritten"]()) < PARITY
            steps["by pieces"] = by_pieces(steps["ours"])
            us = measure(steps, options.turns, clock)
            times = " | ".join(f"{us[name]:.0f}" for name in ("ours", "by pieces", "handwritten"))
            ratio = us["ours"] / us["handwritten"]
            print(f"| {mode} | {channels} | {frames} | {plane}x{plane} | {batch} | {times} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
