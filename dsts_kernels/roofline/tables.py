"""Tables of predictions, aligned for a terminal, and their sums with and without a CUDA graph."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..backends.gpu import dtypes
from .cases import SHAPES, Case, literal_flop
from .chips import GAP_US, HOST_TORCH_US, HOST_US, SUSTAINED, Chip, Launch, alone, backend_on, predict
from .steps import STEPS

HEAD = "PREDICTIONS, NOT MEASUREMENTS: roofline of every launch (FLOP, bytes, tiles, waves)"
NOTES = f"""\
CTAs      of a launch; waves: tiles over CTAs that run at once; fill: useful FLOP over what fits in the time of the
          busiest multiprocessor (padding of tiles and K blocks, whole waves or uneven shares); us: of one launch
bound     the slowest of products (Triton: {SUSTAINED:.0%} of peak; CUDA: a cycle model of the compiled loop, its SASS),
          DRAM, L2, and waiting for memory (latency)
to        the same with everything that the cycle model assumes unfavourable
graph     all launches with {GAP_US:g} us between them; launched: one by one, by a host that takes {HOST_US:g} us for
          each ({HOST_TORCH_US:g} us for one of torch's). Chips and estimates: dsts_kernels/roofline/chips.py
alone     useful products at that share of the peak (Triton), at the peak (CUDA)"""
MEASURED = """\
Measured so far: on an H200 (bfloat16, batch 8, Triton and Gluon, torch 2.11), in CUDA graphs: a frozen module
1.16 ms (tpn) and 0.59 ms (swin), a training step 9.7 and 5.1 ms. Gluon's kernels are in no prediction here.
docs/performance.md says more; 'make gpu' measures yours."""
OLD = (
    "{}: kernels of the CUDA backend, which have not run on it; in {}. Cycles: dsts_kernels/roofline/counted.py, by\n"
    "the model in dsts_kernels/roofline/multiprocessor.py, which knows neither clocks under load nor instruction caches"
)


class Total(NamedTuple):
    """Of a step, in milliseconds."""

    kernels: float
    graph: float
    launched: float
    floor: float  # useful products alone
    worst: float  # in a graph, with everything that the cycle model assumes unfavourable
    shares: dict[str, float]  # of the kernels' time, by bound


def run_on(case: Case, chip: Chip) -> Case:
    """The case as ``chip`` can run it: before compute capability 8.0 there is neither bfloat16 nor tf32."""
    if chip.capability >= 80:
        return case
    dtype = case.dtype if dtypes.why_not(case.dtype, chip.capability) is None else torch.float16
    return case._replace(dtype=dtype, kind="ieee" if case.kind == "tf32" else case.kind)


def total(launches: Sequence[Launch], kind: str, chip: Chip) -> Total:
    kernels = graph = host = end = most = 0.0
    shares: Counter[str] = Counter()
    for launch in launches:
        us, bound, _, worst = predict(launch, kind, chip)
        kernels += us
        shares[bound] += us
        graph += us + GAP_US * launch.count
        most += worst + GAP_US * launch.count
        host += (HOST_US if launch.num_ctas else HOST_TORCH_US) * launch.count
        end = max(end + GAP_US * launch.count, host) + us
    floor = sum(alone(launch, kind, chip) for launch in launches)
    by_bound = {bound: us / kernels for bound, us in shares.most_common()}
    return Total(kernels / 1e3, graph / 1e3, end / 1e3, floor / 1e3, most / 1e3, by_bound)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in (head, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def launch_row(launch: Launch, times: int, kind: str, chip: Chip) -> list[str]:
    us, bound, parts, worst = predict(launch, kind, chip)
    tile = "-" if launch.tile is None else "x".join(map(str, launch.tile[:3]))
    fill = f"{launch.flop / (launch.busiest * chip.processors):.0%}" if launch.busiest else "-"
    return [
        launch.kernel,
        str(times * launch.count),
        str(launch.num_ctas or "-"),
        tile,
        f"{launch.waves:.2f}" if launch.tile else "-",
        fill,
        f"{launch.flop / 1e9:.1f}" if launch.flop else "-",
        f"{launch.dram / 1e6:.1f}",
        f"{launch.l2 / 1e6:.0f}",
        *(f"{parts[name]:.1f}" for name in ("compute", "DRAM", "L2", "latency")),
        f"{us:.1f}",
        f"{worst:.1f}" if worst > us else "-",
        f"{us * times / 1e3:.3f}",
        bound,
    ]


LAUNCH_HEAD = (
    *("kernel", "n", "CTAs", "tile", "waves", "fill", "GFLOP", "DRAM MB", "L2 MB"),
    *("compute us", "DRAM us", "L2 us", "wait us", "us", "to", "ms all", "bound"),
)
SUM_HEAD = (
    "sums, ms",
    "chip",
    "backend",
    "dtype",
    "kernels",
    "graph",
    "to",
    "launched",
    "alone",
    "of it",
    "bound by",
)


def dtype_name(case: Case) -> str:
    return "tf32" if case.kind == "tf32" else str(case.dtype).removeprefix("torch.")


def label(case: Case) -> str:
    named = next((name for name, shape in SHAPES.items() if shape == (case.channels, case.size)), None)
    sizes = "x".join(map(str, (case.batch, case.channels, *case.size)))
    return f"{named} {sizes}" if named else sizes


def span(sums: Total) -> str:
    """Milliseconds in a graph, with their upper end where there is one."""
    return f"{sums.graph:.3f}" + (f" (to {sums.worst:.3f})" if sums.worst > sums.graph else "")


def sum_row(step: str, case: Case, chip: Chip, backend: str, summed: Total) -> list[str]:
    bounds = ", ".join(f"{bound} {share:.0%}" for bound, share in summed.shares.items())
    most = f"{summed.worst:.3f}" if summed.worst > summed.graph else "-"
    times = [f"{summed.kernels:.3f}", f"{summed.graph:.3f}", most, f"{summed.launched:.3f}", f"{summed.floor:.3f}"]
    name = f"{step} {label(case)}"
    return [name, chip.title, backend, dtype_name(case), *times, f"{summed.floor / summed.graph:.0%}", bounds]


def report(cases: Sequence[Case], chips: Sequence[Chip], steps: Sequence[str], wanted: str | None = None) -> str:
    """Every launch of every step on every chip, equal launches in one row, and the sums of all.

    ``wanted`` is the backend of chips that can run more than one.
    """
    blocks, sums = [HEAD + "\n" + NOTES], []
    for step, given, chip in itertools.product(steps, cases, chips):
        case, backend = run_on(given, chip), backend_on(chip, wanted)
        launches = STEPS[step](case, chip, backend)
        summed = total(launches, case.kind, chip)
        rows = [launch_row(one, times, case.kind, chip) for one, times in Counter(launches).items()]
        title = (
            f"{step}  {label(case)} {dtype_name(case)} on {chip.title}, {backend}: {case.layers} layers, "
            f"{case.neurons} neurons, {case.share:.0%} of channels spatial (predicted)"
        )
        ends = (
            f"sum: {summed.kernels:.3f} ms of kernels, {span(summed)} in a CUDA graph, {summed.launched:.3f} "
            f"launched one by one; as written literally {literal_flop(case) / 1e12:.2f} TFLOP an evaluation, "
            f"here {sum(one.flop for one in launches) / 1e12:.2f}"
        )
        blocks.append("\n".join((title, table(LAUNCH_HEAD, rows), ends)))
        sums.append(sum_row(step, case, chip, backend, summed))
    blocks.append("predicted\n" + table(SUM_HEAD, sums))
    old = [chip for chip in chips if chip.capability < 80]
    if old:
        dtypes = sorted({dtype_name(run_on(case, old[0])) for case in cases})
        blocks.append(OLD.format(", ".join(chip.title for chip in old), " and ".join(dtypes)))
    return "\n\n".join(blocks)


def summary(cases: Sequence[Case], chips: Sequence[Chip], steps: Sequence[str], wanted: str | None = None) -> str:
    """One row for each chip: milliseconds of each step and shape as a CUDA graph; what was measured; how to see more.

    Arguments are those of :func:`report`.
    """
    columns = list(itertools.product(steps, cases))
    head = ["milliseconds in a CUDA graph", "backend", "dtype", *(f"{step} {label(case)}" for step, case in columns)]
    rows = []
    for chip in chips:
        backend, on_chip = backend_on(chip, wanted), [run_on(case, chip) for _, case in columns]
        sums = [
            total(STEPS[step](case, chip, backend), case.kind, chip)
            for (step, _), case in zip(columns, on_chip, strict=True)
        ]
        rows.append([chip.title, backend, dtype_name(on_chip[0]), *map(span, sums)])
    first = cases[0]
    about = (
        "PREDICTIONS, NOT MEASUREMENTS: FLOP, bytes, tiles and waves of every launch of a step; "
        f"{first.layers} layers, {first.neurons} neurons, {first.share:.0%} of channels spatial"
    )
    more = "--all lists every launch with what bounds it; --chip, --shape, --step, --dtype and --batch choose."
    return "\n".join([about, "", table(head, rows), "", MEASURED, more])
