"""The cycle model of a multiprocessor on tiny programs whose cycles are worked out by hand."""

from __future__ import annotations

import pytest

from dsts_kernels.roofline import multiprocessor as model
from dsts_kernels.roofline.multiprocessor import MACHINES, Instruction, Machine, estimate, simulate

PLAIN = Machine()  # results of products after 4, operands 8, pipe 6, a pass 1, shared 16, L2 300, barrier 12, jump 8


def run(*program: Instruction, machine: Machine = PLAIN, **how: object) -> float:
    return simulate(program, machine, turns=60, **how)


def about(cycles: float) -> object:
    """Where the start still shows."""
    return pytest.approx(cycles, rel=0.02)


def plain(count: int, **fields: object) -> list[Instruction]:
    return [Instruction(model.ISSUE, **fields)] * count


@pytest.mark.parametrize("stay", [True, False])
@pytest.mark.parametrize(("blocks", "warps", "cycles"), [(1, 4, 10), (2, 4, 20), (1, 8, 20), (3, 4, 30), (1, 1, 10)])
def test_issue_bound(blocks, warps, cycles, stay):
    """A scheduler issues one instruction a cycle, of whichever warp; one that stays with a warp goes turn by turn."""
    found = run(*plain(10), blocks=blocks, warps=warps, stay=stay)
    assert found == about(cycles)
    assert stay or found == cycles


def test_stall_counts():
    """A lone warp waits them out; three warps of a scheduler share 5 cycles, six need 6."""
    program = plain(4, stall=5)
    assert [run(*program, blocks=blocks) for blocks in (1, 3, 5, 6)] == [20, 20, 20, 24]


@pytest.mark.parametrize(("unit", "other"), [(model.TENSOR, model.ALU), (model.ALU, model.FMA), (model.FMA, model.ALU)])
def test_unit_bound(unit, other):
    """A unit takes an instruction every `cost` cycles; another unit works beside it."""
    program = [Instruction(unit, cost=4.0)] * 16
    assert run(*program) == 64 and run(*program, blocks=2, stay=False) == 128
    beside = [one for pair in zip(program, [Instruction(other, cost=3.0)] * 16, strict=True) for one in pair]
    assert run(*beside) == 64
    assert run(*[one._replace(unit=unit) for one in beside]) == 16 * 7


def test_shared_memory_bound():
    """One pipe for all schedulers: 4 warps' 3 accesses of 4 passes; twice as long where a pass takes 2 cycles."""
    program, machine = [Instruction(model.SHARED, cost=4.0)] * 3, PLAIN._replace(queue=6)
    assert run(*program, machine=machine) == about(48)
    assert run(*program, machine=machine, blocks=2, stay=False) == about(96)
    assert run(*program, machine=machine._replace(pass_=2.0)) == about(96)
    assert run(*program, machine=machine, warps=1) == about(12)
    assert run(*[one._replace(unit=model.GLOBAL) for one in program], machine=machine) == about(48)


@pytest.mark.parametrize(
    ("first", "waits", "cycles"),
    [
        (Instruction(model.SHARED, cost=2.0, result=3), (3,), 6 + 2 + 16 + 1),
        (Instruction(model.GLOBAL, cost=2.0, result=3), (3,), 6 + 300 + 1),
        (Instruction(model.SHARED, cost=2.0, reads=3), (3,), 6 + 2 + 2 + 1),
        (Instruction(model.ALU, cost=2.0, reads=0), (0,), 8 + 1),
        (Instruction(model.TENSOR, cost=2.0, result=5), (5,), 4 + 1),
        (Instruction(model.SLOW, result=1), (1,), 25 + 1),
        (Instruction(model.SHARED, cost=0.0, result=3), (3,), 1 + 1),  # no lane takes part
        (Instruction(model.GLOBAL, cost=2.0, result=3), (2,), 1 + 1),  # another scoreboard
    ],
    ids=str,
)
def test_latency_bound(first, waits, cycles):
    """A warp that waits for one scoreboard a turn: others fill the time, so that two blocks take no longer."""
    program = first, Instruction(model.ISSUE, waits=waits)
    assert run(*program, warps=1) == cycles
    beside = run(*program, warps=1, blocks=2, apart=1.0, stay=False)
    assert beside == pytest.approx(max(cycles, 4), abs=1)  # four slots; they may meet in one


