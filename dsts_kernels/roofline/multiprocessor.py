"""A cycle model of one multiprocessor in a loop: who issues when, and who waits for what. Pure Python, no values.

A program is one turn of the loop, of one warp, as the compiler scheduled it: stall counts, scoreboards, the unit that
each instruction needs. Blocks of warps run it over and over on four schedulers, which share one pipe to shared memory
and L1. :func:`simulate` gives the cycles a turn, :func:`estimate` its mean over what the model does not know: how far
blocks are apart when they start, and whether a scheduler stays with a warp. benchmarks/compiled/cuda_program.py reads
programs from cubins; docs/log/cuda.md says what the model got right.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

SCHEDULERS, SCOREBOARDS, WORD = 4, 6, 4  # WORD: bytes a lane, of which one pass moves 32 without conflicts
# Units of a scheduler, each of which takes an instruction every `cost` cycles of it; MEMORY is one pipe for all four,
# which takes an instruction `cost` passes; SLOW is whatever answers by scoreboard but is none of these; ISSUE needs
# nothing but the slot.
TENSOR, ALU, FMA, SHARED, GLOBAL, COPY, COMMIT, AWAIT, BARRIER, SLOW, ISSUE = range(11)
MEMORY = SHARED, GLOBAL, COPY
OWN = TENSOR, ALU, FMA
NEXT, ISSUED = operator.attrgetter("next"), operator.attrgetter("issued")


class Instruction(NamedTuple):
    """One of a warp. ``cost``: cycles of its unit, or passes of the pipe to memory; ``worst``: the same, unkindly."""

    unit: int
    stall: int = 1  # cycles until the warp may issue again
    stays: bool = True  # the scheduler may stay with this warp
    result: int | None = None  # scoreboard that is released when the result is there
    reads: int | None = None  # ... when the operands were read
    waits: tuple[int, ...] = ()  # scoreboards that must be free before it issues
    cost: float = 0.0
    worst: float | None = None
    jumps: bool = False  # back to the start of a loop
    allowed: int = 0  # AWAIT: how many entries of scoreboard `result` may still be open

    def unkind(self) -> Instruction:
        return self if self.worst is None else self._replace(cost=self.worst)


class Machine(NamedTuple):
    """What a multiprocessor's parts take, in cycles. All of it is assumed: measured by others, or estimated."""

    products: float = 4.0  # from the issue of a product to its result, where a scoreboard waits for it
    operands: float = 8.0  # from issue until operands are read, by all that do not go to memory
    enter: float = 6.0  # from issue to the pipe to memory
    pass_: float = 1.0  # of that pipe, for 128 bytes without a conflict
    shared: float = 16.0  # from the last pass to the result
    trip: float = 300.0  # from entering the pipe to data from L2
    slow: float = 25.0  # special registers, constants by address
    barrier: float = 12.0  # from the last warp's arrival to the first issue behind it
    jump: float = 8.0  # of a branch that is taken
    queue: int | None = None  # accesses of a scheduler that may wait for the pipe


UNKIND = Machine(12.0, operands=12.0, pass_=1.1, shared=24.0, trip=450.0, barrier=24.0, jump=16.0, queue=8)
# By compute capability, kindly and with every assumption unfavourable. Estimates: Turing's products answer later than
# Volta's, whose scoreboard is released early, and its pipe to shared memory is half as wide.
MACHINES = {
    70: (Machine(), UNKIND),
    75: (Machine(products=18.0, pass_=2.0), UNKIND._replace(products=24.0, pass_=2.2, slow=35.0)),
    80: (Machine(products=33.0), UNKIND._replace(products=40.0, slow=35.0)),
    90: (Machine(products=33.0), UNKIND._replace(products=40.0, slow=50.0)),
}


class _Warp:
    """Where a warp is, and when it may go on."""

    __slots__ = ("able", "at", "block", "copied", "first", "held", "issued", "open", "ready", "turns", "until")

    def __init__(self, block: int, first: bool, ready: float) -> None:
        self.block, self.first, self.ready = block, first, ready  # `ready`: as far as the warp itself knows
        self.at = self.turns = 0
        self.able = self.held = 0.0  # `ready` and its unit free; `ready`, while it waits at a barrier
        self.issued = self.copied = 0.0  # its last instruction, and when all its copies so far will be there
        self.until = [0.0] * SCOREBOARDS  # when each scoreboard is free
        self.open: list[list[float]] = [[] for _ in range(SCOREBOARDS)]  # entries of those that AWAIT counts


class _Scheduler:
    """Its warps, when its units and its issue slot are free, and when it issues next."""

    __slots__ = ("free", "last", "next", "queued", "slot", "warps")

    def __init__(self, warps: list[_Warp]) -> None:
        self.warps = warps
        self.free = [0.0] * len(OWN)
        self.slot = self.next = 0.0
        self.last: _Warp | None = None
        self.queued: list[float] = []  # when its accesses leave the pipe to memory


