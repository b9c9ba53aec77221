"""Saved benchmark results as a Markdown table and a figure: ``python -m benchmarks.report FILE --figure
FIGURE.png``.

Results are the JSON that ``--save-results`` writes, or :mod:`benchmarks.gpu.bench` on a GPU: the machine, its
matrix rate, one row for each mode, shape and variant, and from a GPU its goals and kernels. :func:`table` turns
the rows into cells once; the terminal summary and the Markdown table only lay them out. This file needs nothing
but matplotlib, and that only for the figure, so results can be read anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import backbones

__all__ = ["COLUMNS", "figure", "footnotes", "heading", "markdown", "plain", "table"]

COLUMNS = (
    "step",
    "shape",
    "variant",
    "ms",
    "vs literal",
    "vs handwritten",
    "GFLOP/s",
    "matrix rate",
    "peak MiB",
)
OURS = {
    "fused": "FusedDSTS",
    "captured": "FusedDSTS, CUDA graph",
    "frozen": "FrozenDSTS",
    "graph": "FrozenDSTS, CUDA graph",
}
BACKENDS = {"triton": "Triton", "cuda": "CUDA C++"}
WAYS = {"direct": "direct forced", "winograd": "Winograd forced"}
TITLES = {
    "literal": "literal PyTorch",
    "compiled": "torch.compile of it",
    "handwritten": "best handwritten PyTorch",
    "handwritten graph": "best handwritten PyTorch, CUDA graph",
    **{
        f"{variant} {backend}".strip(): title + (f", {(BACKENDS | WAYS)[backend]}" if backend else "")
        for variant, title in OURS.items()
        for backend in ("", *BACKENDS, *WAYS)
    },
}
"""By variant; one of our own that was timed on each GPU backend in turn is followed by the backend's name, or by the
way that was forced on a CPU."""
SHORT = {"tpn": "TPN", "swin": "Swin-B"}
"""The paper's backbones, by the first word of a shape."""
COLOURS = {
    "literal": "#b8bcc4",
    "compiled": "#b8bcc4",
    "handwritten": "#7f8794",
    "fused": "#1f6fb4",
    "captured": "#155a96",
    "frozen": "#0b3f73",
    "graph": "#062440",
}
BASELINES = {"literal": ("literal",), "handwritten": ("handwritten", "handwritten graph")}
LISTED_KERNELS = 10


def order(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    shapes = list(dict.fromkeys(other["shape"] for other in rows))
    modes, variants = ("evaluation", "training"), list(TITLES)
    return modes.index(row["mode"]), shapes.index(row["shape"]), variants.index(row["variant"])


def speedup(row: dict[str, Any], baseline: str, rows: list[dict[str, Any]]) -> float | None:
    """How many times faster than a baseline of the same mode and shape, the fastest of its kind; ``None`` where either
    was not timed."""
    same = (o for o in rows if (o["mode"], o["shape"]) == (row["mode"], row["shape"]))
    fastest = min((o["ms"] for o in same if o["variant"] in BASELINES[baseline] and o["ms"]), default=None)
    return fastest / row["ms"] if fastest and row["ms"] else None


def table(results: dict[str, Any]) -> list[list[str]]:
    """Cells under :data:`COLUMNS`; a row that could not be timed carries its reason in place of the
    number."""
    rows, rate = results["rows"], results["rate"][results["rate"]["best"]]
    lines = []
    for row in sorted(rows, key=lambda row: order(row, rows)):
        cells = [row["mode"], row["shape"], TITLES[row["variant"]]]
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        if row["ms"] is None:
            lines.append([*cells, row["note"], "-", "-", "-", "-", peak])
            continue
        ratios = (speedup(row, baseline, rows) for baseline in BASELINES)
        speed = row["literal_gflop"] / row["ms"] * 1e3
        digits = 1 if row["ms"] >= 10 else 3
        cells += [f"{row['ms']:.{digits}f}", *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)]
        lines.append([*cells, f"{speed:.0f}", f"{speed / rate:.0%}", peak])
    return lines


