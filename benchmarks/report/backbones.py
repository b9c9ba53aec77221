"""What DSTS costs whole backbones: the table of ``bench_backbone.py``, the paper's figures and our goals beside it.

Needs nothing but the results, like :mod:`benchmarks.report.tables`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["COLUMNS", "footnotes", "goals", "markdown", "plain", "table"]

COLUMNS = (
    "step",
    "backbone",
    "variant",
    "ms",
    "overhead",
    "95% of it",
    "the paper",
    "GFLOP",
    "GFLOP/s",
    "M numbers",
    "MiB",
    "peak MiB",
)
LEFT = 3
TITLES = {
    "backbone": "alone",
    "literal": "literal PyTorch",
    "fused": "FusedDSTS",
    "frozen": "FrozenDSTS",
    "backbone graph": "alone, CUDA graph",
    "frozen graph": "FrozenDSTS, CUDA graph",
}
OURS = ("fused", "frozen", "frozen graph")
MODES = ("evaluation", "training")
PAPER = {"evaluation": 870 / 741 - 1, "training": 12 / 9 - 1}
SOURCES = (
    "the paper: evaluation 741 ms without DSTS and 870 with it (its Table 5, a V100), training 9 h and 12 h (its Table "
    "4, a whole run); a yardstick for its two backbones."
)
FULL = {"tpn": "8x256x256", "swin3d_b": "32x224x224"}  # frames, height, width of the paper's features
GOALS = {  # at most this overhead: step, variant, backbone
    "cpu": {
        ("evaluation", "frozen", "tpn"): 870 / 741 - 1,
        ("evaluation", "frozen", "swin3d_b"): 0.06,
        ("training", "fused", "tpn"): 12 / 9 - 1,
        ("training", "fused", "swin3d_b"): 12 / 9 - 1,
    },
    "H100": {
        ("evaluation", "frozen", "tpn"): 0.25,
        ("evaluation", "frozen", "swin3d_b"): 0.08,
        ("training", "fused", "tpn"): 12 / 9 - 1,
        ("training", "fused", "swin3d_b"): 12 / 9 - 1,
    },
}
STRETCH = 0.15  # frozen, TPN, on a CPU
UNDISTURBED = 0.9  # of its threads' time, above which a run had the machine to itself


def percent(share: float) -> str:
    return f"{share:+.1%}"


def table(results: dict[str, Any]) -> list[list[str]]:
    """Cells under :data:`COLUMNS`; a backbone that could not be timed carries its reason in place of the number."""
    lines = []
    rows = results["backbones"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    variants = list(TITLES)

    def order(row: dict[str, Any]) -> tuple[int, int, int]:
        return MODES.index(row["mode"]), cases.index(row["case"]), variants.index(row["variant"])

    for row in (row for row in rows if "mode" not in row):
        lines.append(["-", row["case"], "-", row["note"], *["-"] * (len(COLUMNS) - LEFT - 1)])
    for row in sorted((row for row in rows if "mode" in row), key=order):
        ms = row["ms"]
        cells = [row["mode"], row["case"], TITLES[row["variant"]], f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}"]
        if "overhead" in row:
            cells += [percent(row["overhead"]), f"{percent(row['low'])} to {percent(row['high'])}"]
            cells.append(percent(PAPER[row["mode"]]) if row["case"].partition(" ")[0] in FULL else "-")
        else:
            cells += ["-", "-", "-"]
        cells += [f"{row['gflop']:.1f}", f"{row['gflop'] / ms * 1e3:.0f}", f"{row['parameters_m']:.1f}"]
        cells += [f"{row['weights_mib']:.0f}", "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"]
        lines.append(cells)
    return lines


def disturbed(row: dict[str, Any]) -> bool:
    """Whether the clock counted other processes too."""
    return row["clock"] == "wall" and row["share"] is not None and row["share"] < UNDISTURBED


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Our goals for what was measured: at full size, on a CPU in float32 or on an H100 in bfloat16.

    Each is ``goal``, ``measured``, ``wanted`` and ``met``, which is ``None`` where the interval holds the limit, or
    where others used the machine.
    """
    on_cpu = bool(results["machine"]["isa"])
    known = GOALS["cpu"] if on_cpu else GOALS["H100"] if "H100" in results["machine"]["device"] else {}
    found = []
    for row in results["backbones"]:
        name, _, shape = row["case"].partition(" ")
        limit = known.get((row.get("mode"), row.get("variant"), name))
        full = shape.split("x", 2)[-1] == FULL.get(name) and row.get("dtype") == ("float32" if on_cpu else "bfloat16")
        if limit is None or not full:
            continue
        wanted = f"at most {percent(limit)}"
        if on_cpu and (name, row["variant"]) == ("tpn", "frozen"):
            wanted += f" (stretch {percent(STRETCH)})"
        measured = f"{percent(row['overhead'])} ({percent(row['low'])} to {percent(row['high'])})"
        title = f"{TITLES[row['variant']]}, {row['mode']}, {row['case']}"
        met = True if row["high"] <= limit else False if row["low"] > limit else None
        found.append({"goal": title, "measured": measured, "wanted": wanted, "met": None if disturbed(row) else met})
    return found


