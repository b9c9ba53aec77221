"""Time one op on this machine, beside its floor, and beside another commit: ``python -m benchmarks.op gated_conv3d``.

The op is compared with the eager backend first. A round is as many calls as take a tenth of a second, after one that is
not timed; a time is the median over rounds. The floor is what its operations take at the machine's rate for matrix
products, or its bytes, each read or written once, at the rate of a copy, whichever is longer; both rates are measured
in the same run. Operations are those of direct convolutions: a fast convolution does with fewer.

With ``--base REV`` two processes, of this tree and of that commit (:mod:`benchmarks.revision`), take turns round by
round. The ratio is the median over rounds, with an interval that holds it 95 times in 100 (bootstrap).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

import dsts_kernels
from benchmarks import ROOT
from benchmarks.gpu import timing
from benchmarks.registry import FACTOR, OPS, Inputs, op_flop
from benchmarks.report import machine
from benchmarks.shapes import Problem, parse_shape
from dsts_kernels.backends import BACKENDS, choose
from dsts_kernels.testing import TOLERANCES, relative_error

DTYPES = ("float32", "float64", "bfloat16", "float16")
ROUNDS, ROUND_SECONDS, MOST_CALLS = 20, 0.1, 2000
RESAMPLES, INTERVAL = 2000, 0.95


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed; a process of another commit is given it as JSON."""

    op: str
    problem: Problem
    dtype: str
    device: str
    backend: str | None = None
    threads: int | None = None

    @classmethod
    def read(cls, text: str) -> Case:
        fields = json.loads(text)
        problem = fields["problem"]
        return cls(**{**fields, "problem": Problem(**{**problem, "grid": tuple(problem["grid"])})})

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class Runner(Protocol):
    """One side of a comparison; ``facts``: backend, parity, operations, bytes and place of its package."""

    facts: dict[str, Any]

    def seconds(self, calls: int) -> float:
        """Of a call, over one round."""


class Timed:
    """An op of this process, compared with the eager backend."""

    @torch.no_grad()
    def __init__(self, case: Case) -> None:
        if case.threads:
            torch.set_num_threads(case.threads)
        self.device, dtype = torch.device(case.device), getattr(torch, case.dtype)
        backend = choose(case.op.removesuffix("_backward"), self.device, dtype, case.backend).name
        copies = 1
        if self.device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            copies = timing.rotation_count(torch.Size(case.problem.feature_shape).numel() * dtype.itemsize, l2_bytes)
        inputs, run = Inputs(case.problem, dtype, self.device, copies), OPS[case.op].run
        self.steps: list[Callable[[], object]] = [lambda x=x: run(inputs, x, backend) for x in inputs.xs]
        self.facts = {
            "package": str(Path(dsts_kernels.__file__).parent),
            "backend": backend,
            "error": parity(case.op, run(inputs, inputs.xs[0], backend), run(inputs, inputs.xs[0], "eager")),
            "flop": op_flop(case.op, inputs, backend),
            "bytes": OPS[case.op].moved(inputs),
        }

    @torch.no_grad()
    def seconds(self, calls: int) -> float:
        """Of a call, over a round that ends when the device is done; one call before it is not timed."""
        self.steps[-1]()
        machine.synchronise(self.device)
        start = time.perf_counter()
        for i in range(calls):
            self.steps[i % len(self.steps)]()
        machine.synchronise(self.device)
        return (time.perf_counter() - start) / calls