def heading(results: dict[str, Any]) -> str:
    """One line: device, instruction set or driver, threads, versions, commit, date."""
    m = results["machine"]
    cuda = f", CUDA {m['cuda']}, cuDNN {m['cudnn']}" if m["cuda"] else ""
    cuda += "".join(f", {name} {m[name]}" for name in ("triton", "nvcc", "driver") if m.get(name))
    isa = f" ({m['isa']})" if m["isa"] else ""
    where = f"{m['device']}{isa}, {m['threads']} threads"
    return f"{where}, torch {m['torch']}{cuda}, {results['dtype']}, commit {m['commit']}, {m['date']}"


def footnotes(results: dict[str, Any]) -> list[str]:
    """What the columns mean, with the yardstick that was measured in the same run."""
    rate = results["rate"]
    on_gpu = "copy_gb_s" in results
    others = ", ".join(f"{name} {rate[name]:.0f}" for name in rate if name not in ("best", rate["best"]))
    others = f"; {others}" if others else ""
    return [
        "ms: median of one step; training is forward and backward with every gradient, none left before it.",
        "GFLOP/s: multiplications and additions of the literal formulas divided by the time, so doing less "
        "work for the same result shows as more.",
        f"matrix rate: that number's share of this machine's best large product, "
        f"{rate[rate['best']]:.0f} GFLOP/s ({rate['best']}{others}).",
        "peak MiB: memory that one step adds to weights and input"
        + ("" if on_gpu else ", in a fresh process")
        + " (compiled: not taken).",
        *(gpu_footnotes(results) if on_gpu else ()),
        *(half_footnotes(results) if "convolution" in results else ()),
        f"features: {results['features']}.",
    ]


def half_footnotes(results: dict[str, Any]) -> list[str]:
    """What multiplies a half type on this CPU, and how fast the library convolves with it."""
    rates = (
        f"{shape}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in found.items())
        for shape, found in results["convolution"].items()
    )
    return [
        f"{results['dtype']}: {results['units']}.",
        f"GFLOP/s of oneDNN's convolutions of half the channels, filters not reordered beforehand: {'; '.join(rates)}.",
        "goals are for processors with matrix units; handwritten is folded, all of it channels-last.",
    ]


def gpu_footnotes(results: dict[str, Any]) -> list[str]:
    """How a GPU was timed, and what the baselines are there."""
    timed = [row for row in results["rows"] if row["variant"] == "handwritten" and row["ms"]]
    notes = {row["shape"]: row["note"] for row in timed if row["note"]}
    grouped = "; in training " + ", ".join(f"{shape}: {note}" for shape, note in notes.items()) if notes else ""
    return [
        "timed with device events on inputs that take turns and exceed twice the L2 cache together; channels-last.",
        f"copy rate {results['copy_gb_s']:.0f} GB/s, bytes read and written.",
        *(f"{name}: not run, {reason}." for name, reason in results.get("backends", {}).items() if reason),
        f"literal: float32 parameters under {results['dtype']} autocast, torch's own float32 settings, cuDNN's search "
        f"on; handwritten: {results['dtype']}, the same search, lists padded to whole blocks{grouped}.",
    ]


def extra_lines(results: dict[str, Any]) -> list[str]:
    """What only a GPU's results have: goals, and device time by kernel."""
    verdict = {True: "met", False: "missed", None: "not measured"}
    lines = [
        f"goal: {g['goal']}: {g['measured']}, wanted {g['wanted']} ({verdict[g['met']]})"
        for g in results.get("goals", ())
    ]
    for step, kernels in results.get("kernels", {}).items():
        longest = sorted(kernels, key=lambda k: -k["calls"] * k["us"])[:LISTED_KERNELS]
        listed = ", ".join(f"{k['name']} {k['calls']:g} x {k['us']:.1f} us" for k in longest)
        lines.append(f"kernels of {step}, {kernel_total(kernels, results.get('host_us', {}).get(step))}: {listed}")
    return lines


def kernel_total(kernels: list[dict[str, Any]], host: float | None) -> str:
    """What a step's launches take together, and the host beside them."""
    total = f"{sum(k['calls'] * k['us'] for k in kernels):.0f} us"
    if not all("launches" in k for k in kernels):
        return f"{total} by medians over launches of a name, not their sum"
    launches = f"{sum(k['calls'] for k in kernels):.4g} launches"
    return f"{total} in {launches}" + ("" if host is None else f", the host {host:.0f} us")


