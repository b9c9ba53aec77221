"""The speed goals of the GPU kernels beside what a run measured: a goal that was not measured says so.

Works on the saved results alone (see :mod:`benchmarks.gpu.bench` for their fields), so a table can be drawn anywhere.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.shapes import NAMED_SHAPES, Problem

__all__ = ["evaluate", "lines"]

MATRIX_SHARE = {"tpn": 0.75, "swin": 0.65}
OVER_LITERAL, OVER_LITERAL_TRAINING = 10.0, 3.0
OVER_HANDWRITTEN = {"tpn": 1.5, "swin": 1.7}  # 2.1 is what the arithmetic saves
SMALL_BATCH_SHARE = 0.25
COPY_SHARE, SHORT_US = 0.7, 10.0
CUDA_MATRIX_SHARE, HOPPER = 0.35, re.compile(r"\bH[12]00\b")  # an H200 is the same chip with more memory
# On an H100, batch 8 but where it says otherwise: mode, variant of Triton, and milliseconds by shape.
HOPPER_MS = {
    "frozen in a CUDA graph": ("evaluation", "graph", 8, {"tpn": 1.10, "swin": 0.52}),
    "frozen, batch 1": ("evaluation", "frozen", 1, {"tpn": 0.40, "swin": 0.35}),
    "FusedDSTS evaluation in a CUDA graph": ("evaluation", "captured", 8, {"tpn": 1.7}),
    "training step in a CUDA graph": ("training", "captured", 8, {"tpn": 9.8, "swin": 5.4}),
    "training step": ("training", "fused", 8, {"tpn": 12.0, "swin": 9.0}),
}
V100_MS, VOLTA = 10.0, re.compile(r"\bV100\b")
TITLES = {"tpn": "TPN", "swin": "Swin-B"}
BACKENDS = {"triton": "Triton", "cuda": "CUDA"}


def find_ms(results: dict[str, Any], mode: str, variant: str, shape: str, batch: int) -> float | None:
    """Milliseconds of a row; ``None`` where there is none or it was not timed."""
    label = Problem(shape, NAMED_SHAPES[shape], batch=batch).label
    for row in results["rows"]:
        if (row["mode"], row["variant"], row["shape"]) == (mode, variant, label):
            return row["ms"]
    return None


def goal(name: str, wanted: str, measured: str | None, met: bool | None) -> dict[str, Any]:
    return {"goal": name, "wanted": wanted, "measured": measured or "not measured", "met": met}


def ratio_goal(name: str, least: float, slow: float | None, fast: float | None) -> dict[str, Any]:
    if not (slow and fast):
        return goal(name, f"at least {least:g}", None, None)
    return goal(name, f"at least {least:g}", f"{slow / fast:.2f}", slow / fast >= least)


def limit_goal(name: str, most: float, ms: float | None) -> dict[str, Any]:
    wanted = f"at most {most:g} ms"
    return goal(name, wanted, None if ms is None else f"{ms:.3f} ms", None if ms is None else ms <= most)


def least(*ms: float | None) -> float | None:
    """The fastest of those that were timed."""
    return min((one for one in ms if one), default=None)


def share_goal(results: dict[str, Any], name: str, least: float, shape: str, ms: float | None) -> dict[str, Any]:
    """Useful work of a frozen batch of 8 a second, over the rate of a large product."""
    if ms is None:
        return goal(name, f"at least {least:.0%}", None, None)
    rate = results["rate"][results["rate"]["best"]]
    gflop = 2 * Problem(shape, NAMED_SHAPES[shape], batch=8).useful_macs("evaluation") / 1e9
    share = gflop / ms * 1e3 / rate
    return goal(name, f"at least {least:.0%}", f"{share:.1%} ({ms:.3f} ms)", share >= least)


def triton_goals(results: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    """Goals of one shape at batch 8 (and batch 1 for the graph)."""
    title = TITLES[shape]
    frozen = find_ms(results, "evaluation", "frozen triton", shape, 8)
    literal = find_ms(results, "evaluation", "literal", shape, 8)
    both = [
        least(*(find_ms(results, "evaluation", variant, shape, 8) for variant in variants))
        for variants in (("handwritten", "handwritten graph"), ("frozen triton", "graph triton"))
    ]
    name = f"Triton: frozen, {title}: share of the matrix-product rate"
    goals = [share_goal(results, name, MATRIX_SHARE[shape], shape, frozen)]

    goals.append(ratio_goal(f"Triton: literal eager / frozen, {title}", OVER_LITERAL, literal, frozen))
    name = f"Triton: best handwritten PyTorch / frozen, {title}"
    goals.append(ratio_goal(name, OVER_HANDWRITTEN[shape], *both))
    steps = [find_ms(results, "training", variant, shape, 8) for variant in ("literal", "fused triton")]
    name = f"Triton: literal eager / FusedDSTS training step, {title}"
    goals.append(ratio_goal(name, OVER_LITERAL_TRAINING, *steps))

    one, eight = (find_ms(results, "evaluation", "graph triton", shape, batch) for batch in (1, 8))
    name, wanted = f"Triton: frozen in a CUDA graph, batch 1 / batch 8, {title}", f"at most {SMALL_BATCH_SHARE:g}"
    if one and eight:
        goals.append(goal(name, wanted, f"{one / eight:.3f} ({one:.3f} ms)", one / eight <= SMALL_BATCH_SHARE))
    else:
        goals.append(goal(name, wanted, None, None))
    return goals


def hopper_goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Triton's milliseconds on an H100."""
    here, goals = HOPPER.search(results["machine"]["device"]), []
    for what, (mode, variant, batch, limits) in HOPPER_MS.items():
        for shape, most in limits.items():
            ms = find_ms(results, mode, f"{variant} triton", shape, batch) if here else None
            goals.append(limit_goal(f"Triton: {what}, {TITLES[shape]}, on an H100", most, ms))
    return goals