def test_jumps():
    """Back to the start costs a lone warp 8 cycles, which another one's instructions fill."""
    program = [*plain(9), *plain(1, jumps=True)]
    assert [run(*program, blocks=blocks) for blocks in (1, 2)] == [18, 20]


def test_barrier():
    """The last warp opens it, and all go on 12 cycles later; with two warps a scheduler the last comes later."""
    program = [*plain(9), Instruction(model.BARRIER)]
    assert run(*program) == 9 + 12
    assert run(*program, warps=8, stay=False) == 12 + 19  # 18 instructions, then both arrive
    slow = [Instruction(model.SHARED, cost=4.0, result=0), Instruction(model.BARRIER, waits=(0,))]
    assert run(*slow) == 6 + 4 * 4 + 16 + 12  # the last of four accesses


def test_blocks_fill_each_others_barriers():
    """Two blocks share 10 slots each of a scheduler; 21 cycles of one hide the other, where they do not meet."""
    program = [*plain(9), Instruction(model.BARRIER)]
    assert run(*program, blocks=2, apart=10.0) == 21
    assert run(*[*plain(29), Instruction(model.BARRIER)], blocks=2) == pytest.approx(2 * 30, abs=1)


@pytest.mark.parametrize(("allowed", "cycles"), [(0, 307), (1, 307 / 2), (2, 307 / 3)])
def test_copies(allowed, cycles):
    """Copies are waited for in the order of their commits: those `allowed` to be open spread a trip over more turns."""
    program = (
        Instruction(model.COPY, cost=1.0),
        Instruction(model.COMMIT, result=0),
        Instruction(model.AWAIT, result=0, allowed=allowed),
    )
    assert simulate(program, PLAIN, warps=1, turns=300) == pytest.approx(cycles, rel=0.01)


@pytest.mark.parametrize(("queue", "cycles"), [(1, 6 + 10), (2, 10), (8, 10)])
def test_queue(queue, cycles):
    """Where one access may wait, the next issues when it has left the pipe, which stands empty until then."""
    program = [Instruction(model.SHARED, cost=10.0)]
    assert simulate(program, PLAIN._replace(queue=queue), warps=1, turns=30) == cycles


def test_staying_with_a_warp():
    """Five warps of a block, two of them on one scheduler: who stays with the first asks for the second's load late."""
    program = [Instruction(model.SHARED, cost=1.0, result=0), *plain(10), Instruction(model.BARRIER, waits=(0,))]
    apart = [one._replace(stays=False) for one in program]
    # The barrier opens at 0. Loads at 12 on all schedulers, then one at 13: the fifth pass ends at 23, its data come at
    # 39. Or the fifth load at 23, behind eleven instructions: it enters at 29, its data come at 46.
    assert run(*program, warps=5, stay=False) == run(*apart, warps=5) == 39
    assert run(*program, warps=5) == about(46)  # the warps take turns to be first


def test_unkind():
    one = Instruction(model.TENSOR, cost=2.0, worst=3.0)
    assert one.unkind().cost == 3 and Instruction(model.ALU, cost=2.0).unkind().cost == 2
    for kind, unkind in MACHINES.values():
        assert all(b >= a for a, b in zip(kind[:-1], unkind[:-1], strict=True)) and kind.queue is None


def test_estimate_is_a_mean():
    """Over starts of the second block and both ways to schedule."""
    program = [Instruction(model.SHARED, cost=4.0, result=0), *plain(30), Instruction(model.BARRIER, waits=(0,))]
    each = [
        simulate(program, PLAIN, blocks=2, apart=apart, stay=stay) for apart in model.APART for stay in (True, False)
    ]
    assert estimate(program, PLAIN, blocks=2) == pytest.approx(sum(each) / 4)
    assert estimate(program, PLAIN) == simulate(program, PLAIN)


def test_bad_programs():
    with pytest.raises(ValueError, match="got 0 instructions, 6 turns; wanted at least 1 and 3"):
        simulate([], PLAIN)
    with pytest.raises(ValueError, match="got 1 instructions, 2 turns"):
        simulate(plain(1), PLAIN, turns=2)
