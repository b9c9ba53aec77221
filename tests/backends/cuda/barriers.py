"""Leaves out one barrier or fence of the CUDA kernels at a time, in processes of their own, and prints what came of it.

``DSTS_EMULATED=thread-700 python -m tests.backends.cuda.barriers [site ...]``, with the variables of
``build.environment``. Sites go by source, function and number in it (``schedule.scan-2``). Each line holds a site, its
outcome and the last case that ran: ``race``, ``wrong``, ``stuck``, ``hung`` (no end), or ``unnoticed`` where all cases
that meet it passed without. Lines of ``nothing`` are of the cases as they are.

``--record`` in place of sites sweeps all and writes the outcomes into ``barriers.json``, with a digest of all that they
depend on. While the digest holds, tests take the record's word and sweep a few sites only: a sweep takes 8 minutes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends.gpu.lists import Plan, panel_width
from dsts_kernels.ops.frozen_layer import frozen_layer
from dsts_kernels.testing import assert_close, poisoned_memory

from ...support.emulation import ARCHS, compiled
from ...support.inputs import gated_inputs
from ...support.oracles import literal_gradients, literal_mixing, wide
from ...support.stand_ins import BACKEND, KERNELS, check_gated

HALF, FLOAT = torch.float16, torch.float32
OUTCOMES = {0: "unnoticed", 66: "race", 1: "wrong", -6: "stuck", -9: "hung"}
SECONDS = 300.0  # that a child may take: on a quiet machine a whole sweep of three sites took 105
RECORD = Path(__file__).with_name("barriers.json")
Site = str  # "1 83 /path/device.h": whether it is a fence, line, file


def gated(dtype: torch.dtype, processors: int, needs: tuple[bool, ...] = (False,) * 4, **options) -> None:
    BACKEND.processors = processors
    check_gated(gated_inputs(dtype=dtype, **options), needs, forward=not any(needs))


def mixing() -> None:
    BACKEND.processors = 2
    z, neuron, weight = torch.randn(2, 72, 1, 3, 5), torch.tensor([1, 0]), torch.randn(2, 72, 72, 3, 1, 1) / 15
    results = [BACKEND.mixing_conv3d(z, neuron, weight)]
    results += BACKEND.mixing_conv3d_backward(z, z, neuron, weight, [True, True])
    wanted = [literal_mixing(*wide([z, neuron, weight])), *literal_gradients(literal_mixing, [z, neuron, weight], z)]
    for result, expected in zip(results, wanted, strict=True):
        assert_close(result, expected, factor=2)


def frozen(dtype: torch.dtype, taps: int, processors: int, channels: int, size: tuple[int, int, int]) -> None:
    """One layer, twice over: its sums are what the second is routed by."""
    BACKEND.processors = processors
    options = dict(scoring_kernel=(1, 3, 3)) if taps == 9 else {}
    dsts = FusedDSTS(channels, num_layers=1, num_neurons=9, backend="eager", **options).eval().to(dtype)
    with torch.no_grad():
        dsts.layers[0].gate.normal_()
    layer, x = dsts.freeze(backend=BACKEND.name).layers[0], torch.randn(2, channels, *size).to(dtype)
    y, sums, *_ = frozen_layer(x, None, x, layer.weights(), layer.options(taps), backend=BACKEND.name)
    z, *_ = frozen_layer(y, sums, y, layer.weights(), layer.options(taps), backend=BACKEND.name)
    dsts = dsts.double()
    assert_close(y, dsts(x.double()), factor=2)
    assert_close(z, dsts(y.double()), factor=2)


def lists() -> None:
    """Several rounds of 256 channels and of 256 samples."""
    neuron, gate = torch.arange(300) * 7 % 11, (torch.rand(300, 600) < 0.5).float()
    groups = KERNELS.group_samples(neuron, 11)
    assert groups.slots.tolist() == neuron.tolist() and groups.neuron_of.tolist() == list(range(11))
    for size, slot in zip(groups.groups[:, 1].tolist(), range(11), strict=True):
        assert size == int((neuron == slot).sum())
    for row, order in zip(gate[:4], KERNELS.list_channels(gate[:4], groups, False, 32).order, strict=True):
        assert order.tolist() == [*row.nonzero()[:, 0].tolist(), *(row == 0).nonzero()[:, 0].tolist()]


def sums() -> None:
    for x in (torch.randn(2, 70, 2, 5, 7), torch.randn(2, 2, 5, 7, 72).permute(0, 4, 1, 2, 3)):
        for taps in (1, 9):
            result = BACKEND.tap_sums(x, taps)
            assert_close(result.sum(-1) if taps == 1 else result[..., 4], x.double().sum((2, 3, 4)))


def whole_positions() -> None:
    """Positions with all their channels, in several rounds of a CTA."""
    BACKEND.processors = 1
    x = torch.randn(4, 1040, 1, 3, 5).half().contiguous(memory_format=torch.channels_last_3d)
    gate, neuron = (torch.rand(4, 1040) < 0.5).half(), torch.tensor([1, 0, 1, 0])
    lists = KERNELS.list_channels(gate, KERNELS.group_samples(neuron, 2), False, 64)
    panel = KERNELS.gather_panel(x, gate, neuron, 2, None, lists, panel_width(1040, HALF, True))
    for b, plan in enumerate(lists.plans.tolist()):
        count = Plan(*plan).spatial_channels
        assert torch.equal(panel[b, ..., :count], x[b, lists.order[b, :count].long()].movedim(0, -1))


def turned_positions() -> None:
    """K blocks of positions that lie side by side, in several rounds of a CTA."""
    BACKEND.processors = 1
    x, gate = torch.randn(2, 400, 1, 8, 9).half(), (torch.rand(2, 400) < 0.5).half()
    neuron = torch.tensor([1, 0])
    lists = KERNELS.list_channels(gate, KERNELS.group_samples(neuron, 2), False, 64)
    panel = KERNELS.gather_panel(x, gate, neuron, 2, None, lists, panel_width(400, HALF, True))
    for b, plan in enumerate(lists.plans.tolist()):
        count = Plan(*plan).spatial_channels
        assert torch.equal(panel[b, ..., :count], x[b, lists.order[b, :count].long()].movedim(0, -1))


TWO = dict(batch=1, channels=40, outputs=72, size=(1, 9, 15))  # tiles of positions; outputs in both halves of a tile
SHORT = dict(batch=5, channels=40, outputs=72, size=(1, 2, 3))
WIDE = dict(batch=2, channels=72, outputs=24, size=(1, 2, 3))  # channels in both halves of a tile
ALL = (True,) * 4
CASES: dict[str, Callable[[], None]] = {
    "lists": lists,
    "sums": sums,
    "whole positions": whole_positions,
    "turned positions": turned_positions,
    "waves float": lambda: gated(FLOAT, 1, **SHORT),
    "waves half": lambda: gated(HALF, 1, **SHORT),
    "split float": lambda: gated(FLOAT, 9, **TWO),
    "split half": lambda: gated(HALF, 9, **TWO),
    "training float": lambda: gated(FLOAT, 3, ALL, **WIDE),
    "training half": lambda: gated(HALF, 3, ALL, **TWO),
    "listed half": lambda: gated(HALF, 3, (True, False, False, False), **WIDE),
    "listed float": lambda: gated(FLOAT, 3, (True, False, False, False), **WIDE),
    "many tiles": lambda: gated(HALF, 40, batch=130, channels=8, outputs=8, size=(1, 1, 1), gate="all-temporal"),
    "mixing": mixing,
    "frozen float 1": lambda: frozen(FLOAT, 1, 5, 72, (1, 2, 3)),
    "frozen half 9": lambda: frozen(HALF, 9, 3, 72, (1, 9, 15)),
    "frozen half 1": lambda: frozen(HALF, 1, 1, 264, (1, 2, 3)),
}


def name_of(site: Site) -> str:
    """Source, function and the how manieth barrier or fence there it is."""
    _, line, file = site.split(" ", 2)
    function, number = "", 0
    for text in Path(file).read_text().splitlines()[: int(line)]:
        if re.match(r"\s*(__device__|__global__|[a-z]\w+\(const __grid_constant__)", text):
            function, number = next(iter(set(re.findall(r"(\w+)\(", text)) - {"__launch_bounds__"}), ""), 0
        number += bool(re.search(r"\b__(syncthreads|syncwarp|threadfence)\(", text))
    return f"{Path(file).stem}.{function}-{number}"


def run(case: str) -> None:
    """The same inputs whenever it runs."""
    torch.manual_seed(len(case))
    with poisoned_memory():
        CASES[case]()


class Child(NamedTuple):
    """A process that works, and the pipe on which it says how far it is."""

    name: str
    work: Callable[[Callable[[str], object]], object]
    process: int
    pipe: int
    deadline: float

    @classmethod
    def start(cls, name: str, work: Callable[[Callable[[str], object]], object]) -> Child:
        pipe, other_end = os.pipe()
        if (process := os.fork()) == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                work(lambda line: os.write(other_end, line.encode() + b"\n"))
                code = 0
            except Exception as error:
                os.write(other_end, repr(error).encode() + b"\n")
            finally:
                os._exit(code)
        os.close(other_end)
        return cls(name, work, process, pipe, time.monotonic() + SECONDS)

    def result(self) -> tuple[str, list[str]]:
        """Outcome and what it said. ``hung``, and it is killed, where it takes longer than it may."""
        said = b""
        while select.select([self.pipe], [], [], max(0.0, self.deadline - time.monotonic()))[0]:
            line = os.read(self.pipe, 1 << 16)
            said += line
            if not line:
                break
        else:
            os.kill(self.process, signal.SIGKILL)
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return OUTCOMES.get(code, str(code)), said.decode().splitlines()

    def outcome(self) -> tuple[str, str, list[str]]:
        """Its name, outcome and what it said.

        A child was seen that never ended, in a sweep that passed whenever it was repeated. Why is not known; a lock
        that ThreadSanitizer's own thread held while the process forked would explain it. So a child that hung is
        started once more.
        """
        outcome, said = self.result()
        if outcome == "hung":
            print(f"again {self.name}, which hung after {said}", file=sys.stderr, flush=True)
            outcome, said = self.start(self.name, self.work).result()
        return self.name, outcome, said


def two_at_a_time(jobs: dict[str, Callable]) -> Iterator[tuple[str, str, list[str]]]:
    running: list[Child] = []
    for name, work in jobs.items():
        running.append(Child.start(name, work))
        if len(running) == 2:
            yield running.pop(0).outcome()
    yield from (child.outcome() for child in running)


def sites_met(emulator: ModuleType, case: str, say: Callable[[str], object]) -> None:
    run(case)
    for is_fence, sites in ((0, emulator.barriers()), (1, emulator.fences())):
        for file, line in sites:
            say(f"{is_fence} {line} {file}")


def without(emulator: ModuleType, site: Site, cases: list[str], say: Callable[[str], object]) -> None:
    is_fence, line, file = site.split(" ", 2)
    (emulator.skip_fence if int(is_fence) else emulator.skip_barrier)(file, int(line))
    for case in cases:
        say(case)
        run(case)


def digest() -> str:
    """SHA-256 of what outcomes depend on: kernels, emulator, and the cases above."""
    root = Path(__file__).parents[3]
    folders = [root / "csrc" / "cuda", root / "tests" / "emulator"]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".cu", ".cpp", ".h", ".py")]
    files += [*(root / "csrc").glob("*.h"), Path(__file__)]
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(f"{file.relative_to(root).as_posix()}\n{file.read_text()}".encode())
    return found.hexdigest()


def recorded() -> dict[str, str] | None:
    """Outcome by site as of the record, None where it is of other sources."""
    record = json.loads(RECORD.read_text())
    return record["outcomes"] if record["digest"] == digest() else None


def main(wanted: list[str]) -> None:
    record, outcomes, seen = wanted == ["--record"], {}, digest()
    wanted = [] if record else wanted
    torch.set_num_threads(1)
    BACKEND.emulate(ARCHS[0], pytest.MonkeyPatch())
    emulator = compiled(ARCHS[0]).emulator
    meets: dict[Site, list[str]] = {}
    untouched = {case: functools.partial(sites_met, emulator, case) for case in CASES}
    for case, outcome, said in two_at_a_time(untouched):
        print("nothing", outcome, case, *(said if outcome != "unnoticed" else ()), flush=True)
        for site in said if outcome == "unnoticed" else ():
            meets.setdefault(site, []).append(case)
    jobs = {name_of(site): functools.partial(without, emulator, site, meets[site]) for site in sorted(meets)}
    assert set(wanted) <= set(jobs), set(wanted) - set(jobs)
    for name, outcome, said in two_at_a_time({name: jobs[name] for name in wanted or jobs}):
        print(name, outcome, *said[-1 if outcome != "wrong" else -2 :][:1], flush=True)
        outcomes[name] = outcome
    if record:
        if seen != digest():
            raise SystemExit("the sources changed during the sweep: nothing is recorded")
        RECORD.write_text(json.dumps({"digest": seen, "outcomes": dict(sorted(outcomes.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