def cuda_goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals of named chips: measured there, not measured on any other."""
    device, goals = results["machine"]["device"], []
    for shape, title in TITLES.items():
        ms = find_ms(results, "evaluation", "frozen cuda", shape, 8) if HOPPER.search(device) else None
        name = f"CUDA: frozen, {title}: share of the matrix-product rate on an H100"
        goals.append(share_goal(results, name, CUDA_MATRIX_SHARE, shape, ms))
    here = VOLTA.search(device) and results["dtype"] == "float16"
    ms = find_ms(results, "evaluation", "frozen cuda", "tpn", 8) if here else None
    goals.append(limit_goal("CUDA: frozen, TPN, batch 8 in float16 on a V100", V100_MS, ms))
    return goals


def pass_goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory-bound kernels of either backend: a share of the copy rate, or too short to matter."""
    wanted, rate = f"at least {COPY_SHARE:.0%} of the copy rate or under {SHORT_US:g} us", results["copy_gb_s"]
    goals = []
    for op in results["ops"]:
        name = f"{BACKENDS[op['backend']]}: {op['op']}, {op['shape']}"
        if op["us"] is None:
            goals.append(goal(name, wanted, None, None))
            continue
        share = op["bytes"] / op["us"] / 1e3 / rate
        goals.append(goal(name, wanted, f"{share:.0%}, {op['us']:.1f} us", share >= COPY_SHARE or op["us"] < SHORT_US))
    return goals


def evaluate(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal as ``goal``, ``wanted``, ``measured`` (text) and ``met`` (``None``: not measured)."""
    goals = [g for shape in MATRIX_SHARE for g in triton_goals(results, shape)]
    return [*goals, *hopper_goals(results), *cuda_goals(results), *pass_goals(results)]


def lines(goals: list[dict[str, Any]]) -> list[str]:
    """Aligned lines: goal, wanted, measured, met."""
    if not goals:
        return []
    verdict = {True: "met", False: "MISSED", None: "-"}
    cells = [[g["goal"], g["wanted"], g["measured"], verdict[g["met"]]] for g in goals]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
