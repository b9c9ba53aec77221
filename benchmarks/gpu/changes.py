"""Each change of the GPU path, old beside new, in one call: ``python -m benchmarks.gpu.changes``.

A change is a switch of :mod:`dsts_kernels.backends.gpu.switches`. Where it may matter (:data:`WHERE`) a module is
built, captured and run with the switch off (old) and on (new), all other switches as they are by default. Results are
compared with each other first. Then both take turns, round by round; the ratio is the median over rounds of new over
old, with an interval that holds it 95 times in 100. Beside it stand the sum of every launch and the host's time, of
both.

A case gets its share of the time that is left; one that no longer fits is listed. ``--dry-run`` runs every case at toy
sizes on CPU tensors, in Triton's interpreter (``TRITON_INTERPRET=1``), to show that all of them can run; that takes
minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.gpu.record import LATE, describe
from benchmarks.gpu.timing import captured, host_us, kernel_sum, kernel_times, require_gpu, slug
from benchmarks.gpu.workload import GPU_BACKENDS, TRAINING_BATCH, Workload
from benchmarks.op import interval, take_turns
from benchmarks.parity import TOLERANCES, relative_error
from benchmarks.report import machine
from benchmarks.shapes import NAMED_SHAPES
from benchmarks.variants import build, restore_statistics, training_step
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu.switches import Switches, switched

__all__ = ["MODES", "WHERE", "Case", "Side", "Where", "cases", "measure", "run"]

MODES = ("training", "frozen", "evaluation", "training graph", "frozen graph", "evaluation graph")
SECONDS = 440.0  # eight minutes, less what a start takes
CASE_NEEDS = 4.0  # seconds that a case takes at the least, compilation left out
LEAST_ROUNDS, MOST_ROUNDS, ROUND_NEEDS = 6, 20, 0.25
SMALL_CHANNELS, SMALL_GRIDS = 64, {"small": (8, 7, 7)}
TOY_CHANNELS, TOY_GRIDS = 16, {"tpn": (2, 3, 3), "swin": (3, 2, 2), "small": (1, 2, 2)}


class Where(NamedTuple):
    """Modes and shapes in which a change may matter. Kernels show in graphs, what the host does in eager modes."""

    modes: tuple[str, ...] = ("training", "training graph", "frozen", "frozen graph")
    shapes: tuple[str, ...] = ("tpn", "swin")


WHERE: dict[str, Where] = {
    "plain_where_faster": Where(("training", "evaluation"), ("small",)),
    "flat_gather": Where(("training graph", "frozen graph")),
    "early_gather": Where(("frozen graph",)),
    "gluon_gather": Where(("frozen graph",)),
    "turned_gather": Where(("training graph", "frozen graph")),
    "gluon_conv": Where(("frozen graph",)),
    "gluon_data_gradient": Where(("training graph",)),
    "gluon_weight_gradient": Where(("training graph",)),
    "fuse_routing": Where(("training", "evaluation", "training graph", "evaluation graph")),
    "keep_counters": Where(("training", "evaluation", "training graph")),
    "remember_launches": Where(("training", "evaluation", "frozen")),
    "record_calls": Where(("training", "evaluation", "frozen")),
    "whole_waves": Where(("training graph", "frozen graph")),
    "flat_norm": Where(("training graph",)),
    "keep_lists": Where(("training", "training graph")),
    "read_filters": Where(("evaluation graph",)),
    "keep_filters": Where(("training graph",)),
}
"""By switch; one that is not here is timed in four modes at both of the paper's shapes."""

UNNAMED = ("plain_where_faster",)
"""Switches of how a backend is chosen, which show only in a module that names none."""


class Case(NamedTuple):
    change: str
    mode: str
    shape: str

    def __str__(self) -> str:
        return f"{self.change}, {self.mode}, {self.shape}"


def cases(changes: Sequence[str] | None = None) -> list[Case]:
    """Every case of these changes, of all if ``None``.

    What is on by default first, for a kernel that faults ends all that follows; then shape by shape, so that what is
    late is the second shape.
    """
    names = changes or [field.name for field in dataclasses.fields(Switches)]
    found = [
        Case(name, mode, shape)
        for name in names
        for mode, shape in itertools.product(WHERE.get(name, Where()).modes, WHERE.get(name, Where()).shapes)
    ]
    shapes, usual = list(dict.fromkeys(case.shape for case in found)), Switches()
    order = lambda case: (not getattr(usual, case.change), shapes.index(case.shape), names.index(case.change))  # noqa: E731
    return sorted(found, key=order)


