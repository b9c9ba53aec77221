"""``python -m dsts_kernels bench``: the table of README and docs/performance.md for this machine."""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__, backends
from ..backends.build import build_details
from ..classify.classifier import usable
from ..roofline import SHAPES
from .turns import STEPS, TITLES, Problem, Row, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ("step", "features", "variant", "ms", "vs literal", "vs handwritten")
SECONDS, QUICK_SECONDS = 20.0, 4.0  # for a step of all variants


def add_arguments(parser: argparse.ArgumentParser, shape, count) -> None:
    """Options; ``shape`` and ``count`` read one."""
    add = parser.add_argument
    add("--quick", action="store_true", help="about a minute on two free cores: swin alone, a few rounds")
    add("--shape", type=shape, action="append", help="tpn, swin or CxTxHxW; repeatable (tpn and swin)")
    add("--step", choices=(*STEPS, "all"), default="all", help="(all)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="(float32)")
    add("--batch", type=count, default=1, help="samples (1)")
    add("--layers", type=count, default=3, help="layers of the module (3)")
    add("--neurons", type=count, default=10, help="neurons in each layer (10)")
    add("--device", default="cpu", help="such as cuda (cpu)")
    add("--threads", type=count, help="of the CPU (as torch chooses)")


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def heading(problem: Problem) -> str:
    """What a number needs beside it."""
    on_gpu = problem.device.type == "cuda"
    name = torch.cuda.get_device_name(problem.device) if on_gpu else processor()
    threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
    instructions = "" if on_gpu else f", {build_details().get('instructions', 'no native kernels').split(' in use')[0]}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    dtype = str(problem.dtype).removeprefix("torch.")
    running = backends.choose("frozen_layer", problem.device, problem.dtype).name
    versions = f"torch {torch.__version__}, dsts_kernels {__version__}"
    return f"{name}{threads}{instructions}, {versions} (backend {running!r}), {dtype}, {today}"


def label(problem: Problem) -> str:
    named = next((name for name, known in SHAPES.items() if known == (problem.channels, problem.size)), None)
    sizes = "x".join(map(str, (problem.batch, problem.channels, *problem.size)))
    return f"{named} {sizes}" if named else sizes


def table_rows(problem: Problem, rows: Sequence[Row]) -> list[list[str]]:
    """Cells of one step; our own variants in bold."""
    ms = {row.variant: row.ms for row in rows}
    cells = []
    for row in rows:
        ratios = [f"{ms[base] / row.ms:.2f}x" for base in ("literal", "handwritten")]
        time_cell, title = f"{row.ms:.{1 if row.ms >= 10 else 3}f}", TITLES[row.variant]
        if row.variant in ("fused", "frozen"):
            time_cell, title = f"**{time_cell}**", f"**{title}**"
        cells.append([row.step, label(problem), title, time_cell, *ratios])
    return cells


def busy() -> str:
    """A line where others keep the processors busy, so that times say little."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if load <= 1.5 * cores:
        return ""
    return f"**The machine was busy** (load {load:.0f} on {cores} processors): do not rely on these times.\n"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table that is aligned as text, too."""
    widths = [max(len(line[i]) for line in (COLUMNS, *lines)) for i in range(len(COLUMNS))]
    rule = ["-" * width if i < 3 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def row(cells: Sequence[str]) -> str:
        placed = (
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(placed) + " |"

    return "\n".join(row(line) for line in (COLUMNS, rule, *lines))


def tell(*words: str) -> None:
    """How far it is, beside the table."""
    print(*words, file=sys.stderr, flush=True)


def problems(given: argparse.Namespace) -> list[Problem]:
    """What is measured.

    Raises:
        ValueError: no such device.
    """
    device = usable(given.device)
    shapes = given.shape or ([SHAPES["swin"]] if given.quick else list(SHAPES.values()))
    sizes = (given.batch, given.layers, given.neurons, DTYPES[given.dtype], device)
    return [Problem(channels, size, *sizes) for channels, size in dict.fromkeys(shapes)]


def bench(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """The table, with what it was measured on."""
    before = torch.get_num_threads()
    try:
        found = problems(given)
        if given.threads:
            torch.set_num_threads(given.threads)
        began, lines, rounds = time.perf_counter(), [], []
        memory = found[0].parameters * found[0].dtype.itemsize / 2**30
        tell(f"weights of a module: {memory:.1f} GiB; about three times that is needed")
        for problem in found:
            for step in STEPS if given.step == "all" else (given.step,):
                say = functools.partial(tell, f"{step}, {label(problem)}:")
                rows = list(measure(problem, step, QUICK_SECONDS if given.quick else SECONDS, say))
                rounds += [row.rounds for row in rows]
                lines += table_rows(problem, rows)
                say(f"done, {time.perf_counter() - began:.0f} s since the start")
        told = heading(found[0])
    except (ValueError, ArithmeticError, RuntimeError) as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(before)
    notes = busy() + (
        f"ms: median of {min(rounds)} to {max(rounds)} rounds in turns, random features; training is forward and "
        "backward.\nEach variant was compared with the literal module before it was timed."
    )
    return f"{told}\n\n{markdown(lines)}\n\n{notes}"
