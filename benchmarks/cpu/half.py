"""Half types on a CPU: the rows that force a way, the library's own rate of convolution, and the goals beside both.

``pytest benchmarks/ --benchmark-only --dtype bfloat16`` prints all of it on any machine. What is a goal holds for
machines with matrix units, and the table says which this one has.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report.machine import best_seconds
from benchmarks.shapes import NAMED_SHAPES, Problem
from dsts_kernels.backends import processor, use_algorithm

__all__ = ["HALVES", "WAYS", "block", "convolution_rates", "goals", "is_half", "units"]

HALVES = (torch.bfloat16, torch.float16)
WAYS = ("direct", "winograd")  # second words of a row: "frozen direct"
SPATIAL, TEMPORAL = "1x3x3 convolution", "3x1x1 convolution"
# At batch 1, three layers of 10 neurons at C = 1024, two threads, on a machine with matrix units.
OVER_HANDWRITTEN = {"frozen": {"tpn": 2.2, "swin": 1.8}, "fused": {"tpn": 1.2, "swin": 1.1}}
SHARE = {"tpn": 0.6, "swin": 0.5}
TRAINING = {"literal": {"tpn": 3.0, "swin": 3.0}, "handwritten": {"tpn": 1.3, "swin": 1.2}}
TITLES = {"tpn": "TPN", "swin": "Swin-B"}


def is_half(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in HALVES


def block(variant: str) -> contextlib.AbstractContextManager:
    """What a row's step runs in: a way that is forced, or nothing."""
    way = variant.partition(" ")[2]
    return use_algorithm(way) if way in WAYS else contextlib.nullcontext()


def units(dtype: torch.dtype) -> str:
    """What the processor has for a half type, or why it has nothing."""
    return processor.describe(dtype)


@torch.inference_mode()
def convolution_rates(problem: Problem, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of oneDNN's two convolutions as a frozen layer of ``problem`` has them: half the channels in, all out."""
    frames, height, width = problem.grid
    channels, outputs = max(1, problem.channels // 2), problem.channels
    found = {}
    for name, size, kernel in (
        (SPATIAL, (problem.batch * frames, channels, height, width), (3, 3)),
        (TEMPORAL, (problem.batch, channels, frames, height * width), (3, 1)),
    ):
        x, w = (
            torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
            for shape in (size, (outputs, channels, *kernel))
        )
        padding = (kernel[0] // 2, kernel[1] // 2)
        seconds = best_seconds(lambda x=x, w=w, padding=padding: F.conv2d(x, w, padding=padding), x.device)
        found[name] = 2 * outputs * channels * kernel[0] * kernel[1] * problem.positions / seconds / 1e9
    return found


def find_ms(results: dict[str, Any], mode: str, variant: str, label: str) -> float | None:
    same = (row for row in results["rows"] if (row["mode"], row["variant"], row["shape"]) == (mode, variant, label))
    return next((row["ms"] for row in same), None)


def goal(name: str, least: float, measured: float | None, percent: bool = False) -> dict[str, Any]:
    def text(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.2f}"

    found = "not measured" if measured is None else text(measured)
    met = None if measured is None else measured >= least
    return {"goal": name, "wanted": f"at least {least:.0%}" if percent else f"at least {least:g}"} | {
        "measured": found,
        "met": met,
    }


def goals(results: dict[str, Any], problems: tuple[Problem, ...]) -> list[dict[str, Any]]:
    """Goals of the paper's shapes, as far as this run has their rows."""
    found = []
    for problem in problems:
        name = problem.name
        if problem != Problem(name, NAMED_SHAPES.get(name, problem.grid)) or name not in NAMED_SHAPES:
            continue  # another size has no goals
        title, label = f"{TITLES[name]}, {results['dtype']}", problem.label
        ms = {
            (mode, variant): find_ms(results, mode, variant, label)
            for mode in ("evaluation", "training")
            for variant in ("literal", "handwritten", "fused", "frozen")
        }

        def ratio(mode: str, slow: str, fast: str, ms: dict = ms) -> float | None:
            pair = ms[mode, slow], ms[mode, fast]
            return pair[0] / pair[1] if all(pair) else None

        for ours, least in OVER_HANDWRITTEN.items():
            text = {"frozen": "frozen", "fused": "FusedDSTS evaluation"}[ours]
            found.append(goal(f"{title}: handwritten / {text}", least[name], ratio("evaluation", "handwritten", ours)))
        share, frozen = None, ms["evaluation", "frozen"]
        rate = results["convolution"].get(label, {}).get(SPATIAL)
        if frozen and rate:
            share = 2 * problem.useful_macs("evaluation") / frozen / 1e6 / rate
        found.append(goal(f"{title}: frozen, share of the 1x3x3 convolution's rate", SHARE[name], share, percent=True))
        for slow, least in TRAINING.items():
            text = f"{title}: {slow} / FusedDSTS training step"
            found.append(goal(text, least[name], ratio("training", slow, "fused")))
    return found