def plain(results: dict[str, Any]) -> list[str]:
    """Aligned text lines for a terminal."""
    lines = [list(COLUMNS), *table(results)]
    timed = [cells for cells in lines if cells[COLUMNS.index("GFLOP/s")] != "-"]
    widths = [max(len(cells[i]) for cells in (lines if i < 3 else timed)) for i in range(len(COLUMNS))]

    def lay_out(cells: list[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
        return "  ".join(left + (right if cells in timed else cells[3:4]))

    main = ["", *map(lay_out, lines), "", *footnotes(results)] if results["rows"] else []
    extra = extra_lines(results)
    extra = [*([""] if extra else []), *extra]
    return [heading(results), *main, *extra, *scaling_lines(results), *backbones.plain(results)]


def scaling_lines(results: dict[str, Any]) -> list[str]:
    return ["", *(f"{row['name']}: {row['text']}" for row in results["scaling"])] if results.get("scaling") else []


def markdown(results: dict[str, Any]) -> str:
    """The same table in Markdown, the project's own rows in bold."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3)]
    ours = {title for variant, title in TITLES.items() if variant.split()[0] in OURS}
    for cells in table(results):
        cells = [f"**{cell}**" if cells[2] in ours and i in (2, 3) else cell for i, cell in enumerate(cells)]
        lines.append("| " + " | ".join(cells) + " |")
    main = ["", *lines, "", *(f"- {note}" for note in footnotes(results))] if results["rows"] else []
    notes = [f"- {note}" for note in (*extra_lines(results), *filter(None, scaling_lines(results)))]
    return "\n".join([heading(results), *main, *notes, *backbones.markdown(results)])


def draw_panel(axes: Any, rows: list[dict[str, Any]], shapes: list[str]) -> None:
    """Horizontal bars of one mode, grouped by shape, each labelled with its time and its ratio to the literal
    row."""
    ticks, y = [], 0.0
    longest = max(row["ms"] or 0 for row in rows)
    for shape in shapes:
        name, _, size = shape.partition(" ")
        title = f"{SHORT[name]} features, {size}" if name in SHORT else f"features {shape}"
        axes.text(0, y, title, fontsize=9, fontweight="bold", va="center")
        for variant in TITLES:
            for row in (r for r in rows if (r["shape"], r["variant"]) == (shape, variant)):
                y += 1
                ticks.append((y, TITLES[variant]))
                axes.barh(y, row["ms"] or 0, color=COLOURS[variant.split()[0]], height=0.72)
                ratio = speedup(row, "literal", rows)
                label = row["note"] if row["ms"] is None else f"{row['ms']:,.0f} ms"
                if ratio is not None and variant != "literal":
                    label += f"  ({ratio:.1f}x)"
                axes.text((row["ms"] or 0) + longest * 0.015, y, label, va="center", fontsize=8.5)
        y += 1.4
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8.5)
    axes.set_ylim(y - 0.6, -0.7)
    axes.set_xlim(0, longest * 1.32)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms; in brackets: times faster than literal", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def figure(results: dict[str, Any], path: Path) -> None:
    """Draws one panel a mode and saves it; the ending of ``path`` chooses the format."""
    if not results["rows"]:
        raise SystemExit(
            "--figure: got results of backbones alone, wanted rows of the module: there is nothing to draw"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(results["rows"], key=lambda row: order(row, results["rows"]))
    modes, shapes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "shape"))
    height = 1.0 + 0.27 * max(sum(row["mode"] == mode for row in rows) + 1.4 * len(shapes) for mode in modes)
    canvas, panels = plt.subplots(1, len(modes), figsize=(4.7 * len(modes), height), squeeze=False)
    for axes, mode in zip(panels[0], modes, strict=True):
        draw_panel(axes, [row for row in rows if row["mode"] == mode], shapes)
        title = "Evaluation of one module" if mode == "evaluation" else "Training step of one module"
        axes.set_title(title, loc="left", fontsize=11)
    canvas.tight_layout(rect=(0, 0.02, 1, 1))
    caption = {"ha": "right", "va": "bottom", "fontsize": 6.5, "color": "#666666"}
    canvas.text(0.995, 0.005, heading(results), **caption)
    canvas.savefig(path, dpi=160, facecolor="white")
    plt.close(canvas)
