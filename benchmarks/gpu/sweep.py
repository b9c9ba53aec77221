"""Never slower on a GPU: one layer against plain PyTorch over channels, planes, batches, gate shares and dtypes.

``python -m benchmarks.gpu.sweep`` times, at every point, a frozen layer, a ``FusedDSTS`` in evaluation and a training
step: on each GPU backend, on the package's own plain PyTorch (``eager``) and handwritten, taking turns in one process,
after checking that they agree. A ratio is a median of several turns; one above 1.05 is measured again, twice, with more
turns, and the median of the three counts. Every sample has a neuron of its own, as far as they go.

The points of one dtype, number of channels and share come together, these groups in an order drawn once, so that a run
that ends early has points everywhere. Every group is written to ``sweep-<device>.json`` as it is done; the command goes
on where it ended, and prints where ours loses. ``--rules`` writes what follows from the points, once all are there,
for :func:`dsts_kernels.backends.choose` (:mod:`benchmarks.gpu.rules`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.gpu import rules
from benchmarks.gpu.baselines import padded
from benchmarks.gpu.handwritten import GROUPINGS, GpuTrain
from benchmarks.gpu.record import describe
from benchmarks.gpu.timing import require_gpu, slug
from benchmarks.gpu.workload import GPU_BACKENDS, half_precision
from benchmarks.parity import TOLERANCES, relative_error
from benchmarks.report import machine
from benchmarks.shapes import NAMED_SHAPES, Problem
from benchmarks.variants import adopt, build, training_step
from dsts_kernels.backends import BACKENDS
from dsts_kernels.bench.handwritten import HandwrittenEval
from dsts_kernels.reference import DSTS, Draws

CHANNELS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 8, 32)
SHARES = (0.0, 0.5, 1.0)
OTHERS = {"channels": (64, 256, 1024), "batches": (1, 8), "shares": (0.5,)}  # of dtypes but the half precision
MODES = ("frozen", "evaluation", "training")
NEURONS = 10
PLAIN, HANDWRITTEN = "eager", "handwritten"
SECONDS = 560.0  # ten minutes, less what a start takes
LIMIT = 4e12  # multiply-adds of a step: beyond, nothing is small enough to lose by
ROUND_SECONDS, MOST_CALLS, ROUNDS, MORE_ROUNDS = 0.004, 50, 7, 15


class Group(NamedTuple):
    """Points that share modules."""

    dtype: str
    channels: int
    share: float


class Point(NamedTuple):
    group: Group
    plane: str
    batch: int
    mode: str

    @property
    def positions(self) -> int:
        return Problem(self.plane, NAMED_SHAPES[self.plane], self.batch).positions

    @property
    def macs(self) -> float:
        """Multiply-adds of the listed channels; a training step has both operators on half of its samples."""
        taps = 9 * self.group.share + 3 * (1 - self.group.share)
        return self.positions * self.group.channels**2 * (taps if self.mode != "training" else 3 * (taps + 12) / 2)

    def __str__(self) -> str:
        dtype, channels, share = self.group
        return f"{self.mode}, {dtype}, C {channels}, {self.plane}, batch {self.batch}, share {share:g}"


def points(half: str) -> dict[Group, list[Point]]:
    """Every point by group; the half precision has all of them, other dtypes some."""
    found: dict[Group, list[Point]] = {}
    for dtype in dict.fromkeys((half, "float16", "float32")):
        whole = dtype == half
        channels, batches, shares = (CHANNELS, BATCHES, SHARES) if whole else OTHERS.values()
        for group in itertools.starmap(Group, itertools.product((dtype,), channels, shares)):
            every = (Point(group, *rest) for rest in itertools.product(NAMED_SHAPES, batches, MODES))
            found[group] = [point for point in every if point.macs <= LIMIT]
    order = list(found)
    random.Random(0).shuffle(order)
    return {group: found[group] for group in order}


@torch.no_grad()
def reference_of(group: Group, device: torch.device) -> DSTS:
    """One literal layer with ``share`` of its channels spatial; neuron ``n`` is scored by channels n, n + N, ..."""
    torch.manual_seed(group.channels)
    dtype = getattr(torch, group.dtype)
    reference = DSTS(group.channels, num_layers=1, num_neurons=NEURONS, dtype=dtype, device=device).eval()
    layer = reference.layers[0]
    layer.scoring.zero_()
    for neuron, gate in enumerate(layer.gate):
        layer.scoring[neuron, :, neuron::NEURONS] = 1 / group.channels
        gate.fill_(-5.0)[torch.randperm(group.channels, device=device)[: round(group.share * group.channels)]] = 5.0
    return reference


def features_of(point: Point, device: torch.device) -> Tensor:
    """``(B, C, T, H, W)``, channels-last; sample ``b`` chooses neuron ``b mod N`` whatever is rounded."""
    grid, channels = NAMED_SHAPES[point.plane], point.group.channels
    x = torch.randn(point.batch, *grid, channels, device=device)
    for b in range(point.batch):
        x[b, ..., b % NEURONS :: NEURONS] += 1
    return x.to(getattr(torch, point.group.dtype)).permute(0, 4, 1, 2, 3)


def modules_of(mode: str, reference: DSTS, backends: Sequence[str]) -> dict[str, nn.Module]:
    """The layer on every backend, and handwritten."""
    training, channels = mode == "training", reference.layers[0].gate.shape[1]
    problem = Problem("one layer", (1, 1, 1), channels=channels, layers=1, neurons=NEURONS)
    variant, step = "frozen" if mode == "frozen" else "fused", "training" if training else "evaluation"
    found = {name: build(variant, step, problem, reference, name) for name in backends}
    if mode == "frozen":
        return found | {HANDWRITTEN: padded(HandwrittenEval(reference))}
    handwritten = adopt(GpuTrain, problem, reference).train(training)
    return found | {HANDWRITTEN: handwritten.group(GROUPINGS[1] if training else GROUPINGS[0])}


def step_of(mode: str, module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    if mode != "training":

        @torch.inference_mode()
        def evaluate() -> Tensor:
            return module(x)

        return evaluate
    (batch, channels), device = x.shape[:2], x.device
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, batch, channels, generator=generator).to(device, x.dtype).float()
    hard = (torch.arange(batch, device=device) % 2 == 0)[None]
    draws = Draws(noise, hard, torch.zeros(1, batch, NEURONS, device=device))
    grad = torch.randn(x.shape, generator=generator).to(device, x.dtype)
    leaf = x.detach().requires_grad_()

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        return training_step(module, leaf, draws, grad)

    return train


def turns(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, all taking turns; a round is as many calls as take a few milliseconds."""

    def timed(step: Callable[[], object], calls: int) -> float:
        machine.synchronise(device)
        began = time.perf_counter()
        for _ in range(calls):
            step()
        machine.synchronise(device)
        return (time.perf_counter() - began) / calls

    calls = {name: max(1, min(MOST_CALLS, int(ROUND_SECONDS / timed(step, 1)))) for name, step in steps.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            spent[name].append(timed(step, calls[name]))
    return {name: 1e3 * statistics.median(values) for name, values in spent.items()}


def measure(point: Point, modules: dict[str, nn.Module], device: torch.device) -> dict[str, float]:
    """Milliseconds by backend, and handwritten.

    Raises:
        AssertionError: results differ by more than the dtype's tolerance.
    """
    x = features_of(point, device)
    steps = {name: step_of(point.mode, module, x) for name, module in modules.items()}
    wanted = steps[HANDWRITTEN]().float()
    for name, step in steps.items():
        error = relative_error(step().float(), wanted)
        if not error <= TOLERANCES[x.dtype][0]:
            raise AssertionError(f"{name} and handwritten differ by {error:.2g}")
        step()  # libraries have searched for algorithms by now
    del wanted
    first = next(iter(steps))
    runs = [turns(steps, device, ROUNDS)]
    if rules.ratio(runs[0], first) > rules.ALLOWED:
        runs += [turns(steps, device, MORE_ROUNDS) for _ in range(2)]
        runs.sort(key=lambda run: rules.ratio(run, first))
    return {name: round(value, 5) for name, value in runs[len(runs) // 2].items()}


def row_of(point: Point, found: dict[str, Any]) -> dict[str, Any]:
    flat = point.group._asdict() | {"plane": point.plane, "batch": point.batch, "mode": point.mode}
    return flat | {"positions": point.positions} | found


def backends_for(dtype: str, device: torch.device) -> list[str]:
    """GPU backends that take the dtype, best first, then plain PyTorch."""
    able = [n for n in GPU_BACKENDS if BACKENDS[n].why_not("gated_conv3d", device, getattr(torch, dtype)) is None]
    return [*able, PLAIN]


def group_rows(
    group: Group, every: Sequence[Point], device: torch.device, backends: Sequence[str], left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """A row for each point, until no time is left."""
    reference = reference_of(group, device)
    for mode in MODES:
        modules = None
        for point in every:
            if point.mode != mode:
                continue
            if left() <= 0:
                return
            try:
                modules = modules or modules_of(mode, reference, backends)
                yield row_of(point, {"ms": measure(point, modules, device)})
            except Exception as error:
                yield row_of(point, {"ms": None, "note": f"{type(error).__name__}: {str(error).strip()[:150]}"})


def before(path: Path, facts: dict[str, Any], fresh: bool) -> list[dict[str, Any]]:
    """Rows of a run that this one goes on with, those that failed left out to be tried again.

    A file of another commit, torch or device is put aside under its commit's name.
    """
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    theirs = record["facts"]
    others = [name for name in ("device", "torch", "commit") if theirs[name] != facts[name]]
    if others or fresh:
        aside = path.with_suffix(f".{theirs['commit']}.json")
        path.replace(aside)
        reason = ", ".join(f"{name} {theirs[name]}, not {facts[name]}" for name in others) or "--fresh"
        print(f"begins anew ({reason}); what was there is in {aside}", flush=True)
        return []
    return [row for row in record["rows"] if row["ms"]]


def run(
    wanted: dict[Group, list[Point]],
    rows: list[dict[str, Any]],
    device: torch.device,
    seconds: float,
    save: Callable[[list[dict[str, Any]]], None],
) -> int:
    """Adds the points that ``rows`` lack; how many are still missing when the time is over."""
    deadline = time.monotonic() + seconds
    done = {key_of(row) for row in rows}
    for group, every in wanted.items():
        missing = [point for point in every if key_of(row_of(point, {})) not in done]
        if not missing or time.monotonic() > deadline:
            continue
        backends = backends_for(group.dtype, device)
        for row in group_rows(group, missing, device, backends, lambda: deadline - time.monotonic()):
            rows.append(row)
            if text := rules.losing(row):
                print(f"  {text}", flush=True)
        save(rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return sum(map(len, wanted.values())) - len(rows)


def key_of(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in (*Group._fields, "plane", "batch", "mode"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for this run ({SECONDS:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of sweep-<device>.json")
    parser.add_argument("--fresh", action="store_true", help="begin anew, and put what was measured aside")
    parser.add_argument("--rules", action="store_true", help="write the rules that backends are chosen by")
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    options = parser.parse_args(arguments)
    device = require_gpu()
    facts = describe(device, options.commit)
    path = options.out / f"sweep-{slug(facts['device'])}.json"
    rows = before(path, facts, options.fresh)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{facts['device']}, commit {facts['commit']}: {len(rows)} points were there", flush=True)

    def save(rows: list[dict[str, Any]]) -> None:
        path.write_text(json.dumps({"facts": facts, "rows": rows}).replace('{"dtype"', '\n{"dtype"') + "\n")

    torch.backends.cudnn.benchmark = True
    missing = run(points(str(half_precision(device)).removeprefix("torch.")), rows, device, options.seconds, save)
    torch.backends.cudnn.benchmark = False
    failed = [row for row in rows if not row["ms"]]
    print("\n".join(rules.summary(rows)))
    for row in failed:
        print(f"FAILED {rules.words(row)}: {row['note']}")
    if options.rules and (missing or failed):
        print("no rules written: they wait for every point, as one alone can speak against a rule")
    elif options.rules:
        major, minor = torch.cuda.get_device_capability(device)
        print(f"wrote {rules.write(rows, f'sm_{major}{minor}', facts)}")
    left = f"{missing} points are left: the same command goes on" if missing else "all points are there"
    print(f"{len(rows)} points in {path}; {left}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
