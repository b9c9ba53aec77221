"""A cycle model of one multiprocessor that runs a loop: who issues when, and who waits for what. Pure Python, no values.

A program is one turn of the loop, of one warp, as the compiler scheduled it: stall counts, scoreboards, the unit that
each instruction needs. Blocks of warps run it over and over on four schedulers, which share one pipe to shared memory
and L1. :func:`simulate` gives the cycles a turn, :func:`estimate` its mean over what the model does not know: how far
blocks are apart when they start, and whether a scheduler stays with a warp. benchmarks/cuda_program.py reads programs
from cubins; docs/performance.md says what the model got right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

SCHEDULERS, SCOREBOARDS, WORD = 4, 6, 4  # WORD: bytes a lane, of which one pass moves 32 without conflicts
# Units of a scheduler, each of which takes an instruction every `cost` cycles of it; MEMORY is one pipe for all four,
# which takes an instruction `cost` passes; SLOW is whatever answers by scoreboard but is none of these; ISSUE needs
# nothing but the slot.
TENSOR, ALU, FMA, SHARED, GLOBAL, COPY, COMMIT, AWAIT, BARRIER, SLOW, ISSUE = range(11)
MEMORY = frozenset((SHARED, GLOBAL, COPY))
OWN = (TENSOR, ALU, FMA)


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


# By compute capability, kindly and with every assumption unfavourable. Estimates: Turing's products answer later than
# Volta's, whose scoreboard is released early, and its pipe to shared memory is half as wide.
MACHINES = {
    70: (Machine(), Machine(12.0, 12.0, 6.0, 1.1, 24.0, 450.0, 25.0, 24.0, 16.0, 8)),
    75: (Machine(18.0, pass_=2.0), Machine(24.0, 12.0, 6.0, 2.2, 24.0, 450.0, 35.0, 24.0, 16.0, 8)),
    80: (Machine(33.0), Machine(40.0, 12.0, 6.0, 1.1, 24.0, 450.0, 35.0, 24.0, 16.0, 8)),
    90: (Machine(33.0), Machine(40.0, 12.0, 6.0, 1.1, 24.0, 450.0, 50.0, 24.0, 16.0, 8)),
}


class _Warp:
    """Where a warp is, and when it may go on."""

    __slots__ = ("at", "block", "copied", "first", "held", "issued", "open", "ready", "turns", "until")

    def __init__(self, block: int, first: bool, ready: float) -> None:
        self.block, self.first, self.ready = block, first, ready
        self.at = self.turns = 0
        self.held = 0.0  # `ready`, while it waits at a barrier
        self.issued = self.copied = 0.0  # its last instruction, and when all its copies so far will be there
        self.until = [0.0] * SCOREBOARDS  # when each scoreboard is free
        self.open: list[list[float]] = [[] for _ in range(SCOREBOARDS)]  # entries of those that AWAIT counts


class _Run:
    """One simulation: from issue to issue, in order of time."""

    def __init__(
        self, program: Sequence[Instruction], machine: Machine, blocks: int, warps: int, apart: float, stay: bool
    ) -> None:
        self.program, self.machine, self.warps, self.stay = program, machine, warps, stay
        counted = {one.result for one in program if one.unit == AWAIT}
        self.counted = [number in counted for number in range(SCOREBOARDS)]
        places = list(itertools.product(range(blocks), range(warps)))
        self.all = [_Warp(block, w == 0, block * apart + w % SCHEDULERS) for block, w in places]
        both = list(zip(self.all, places, strict=True))
        self.of = [[warp for warp, (_, w) in both if w % SCHEDULERS == s] for s in range(SCHEDULERS)]
        self.last: list[_Warp | None] = [None] * SCHEDULERS
        self.free = [[0.0] * len(OWN) for _ in range(SCHEDULERS)]  # of units
        self.slot = [0.0] * SCHEDULERS  # to issue in
        self.queued: list[list[float]] = [[] for _ in range(SCHEDULERS)]  # when accesses leave the pipe
        self.pipe = 0.0
        self.arrived: list[list[_Warp]] = [[] for _ in range(blocks)]
        self.turned: list[list[float]] = [[] for _ in range(blocks)]
        self.next = [self.soonest(s) for s in range(SCHEDULERS)]

    def when(self, s: int, warp: _Warp) -> float:
        """The first cycle at which ``warp`` may issue, infinity at a barrier."""
        unit, at = self.program[warp.at].unit, warp.ready
        if unit <= FMA:
            return max(at, self.free[s][unit])
        queue = self.machine.queue
        if queue is not None and unit in MEMORY and len(self.queued[s]) >= queue:
            return max(at, self.queued[s][-queue])
        return at

    def soonest(self, s: int) -> float:
        """The cycle at which scheduler ``s`` issues next."""
        found = min((self.when(s, warp) for warp in self.of[s]), default=math.inf)
        return max(self.slot[s], found if found == math.inf else math.ceil(found))

    def step(self) -> None:
        now = min(self.next)
        if now == math.inf:
            raise ValueError("program: all warps wait at a barrier, wanted one that every warp of a block reaches")
        s = self.next.index(now)
        able = [warp for warp in self.of[s] if self.when(s, warp) <= now]
        last = self.last[s]
        self.issue(s, last if self.stay and last in able else min(able, key=lambda warp: warp.issued), now)
        self.slot[s] = now + 1
        self.next[s] = self.soonest(s)

    def issue(self, s: int, warp: _Warp, now: float) -> None:
        one, machine, unit = self.program[warp.at], self.machine, self.program[warp.at].unit
        done, read = now, now + machine.operands
        if unit <= FMA:
            self.free[s][unit] = now + one.cost
            done += machine.products if unit == TENSOR else 0
        elif unit in MEMORY and one.cost:
            start = max(self.pipe, now + machine.enter)
            self.pipe = start + one.cost * machine.pass_
            read = self.pipe + 2
            done = self.pipe + machine.shared if unit == SHARED else start + machine.trip
            self.queued[s].append(self.pipe)
            if unit == COPY:
                warp.copied = max(warp.copied, done)
        elif unit == COMMIT:
            done = max(done, warp.copied)
        elif unit == SLOW:
            done += machine.slow
        if one.result is not None and unit != AWAIT:
            warp.until[one.result] = max(warp.until[one.result], done)
            if self.counted[one.result]:
                warp.open[one.result].append(done)
        if one.reads is not None:
            warp.until[one.reads] = max(warp.until[one.reads], read)
        warp.issued, self.last[s] = now, warp if one.stays else None
        self.advance(warp, one, now)
        if unit == BARRIER:
            self.arrive(warp, now)

    def advance(self, warp: _Warp, one: Instruction, now: float) -> None:
        """To the next instruction, and when that may issue as far as the warp itself knows."""
        ready = now + max(1, one.stall) + (self.machine.jump if one.jumps else 0)
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
            self.next = [self.soonest(s) for s in range(SCHEDULERS)]


def simulate(
    program: Sequence[Instruction],
    machine: Machine,
    *,
    blocks: int = 1,
    warps: int = 4,
    turns: int = 12,
    apart: float = 0.0,
    stay: bool = True,
) -> float:
    """Cycles a turn of the loop, in which each of ``blocks`` does one; the first third of ``turns`` is left out.

    ``apart``: cycles between the starts of blocks. ``stay``: a scheduler prefers the warp that issued last.
    """
    if not program or turns < 3:
        raise ValueError(f"program, turns: got {len(program)} instructions, {turns} turns; wanted at least 1 and 3")
    run = _Run(program, machine, blocks, warps, apart, stay)
    while min(warp.turns for warp in run.all if warp.first) < turns:
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