class Side:
    """One of two ways: a mode's step under its switches, from the module that is built to every call."""

    def __init__(self, work: Workload, backend: str, mode: str, shape: str, changes: dict[str, bool]) -> None:
        self.work, self.shape, self.changes = work, shape, changes
        self.kind, _, graph = mode.partition(" ")
        self.training = self.kind == "training"
        named = None if changes.keys() & set(UNNAMED) else backend
        with switched(**changes):
            variant, step = ("frozen", "evaluation") if self.kind == "frozen" else ("fused", self.kind)
            self.module = build(variant, step, work.problem(shape, TRAINING_BATCH), work.half, named)
            if self.training:
                restore_statistics(self.module, work.half)
            self.inputs = [x.detach().requires_grad_(self.training) for x in work.inputs(shape, TRAINING_BATCH)]
            self.steps = [self.step_on(x) for x in self.inputs]
            if graph:
                self.captured = self.steps[0]  # with the tensors that the graph reads
                self.graph, self.output = captured(self.captured, before=self.drop)
                self.steps = [self.replay]

    def step_on(self, x: Tensor) -> Callable[[], Tensor]:
        if not self.training:

            @torch.no_grad()
            def evaluate() -> Tensor:
                return self.module(x)

            return evaluate
        draws, grad = self.work.draws(self.shape), self.work.output_gradient(self.shape)

        def train() -> Tensor:
            self.drop()
            return training_step(self.module, x, draws, grad)

        return train

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output

    def drop(self) -> None:
        """Gradients of the step before."""
        if self.training:
            self.module.zero_grad(set_to_none=True)
            for x in self.inputs:
                x.grad = None

    def results(self) -> list[Tensor]:
        """The output of a step on the first input, and every gradient."""
        with switched(**self.changes):
            found = [self.steps[0]()]
        if self.training:
            found += [self.inputs[0].grad, *(p.grad for p in self.module.parameters())]
        return [t.clone() for t in found]

    def seconds(self, calls: int) -> float:
        """Of a call, over a round that ends when the device is done; one call before it is not timed."""
        device = self.work.device
        with switched(**self.changes):
            self.steps[-1]()
            machine.synchronise(device)
            start = time.perf_counter()
            for i in range(calls):
                self.steps[i % len(self.steps)]()
            machine.synchronise(device)
            return (time.perf_counter() - start) / calls

    def kernels_and_host(self) -> tuple[float, float] | None:
        """Microseconds of every launch of a step, and of the host; ``None`` on a CPU."""
        if self.work.device.type != "cuda":
            return None
        with switched(**self.changes):
            return kernel_sum(kernel_times(self.steps[0], repeats=5)), host_us(self.steps[0])


def difference(sides: Sequence[Side], dtype: torch.dtype) -> float:
    """The largest relative error between both sides' results.

    Raises:
        AssertionError: it is beyond the tolerance of a parity check.
    """
    output, gradient = TOLERANCES[dtype]
    errors = [relative_error(new.float(), old.float()) for old, new in zip(*(s.results() for s in sides), strict=True)]
    for index, error in enumerate(errors):
        limit = gradient if index else output
        if not error <= limit:
            raise AssertionError(f"{'a gradient' if index else 'the output'} differs by {error:.2g}, allowed {limit:g}")
    return max(errors)


def measure(case: Case, work: Workload, backend: str, seconds: float) -> dict[str, Any]:
    """Old beside new, within about ``seconds`` once both are compiled; one round on a CPU, where times mean nothing."""
    sides = [Side(work, backend, case.mode, case.shape, {case.change: on}) for on in (False, True)]
    error = difference(sides, work.dtype)
    on_gpu = work.device.type == "cuda"
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / (2 * ROUND_NEEDS)))) if on_gpu else 1
    old, new = take_turns(sides, rounds)
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    found = {
        "old_ms": 1e3 * statistics.median(old),
        "new_ms": 1e3 * statistics.median(new),
        "ratio": statistics.median(ratios),
        "interval": interval(ratios),
        "rounds": rounds,
        "error": error,
    }
    if (times := [side.kernels_and_host() for side in sides])[0] is not None:
        found |= {"kernels_us": [kernels for kernels, _ in times], "host_us": [host for _, host in times]}
    return found