def parity(op: str, results: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest relative error; raises ``AssertionError`` where it is beyond tolerance."""
    errors = [relative_error(*pair) for pair in zip(results, wanted, strict=True)]
    limit = FACTOR * TOLERANCES[results[0].dtype]
    for number, error in enumerate(errors):
        if not error <= limit:
            raise AssertionError(
                f"{op}: result {number} is off the eager backend's by {error:.3g}, allowed {limit:.3g}"
            )
    return max(errors)


def compared(case: Case) -> Timed:
    """The op ready to be timed, or an exit that says how it differs."""
    try:
        return Timed(case)
    except AssertionError as error:
        raise SystemExit(f"benchmarks.op: {error}; not timed") from None


def serve(case: Case, commands: TextIO, answers: TextIO) -> None:
    """The side of another process: its facts, then the seconds of a round for every line that asks for calls."""
    with contextlib.redirect_stdout(sys.stderr):
        timed = compared(case)
        print(json.dumps(timed.facts), file=answers, flush=True)
        for line in commands:
            print(timed.seconds(int(line)), file=answers, flush=True)


def take_turns(runners: Sequence[Runner], rounds: int) -> list[list[float]]:
    """Seconds of a call: a list for each runner, an element for each round; who begins changes every round."""
    once = max(runner.seconds(1) for runner in runners)
    calls = max(1, min(MOST_CALLS, int(ROUND_SECONDS / once)))
    seconds: list[list[float]] = [[] for _ in runners]
    for number in range(rounds):
        order = range(len(runners)) if number % 2 == 0 else reversed(range(len(runners)))
        for index in order:
            seconds[index].append(runners[index].seconds(calls))
    return seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which values the median lies, by medians of samples drawn with replacement."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    beyond = int(RESAMPLES * (1 - INTERVAL) / 2)
    return medians[beyond], medians[-1 - beyond]


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """GFLOP/s of the best large product, and GB/s of a large copy."""
    if device.type == "cuda":
        products, copied = timing.matrix_rate(device, dtype), timing.copy_rate(device)
    else:
        products, copied = machine.matrix_rate(device, dtype), machine.copy_rate()
    return float(products[products["best"]]), copied


def unit(seconds: float) -> str:
    """In milliseconds, or microseconds where that is short."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def floor_lines(facts: dict[str, Any], matrix: float, copied: float) -> tuple[float, str]:
    """The floor's seconds, and the line that says what it is made of."""
    products, memory = facts["flop"] / matrix / 1e9, facts["bytes"] / copied / 1e9
    parts = [f"{facts['bytes'] / 1e6:.3g} MB at {copied:.3g} GB/s: {unit(memory)}"]
    if products:
        parts.insert(0, f"{facts['flop'] / 1e9:.3g} GFLOP at {matrix:.3g} GFLOP/s: {unit(products)}")
    return max(products, memory), "floor: " + "; ".join(parts)


def time_line(name: str, facts: dict[str, Any], seconds: Sequence[float], floor: float) -> str:
    median = statistics.median(seconds)
    return (
        f"{name}: {unit(median)} (least {unit(min(seconds))}, {median / floor:.3g} times the floor), "
        f"backend {facts['backend']}, relative error {facts['error']:.1e}"
    )


def report(case: Case, runners: dict[str, Runner], rounds: int) -> list[str]:
    """Times all runners, the first of which is this tree."""
    device = torch.device(case.device)
    facts = machine.describe(device)
    where = ", ".join(f"{facts[key]}" for key in ("device", "isa") if facts[key])
    lines = [
        f"{case.op}, {case.problem.label}, {case.dtype}",
        f"{where}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}",
    ]
    ours = next(iter(runners.values()))
    floor, line = floor_lines(ours.facts, *rates(device, getattr(torch, case.dtype)))
    seconds = take_turns(list(runners.values()), rounds)
    lines.append(line)
    for (name, runner), spent in zip(runners.items(), seconds, strict=True):
        lines.append(time_line(name, runner.facts, spent, floor))
    if len(seconds) == 2:
        ratios = [one / other for one, other in zip(*seconds, strict=True)]
        low, high = interval(ratios)
        names = " / ".join(runners)
        median = statistics.median(ratios)
        lines.append(f"{names}: {median:.3f} (95%: {low:.3f} to {high:.3f}, {rounds} rounds)")
    return lines


def read_options(arguments: Sequence[str] | None) -> tuple[Case, argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op", description=__doc__.splitlines()[0])
    parser.add_argument("op", help=", ".join(OPS))
    parser.add_argument("--base", metavar="REV", help="also time this commit, taking turns")
    parser.add_argument("--shape", default="tpn", help="tpn, swin or TxHxW (tpn)")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--neurons", type=int, default=10)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--backend", choices=list(BACKENDS), help="the one that is timed (default: the one chosen)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    if options.op not in OPS:
        parser.error(f"op: got {options.op!r}, wanted one of {', '.join(OPS)}")
    for name in ("channels", "batch", "neurons", "rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: got {value}, wanted at least 1")
    try:
        name, grid = parse_shape(options.shape)
        device = str(torch.empty(0, device=options.device).device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    if options.backend is not None:
        dtype = getattr(torch, options.dtype)
        reason = BACKENDS[options.backend].why_not(options.op.removesuffix("_backward"), torch.device(device), dtype)
        if reason is not None:
            parser.error(f"--backend: {options.backend} cannot run {options.op}: {reason}")
    problem = Problem(name, grid, options.batch, options.channels, neurons=options.neurons)
    case = Case(options.op, problem, options.dtype, device, options.backend, options.threads)
    return case, options, parser


def main(arguments: Sequence[str] | None = None) -> int:
    case, options, parser = read_options(arguments)
    if options.base is None:
        lines = report(case, {"time": compared(case)}, options.rounds)
    else:
        from benchmarks.revision import Refused, Worker, base_tree

        try:
            with base_tree(options.base, case.device) as tree, Worker(ROOT, case) as ours, Worker(tree, case) as base:
                if case.threads:
                    torch.set_num_threads(case.threads)
                lines = report(case, {"this tree": ours, options.base: base}, options.rounds)
        except Refused as refused:
            parser.error(str(refused))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
