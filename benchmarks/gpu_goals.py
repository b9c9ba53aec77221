"""The speed goals of the GPU kernels beside what a run measured: a goal that was not measured says so.

Works on the saved results alone (see :mod:`benchmarks.gpu_bench` for their fields), so a table can be drawn anywhere.
"""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import NAMED_SHAPES, Problem

__all__ = ["evaluate", "lines"]

MATRIX_SHARE = {"tpn": 0.75, "swin": 0.65}
OVER_LITERAL, OVER_HANDWRITTEN, OVER_LITERAL_TRAINING = 10.0, 2.5, 3.0
SMALL_BATCH_SHARE = 0.25
COPY_SHARE, SHORT_US = 0.7, 10.0
TITLES = {"tpn": "TPN", "swin": "Swin-B"}


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


def module_goals(results: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    """Goals of one shape at batch 8 (and batch 1 for the graph)."""
    title = TITLES[shape]
    frozen = find_ms(results, "evaluation", "frozen", shape, 8)
    literal = find_ms(results, "evaluation", "literal", shape, 8)
    handwritten = find_ms(results, "evaluation", "handwritten", shape, 8)
    found = []

    least, rate = MATRIX_SHARE[shape], results["rate"][results["rate"]["best"]]
    name, wanted = f"frozen, {title}: share of the matrix-product rate", f"at least {least:.0%}"
    if frozen is None:
        found.append(goal(name, wanted, None, None))
    else:
        gflop = 2 * Problem(shape, NAMED_SHAPES[shape], batch=8).useful_macs("evaluation") / 1e9
        share = gflop / frozen * 1e3 / rate
        found.append(goal(name, wanted, f"{share:.1%} ({frozen:.3f} ms)", share >= least))

    found.append(ratio_goal(f"literal eager / frozen, {title}", OVER_LITERAL, literal, frozen))
    found.append(ratio_goal(f"best handwritten PyTorch / frozen, {title}", OVER_HANDWRITTEN, handwritten, frozen))
    steps = [find_ms(results, "training", variant, shape, 8) for variant in ("literal", "fused")]
    found.append(ratio_goal(f"literal eager / FusedDSTS training step, {title}", OVER_LITERAL_TRAINING, *steps))

    one, eight = (find_ms(results, "evaluation", "graph", shape, batch) for batch in (1, 8))
    name, wanted = f"frozen in a CUDA graph, batch 1 / batch 8, {title}", f"at most {SMALL_BATCH_SHARE:g}"
    if one and eight:
        found.append(goal(name, wanted, f"{one / eight:.3f} ({one:.3f} ms)", one / eight <= SMALL_BATCH_SHARE))
    else:
        found.append(goal(name, wanted, None, None))
    return found


def pass_goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory-bound kernels: a share of the copy rate, or too short to matter."""
    wanted, rate = f"at least {COPY_SHARE:.0%} of the copy rate or under {SHORT_US:g} us", results["copy_gb_s"]
    found = []
    for op in results["ops"]:
        name = f"{op['op']}, {op['shape']}"
        if op["us"] is None:
            found.append(goal(name, wanted, None, None))
            continue
        share = op["bytes"] / op["us"] / 1e3 / rate
        found.append(goal(name, wanted, f"{share:.0%}, {op['us']:.1f} us", share >= COPY_SHARE or op["us"] < SHORT_US))
    return found


def evaluate(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal as ``goal``, ``wanted``, ``measured`` (text) and ``met`` (``None``: not measured)."""
    return [*(g for shape in MATRIX_SHARE for g in module_goals(results, shape)), *pass_goals(results)]


def lines(goals: list[dict[str, Any]]) -> list[str]:
    """Aligned lines: goal, wanted, measured, met."""
    if not goals:
        return []
    verdict = {True: "met", False: "MISSED", None: "-"}
    cells = [[g["goal"], g["wanted"], g["measured"], verdict[g["met"]]] for g in goals]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