class _Run:
    """One simulation: from issue to issue, in order of time."""

    def __init__(
        self, program: Sequence[Instruction], machine: Machine, blocks: int, warps: int, apart: float, stay: bool
    ) -> None:
        self.program, self.machine, self.warps, self.stay = program, machine, warps, stay
        counted = {one.result for one in program if one.unit == AWAIT}
        self.counted = [number in counted for number in range(SCOREBOARDS)]
        self.pipe = 0.0  # when it is free
        self.arrived: list[list[_Warp]] = [[] for _ in range(blocks)]
        self.turned: list[list[float]] = [[] for _ in range(blocks)]
        self.schedulers = [
            _Scheduler([_Warp(b, w == 0, b * apart + s) for b in range(blocks) for w in range(s, warps, SCHEDULERS)])
            for s in range(min(SCHEDULERS, warps))
        ]
        for scheduler in self.schedulers:
            self.plan(scheduler)

    def plan(self, scheduler: _Scheduler) -> None:
        """When each warp may issue, and so the scheduler: infinity where all wait at a barrier."""
        soonest, queue = math.inf, self.machine.queue
        for warp in scheduler.warps:
            able, unit = warp.ready, self.program[warp.at].unit
            if unit <= FMA:
                able = max(able, scheduler.free[unit])
            elif queue is not None and unit <= COPY and len(scheduler.queued) >= queue:
                able = max(able, scheduler.queued[-queue])
            warp.able = able
            soonest = min(soonest, able)
        soonest = max(soonest, scheduler.slot)
        scheduler.next = soonest if soonest == math.inf else math.ceil(soonest)

    def step(self) -> None:
        scheduler = min(self.schedulers, key=NEXT)
        now = scheduler.next
        if now == math.inf:
            raise ValueError("program: got one whose warps all wait at a barrier, wanted one that all reach alike")
        chosen = scheduler.last
        if not (self.stay and chosen and chosen.able <= now and self.near(chosen, scheduler)):
            chosen = min((warp for warp in scheduler.warps if warp.able <= now), key=ISSUED)
        one = self.program[chosen.at]
        done, read = self.occupy(scheduler, chosen, one, now)
        if one.result is not None and one.unit != AWAIT:
            chosen.until[one.result] = max(chosen.until[one.result], done)
            if self.counted[one.result]:
                chosen.open[one.result].append(done)
        if one.reads is not None:
            chosen.until[one.reads] = max(chosen.until[one.reads], read)
        chosen.issued, scheduler.last, scheduler.slot = now, chosen if one.stays else None, now + 1
        self.advance(chosen, one, now)
        if one.unit == BARRIER:
            self.arrive(chosen, now)
        self.plan(scheduler)

    def near(self, warp: _Warp, scheduler: _Scheduler) -> bool:
        """Whether it is at most a turn ahead of the others: else a loop without a barrier would starve them."""
        return all(warp.turns <= other.turns + 1 for other in scheduler.warps)

    def occupy(self, scheduler: _Scheduler, warp: _Warp, one: Instruction, now: float) -> tuple[float, float]:
        """The unit that takes an instruction; when its result is there, and when its operands were read."""
        machine, unit = self.machine, one.unit
        if unit <= FMA:
            scheduler.free[unit] = now + one.cost
            return now + (machine.products if unit == TENSOR else 0.0), now + machine.operands
        if unit <= COPY and one.cost:
            start = max(self.pipe, now + machine.enter)
            self.pipe = start + one.cost * machine.pass_
            scheduler.queued.append(self.pipe)
            if unit == SHARED:
                return self.pipe + machine.shared, self.pipe + 2
            if unit == COPY:
                warp.copied = max(warp.copied, start + machine.trip)
            return start + machine.trip, self.pipe + 2
        if unit == COMMIT:
            return max(now, warp.copied), now + machine.operands
        return now + (machine.slow if unit == SLOW else 0.0), now + machine.operands

    def advance(self, warp: _Warp, one: Instruction, now: float) -> None:
        """To the next instruction, and when that may issue as far as the warp itself knows."""
        ready = now + max(1, one.stall) + (self.machine.jump if one.jumps else 0.0)
        warp.at += 1
        if warp.at == len(self.program):
            warp.at = 0
            warp.turns += 1
            if warp.first:
                self.turned[warp.block].append(now)
        follows = self.program[warp.at]
        for number in follows.waits:
            ready = max(ready, warp.until[number])
        if follows.unit == AWAIT:
            entries = sorted(warp.open[follows.result])
            if len(entries) > follows.allowed:
                ready = max(ready, entries[-follows.allowed - 1])
            warp.open[follows.result] = entries[len(entries) - follows.allowed :] if follows.allowed else []
        warp.ready = ready

    def arrive(self, warp: _Warp, now: float) -> None:
        """At the barrier, which opens for all when the last one comes."""
        here = self.arrived[warp.block]
        here.append(warp)
        warp.held, warp.ready = warp.ready, math.inf
        if len(here) == self.warps:
            for other in here:
                other.ready = max(other.held, now + self.machine.barrier)
            here.clear()
            for scheduler in self.schedulers:
                self.plan(scheduler)


def simulate(
    program: Sequence[Instruction],
    machine: Machine,
    *,
    blocks: int = 1,
    warps: int = 4,
    turns: int = 6,
    apart: float = 0.0,
    stay: bool = True,
) -> float:
    """Cycles a turn of the loop, in which each of ``blocks`` does one; the first third of ``turns`` is left out.

    ``apart``: cycles between the starts of blocks. ``stay``: a scheduler prefers the warp that issued last.
    """
    if not program or turns < 3:
        raise ValueError(f"program, turns: got {len(program)} instructions, {turns} turns; wanted at least 1 and 3")
    run = _Run(program, machine, blocks, warps, apart, stay)
    while min(map(len, run.turned)) < turns:
        run.step()
    skip = turns // 3
    rates = [(times[-1] - times[skip]) / (len(times) - 1 - skip) for times in run.turned]
    return sum(rates) / len(rates)


APART = (300.0, 1100.0)


def estimate(program: Sequence[Instruction], machine: Machine, *, blocks: int = 1, warps: int = 4) -> float:
    """Mean over starts and schedulers that the model does not know."""
    found = [
        simulate(program, machine, blocks=blocks, warps=warps, apart=apart, stay=stay)
        for apart, stay in itertools.product(APART if blocks > 1 else (0.0,), (True, False))
    ]
    return sum(found) / len(found)
