"""Predicted tables of docs/performance.md, worked out anew: ``python -m benchmarks.report.predictions``.

What the roofline, the cycle model, the model of gathers and the costs of convolutions say. Nothing here is measured.
"""

from __future__ import annotations

import argparse

import torch

from dsts_kernels.backends import groups
from dsts_kernels.roofline import CHIPS, SHAPES, STEPS, Case, Total, gathers, total
from dsts_kernels.roofline.chips import backend_on
from dsts_kernels.roofline.counted import COUNTED
from dsts_kernels.roofline.tables import run_on

from .tables import SHORT as TITLES

__all__ = ["choice", "cycles", "gather_times", "main", "older", "roofline"]

LOOPS = {
    "by_k": "conv packed, rows",
    "by_output": "conv listed, columns",
    "data_gradient": "data gradient",
    "weight_gradient": "filter gradient",
}
CAPABILITIES = {70: "V100", 75: "T4", 80: "A100", 90: "H100"}
CHANNELS = (16, 64, 128, 256)
MOST = 1 << 20  # positions


def summed(step: str, shape: str, name: str, dtype: torch.dtype, batch: int = 8) -> Total:
    """A step of the paper's module on a chip."""
    chip = CHIPS[name]
    case = run_on(Case(*SHAPES[shape], batch=batch, dtype=dtype), chip)
    return total(STEPS[step](case, chip, backend_on(chip, None)), case.kind, chip)


def milliseconds(ms: float, digits: int) -> str:
    """``digits`` behind the point below 10 ms, one fewer from there on."""
    return f"{ms:.{max(digits - (ms >= 10), 0)}f}"


def table(head: list[str], left: tuple[int, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---" if i in left else "---:" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


def roofline(names: tuple[str, ...] = ("a100", "h100", "h200")) -> str:
    """Batch 8, bfloat16, in a CUDA graph, by the Triton kernels."""
    rows = []
    for step, title in (("frozen", "frozen"), ("training", "training step")):
        for shape, features in TITLES.items():
            sums = [summed(step, shape, name, torch.bfloat16) for name in names]
            shown = [milliseconds(one.graph, 2) if step == "frozen" else f"{one.graph:.1f}" for one in sums]
            rows.append([f"{title}, {features}", *shown])
            if step == "frozen":
                rows.append(["products alone, of that", *(f"{one.floor / one.graph:.0%}" for one in sums)])
    return table(["", *(CHIPS[name].title.split()[0] for name in names)], (0,), rows)


def older(names: tuple[str, ...] = ("v100", "t4")) -> str:
    """float16 by the CUDA kernels: as assumed, to all of it unfavourable."""
    rows = []
    for step, shape, batch in (
        ("frozen", "tpn", 8),
        ("frozen", "swin", 8),
        ("training", "tpn", 8),
        ("training", "swin", 8),
        ("frozen", "tpn", 1),
    ):
        sums = [summed(step, shape, name, torch.float16, batch) for name in names]
        digits = 2 if batch == 1 else 0 if step == "training" else 1
        row = [f"{'training step' if step == 'training' else step}, {TITLES[shape]}{', batch 1' if batch == 1 else ''}"]
        for one in sums:
            fewer = digits - (batch == 1 and one.graph >= 1)
            row.append(f"{one.graph:.{fewer}f} to {one.worst:.{fewer}f}")
            shares = list(one.shares.items())[: 2 if step == "training" else 1]
            between = "{} {:.0%}" if step == "training" else "{} ({:.0%})"
            row.append(
                ", ".join(between.format(bound, share) for bound, share in shares).replace("compute", "products")
            )
        rows.append(row)
        if step == "frozen" and batch == 8:
            at_peak = (
                f"{one.floor / one.graph:.0%} to {one.floor / one.worst:.0%}".replace("% to", " to") for one in sums
            )
            rows.append(["products at the peak, of that", *(cell for share in at_peak for cell in (share, ""))])
    head = ["", *(cell for name in names for cell in (CHIPS[name].title.split()[0], "bound by"))]
    return table(head, (0, 2, 4), rows)


def cycles() -> str:
    """A step of each of two blocks, float16."""
    rows = []
    for loop, title in LOOPS.items():
        spans = (COUNTED[capability]["float16"][loop].cycles[2] for capability in CAPABILITIES)
        rows.append([title, *(f"{low:.0f} to {high:.0f}" for low, high in spans)])
    return table(["kernel", *CAPABILITIES.values()], (0,), rows)


def choice() -> str:
    """Positions of a sample from which a matrix unit convolves directly."""
    found = []
    for channels in CHANNELS:
        low, high = 0, MOST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if groups.matrix_is_cheaper(middle, channels, channels) else (middle, high)
        found.append(str(high))
    more = f"{CHANNELS[-1]} and more"
    return table(["C = O", *map(str, CHANNELS[:-1]), more], (0,), [["positions", *found]])


def gather_times() -> str:
    """Every gather of Triton and Gluon, batch 8, half types."""
    head, rows = ["gather, batch 8, bfloat16"], []
    chips = {"h100": "H100", "a100": "A100"}
    for title in chips.values():
        head += [f"{title} us", "of the copy rate"]
    for shape, features in TITLES.items():
        for title, way in gathers.WAYS.items():
            row = [f"{title}, {features}"]
            for name in chips:
                time = gathers.gather_time(way, Case(*SHAPES[shape]), CHIPS[name])
                least, most = time.shares
                row += [f"{time.low:.0f} to {time.high:.0f}", f"{least:.0%} to {most:.0%}"]
            rows.append(row)
    return table(head, (0,), rows)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.report.predictions", description=__doc__.splitlines()[0]
    ).parse_args()
    print(roofline(), older(), cycles(), choice(), gather_times(), sep="\n\n")


if __name__ == "__main__":
    main()