def footnotes(results: dict[str, Any]) -> list[str]:
    """How it was measured."""
    timed = [row for row in results["backbones"] if "mode" in row]
    rounds = {f"{row['mode']} {row['case']}: {row['rounds']}" for row in timed}
    layouts = " and ".join(sorted({row["memory_format"] for row in timed}))
    clocks = " and ".join(sorted({row["clock"] for row in timed}))
    notes = [
        "variants take turns in one run; overhead: median over rounds of a variant's time over the backbone's in the "
        "same round; 95% of it: what that median lies between (bootstrap).",
        "training: forward, loss and backward with every gradient, without the optimizer; hard and soft samples "
        "change places from step to step, so half are hard.",
        "GFLOP: additions and multiplications of direct convolutions as torch.utils.flop_counter counts them, with the "
        "formulas of our ops; a fast convolution does with fewer. GFLOP/s: those by the time.",
        "M numbers and MiB: parameters and buffers that the model keeps, packed ones of FrozenDSTS included. peak MiB: "
        "what one step adds to them and the clips, in a fresh process.",
        SOURCES,
    ]
    if timed:
        notes.insert(1, f"rounds: {', '.join(sorted(rounds))}. Clips: {results['clips']}, {layouts}. Clock: {clocks}.")
    for share in sorted({row["share"] for row in timed if disturbed(row)}):
        notes.append(f"others used the machine: in one of the steps this process had {share:.0%} of its threads' time.")
    verdict = {True: "met", False: "missed", None: "undecided"}
    notes += [f"goal: {g['goal']}: {g['measured']}, wanted {g['wanted']} ({verdict[g['met']]})" for g in goals(results)]
    return notes


def plain(results: dict[str, Any]) -> list[str]:
    """Aligned text lines for a terminal; none where no backbone was run."""
    if not results.get("backbones"):
        return []
    lines = [list(COLUMNS), *table(results)]
    timed = [cells for cells in lines if cells[0] != "-"]
    widths = [max(len(cells[i]) for cells in (lines if i < LEFT else timed)) for i in range(len(COLUMNS))]

    def lay_out(cells: list[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:LEFT], widths[:LEFT], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[LEFT:], widths[LEFT:], strict=True)]
        return "  ".join(left + (right if cells in timed else cells[LEFT : LEFT + 1]))

    return ["", *map(lay_out, lines), "", *footnotes(results)]


def markdown(results: dict[str, Any]) -> list[str]:
    """The same in Markdown, our own rows in bold; no lines where no backbone was run."""
    if not results.get("backbones"):
        return []
    lines = ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * LEFT + " ---: |" * (len(COLUMNS) - LEFT)]
    ours = {TITLES[variant] for variant in OURS}
    for cells in table(results):
        bold = [f"**{cell}**" if cells[2] in ours and i in (2, 3, 4) else cell for i, cell in enumerate(cells)]
        lines.append("| " + " | ".join(bold) + " |")
    return [*lines, "", *(f"- {note}" for note in footnotes(results))]