def line(case: Case, found: dict[str, Any]) -> str:
    """A case in words."""
    if "note" in found:
        return f"{case}: {found['note']}"
    low, high = found["interval"]
    text = f"{case}: old {found['old_ms']:.3f} ms, new {found['new_ms']:.3f}, new / old {found['ratio']:.3f}"
    text += f" (95%: {low:.3f} to {high:.3f}, {found['rounds']} rounds)"
    for name in ("kernels", "host"):
        if f"{name}_us" in found:
            text += ", {} {:.0f} -> {:.0f} us".format(name, *found[f"{name}_us"])
    return f"{text}, differ by {found['error']:.1e}"


def run(
    wanted: Sequence[Case], work_of: Callable[[str], Workload], backend: str, seconds: float
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every case with what was found, or with the reason why not; ``failed`` says that one went wrong."""
    deadline = time.monotonic() + seconds
    for index, case in enumerate(wanted):
        left = deadline - time.monotonic()
        if left < CASE_NEEDS:
            yield case, {"note": LATE}
            continue
        work = work_of(case.shape)
        if case.mode.endswith("graph") and work.device.type != "cuda":
            yield case, {"note": "not run: no CUDA graph on a CPU"}
            continue
        try:
            found = measure(case, work, backend, left / (len(wanted) - index) - CASE_NEEDS)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            found = {"note": f"FAILED: {type(error).__name__}: {text[0][:150]}", "failed": True}
        yield case, found
        if work.device.type == "cuda":
            work.drop()


def workloads(device: torch.device, toy: bool) -> Callable[[str], Workload]:
    """The workload of a shape: the paper's two share weights, the small one has fewer channels."""
    made: dict[str, Workload] = {}

    def of(shape: str) -> Workload:
        name = "small" if shape in SMALL_GRIDS else "paper"
        if name not in made:
            if toy:
                options = {"channels": TOY_CHANNELS, "grids": TOY_GRIDS, "dtype": torch.float32}
            elif name == "small":
                options = {"channels": SMALL_CHANNELS, "grids": SMALL_GRIDS}
            else:
                options = {"grids": NAMED_SHAPES}
            l2_bytes = 1000 if toy else torch.cuda.get_device_properties(device).L2_cache_size
            made[name] = Workload(device, l2_bytes, **options)
        return made[name]

    return of


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.changes", description=__doc__.splitlines()[0])
    names = [field.name for field in dataclasses.fields(Switches)]
    parser.add_argument("--change", action="append", choices=names, help="one of the switches (all)")
    parser.add_argument("--mode", action="append", choices=MODES, help="default: wherever the change may matter")
    parser.add_argument("--backend", choices=GPU_BACKENDS, default="triton")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all cases together ({SECONDS:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of changes-<device>.json")
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on CPU tensors; nothing is written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    device = torch.device("cpu") if options.dry_run else require_gpu()
    reason = BACKENDS[options.backend].why_not("gated_conv3d", device, torch.float32)
    if reason is not None:
        raise SystemExit(f"benchmarks.gpu.changes: {options.backend} cannot run on {device}: {reason}")
    wanted = [case for case in cases(options.change) if case.mode in (options.mode or MODES)]
    facts = {} if options.dry_run else describe(device, options.commit)
    target = None if options.dry_run else options.out / f"changes-{slug(facts['device'])}.json"
    print("a dry run: times mean nothing" if options.dry_run else f"{facts['device']}, commit {facts['commit']}")
    rows, failed = [], False
    for case, found in run(wanted, workloads(device, options.dry_run), options.backend, options.seconds):
        rows.append(case._asdict() | found)
        failed |= found.get("failed", False)
        print(line(case, found), flush=True)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": facts, "backend": options.backend, "rows": rows}
            target.write_text(json.dumps(record, indent=1) + "\n")
    if target is not None:
        print(f"results written to {target}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
