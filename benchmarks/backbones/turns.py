"""Steps that take turns: what one costs over another, without the machine's drift.

In a round every step runs once, in an order that turns round from round to round. The overhead of a step is the median
over rounds of its time over the base's time in the same round, with an interval that holds it 95 times in 100. Where
steps are of several kinds, of as many rounds as there are kinds together.

A CPU's time is that of the clock. Where others use the machine it may be the processor's time of this process instead,
on one thread: waiting for others does not count then, and waiting for a second thread there is none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.op import interval
from benchmarks.report.machine import synchronise

__all__ = ["CLOCKS", "Overhead", "Turns"]

LEAST_ROUNDS, MOST_ROUNDS = 3, 20
ROUND_SECONDS, MOST_CALLS = 0.1, 100  # of a step on a GPU, whose single steps are short
GPU_WARM_UP = 3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Overhead:
    """Of one step over another, as shares of that: the median, and what the median lies between."""

    median: float
    low: float
    high: float


class Turns:
    """Steps by name, and the seconds of each in every round.

    Args:
        steps: what is timed, by name.
        before: runs ahead of every step and is not timed: gradients dropped, say.
        device: a GPU is timed by its own events, a CPU by the clock.
        kinds: of steps that come one after the other, as with draws that alternate; a time is of as many of each.
        clock: of :data:`CLOCKS`, for a CPU.
    """

    def __init__(
        self,
        steps: dict[str, Callable[[], object]],
        before: Callable[[], object],
        device: torch.device,
        kinds: int = 1,
        clock: str = "wall",
    ) -> None:
        self.steps, self.before, self.device, self.kinds = steps, before, device, kinds
        self.clock = CLOCKS[clock]
        self.wall = self.processor = 0.0  # seconds of all timed steps on a CPU, by both clocks
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}
        self.gflop: dict[str, float] = {}
        self.once: dict[str, float] = {}
        self.calls = 1

    def warm_up(self, name: str) -> object:
        """One step for the first time, its operations counted; what it returned. Every step needs it once."""
        step = self.steps[name]
        self.before()
        with FlopCounterMode(display=False) as counter:
            start = self.clock()
            result = step()
            synchronise(self.device)
            once = self.clock() - start
        self.gflop[name] = counter.get_total_flops() / 1e9
        if self.device.type == "cuda":  # a library may have searched for algorithms
            once = min(self.timed(step, 1) for _ in range(GPU_WARM_UP))
            self.calls = max(self.calls, min(MOST_CALLS, int(ROUND_SECONDS / once)))
        self.before()
        self.once[name] = once
        return result

    def rounds_in(self, seconds: float) -> int:
        """Rounds that fit, within bounds, as many of each kind; by the time that each step took to warm up."""
        once = self.calls * sum(self.once.values())
        return self.whole(max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / once))))

    def whole(self, rounds: int) -> int:
        """No fewer rounds, with as many of each kind."""
        return -(-rounds // self.kinds) * self.kinds

    def timed(self, step: Callable[[], object], calls: int) -> float:
        """Seconds of a call, over several."""
        if self.device.type == "cuda":
            return self.timed_by_events(step, calls)
        spent = 0.0
        for _ in range(calls):
            self.before()
            wall, processor, start = time.perf_counter(), time.process_time(), self.clock()
            step()
            spent += self.clock() - start
            self.wall += time.perf_counter() - wall
            self.processor += time.process_time() - processor
        return spent / calls

    def timed_by_events(self, step: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self.before()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def round(self) -> None:
        """Every step in turn."""
        names = list(self.steps)
        if len(self.seconds[names[0]]) % 2:
            names.reverse()
        for name in names:
            self.seconds[name].append(self.timed(self.steps[name], self.calls))
        self.before()

    @property
    def share(self) -> float | None:
        """How much of its threads' time this process was given while steps were timed; ``None`` for a GPU's."""
        return self.processor / self.wall / torch.get_num_threads() if self.wall else None

    def means(self, name: str) -> list[float]:
        """Seconds of a step, over as many rounds as there are kinds."""
        seconds = self.seconds[name]
        starts = range(0, len(seconds) - self.kinds + 1, self.kinds)
        return [statistics.fmean(seconds[start : start + self.kinds]) for start in starts]

    def overhead(self, name: str, base: str) -> Overhead:
        """Of a step over another."""
        pairs = zip(self.means(name), self.means(base), strict=True)
        ratios = [one / other - 1 for one, other in pairs]
        return Overhead(statistics.median(ratios), *interval(ratios))
