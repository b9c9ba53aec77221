"""How cuda_program.py and cuda_loops.py of benchmarks/compiled read code: instructions as nvdisasm prints them."""

from __future__ import annotations

import datetime
import struct

import pytest

from benchmarks.compiled import cuda_compilers, cuda_loops, cuda_program
from benchmarks.compiled.cuda_loops import Loop, text_of, turn_of, unrolled
from dsts_kernels.roofline import multiprocessor as model
from dsts_kernels.roofline.counted import COUNTED

# sm_80, from the packed convolution
COMMIT = 0x00000000000079AF, 0x000E220000000000  # LDGDEPBAR
AWAIT = 0x000080400000791A, 0x000FC80000000000  # DEPBAR.LE SB0, 0x1
MATRICES = 0x000000008484783B, 0x000FE20000004200  # LDSM.16.MT88.4 R132, [R132]
COPY = 0x000000000811AFAE, 0x0003E8000B901C4C  # @!P2 LDGSTS.E.BYPASS.128 [R17], [R8.64]
ZEROS = 0x0000000008112FAE, 0x0003E2000F901C4C  # @P2 LDGSTS.E.BYPASS.128 [R17], [R8.64], !PT
TWO_MATRICES = 0x00000000BAB8783B, 0x000FE20000000100  # sm_75: LDSM.16.M88.2 R184, [R186]


def read(*words, arch: int = 80, passes=None) -> list[model.Instruction]:
    return cuda_program.program(words, [False] * len(words), arch, passes or {})


def made(code: int, *, a: int = 0, b: int = 0, to: int = 0, high: int = 0, kept: int = 0) -> tuple[int, int]:
    """An instruction that issues at once, by its twelve bits and registers."""
    control = 1 | 7 << 5 | 7 << 8
    return code | 7 << 12 | to << 16 | a << 24 | b << 32, high | control << 41 | kept << 58


def product(a: int, b: int, kept: int = 0) -> tuple[int, int]:
    return made(0x236, a=a, b=b, kept=kept)  # HMMA.884


def load(to: int, size: int) -> tuple[int, int]:
    return made(0x984, to=to, high={4: 4, 8: 5, 16: 6}[size] << 9)  # LDS


def test_schedule_is_read():
    """Stall counts, yields and scoreboards as nvdisasm's tools print them; no scoreboard is 7."""
    commit, wait, matrices = read(COMMIT, AWAIT, MATRICES)
    assert (commit.unit, commit.stall, commit.result, commit.waits) == (model.COMMIT, 1, 0, ())
    assert (wait.unit, wait.result, wait.allowed, wait.stays) == (model.AWAIT, 0, 1, False)
    assert (matrices.unit, matrices.cost, matrices.result, matrices.reads) == (model.SHARED, 4, None, None)
    (masked,) = read((COMMIT[0], COMMIT[1] | 0b100010 << 52))
    assert masked.waits == (1, 5)


def test_accesses():
    """A pass a word and lane, but for copies of zeros, which no lane of a full tile takes part in, and for !PT."""
    assert read(TWO_MATRICES, arch=75)[0].cost == 2
    copy, zeros = read(COPY, ZEROS)
    assert (copy.unit, copy.cost, copy.worst) == (model.COPY, 4, 11) and (zeros.cost, zeros.worst) == (0, 0)
    assert copy.reads == 1 and read(COPY, arch=90)[0].worst == 13
    never = load(0, 16)[0] | 0xF << 12, load(0, 16)[1]
    assert [one.cost for one in read(load(0, 4), load(0, 8), load(0, 16), never)] == [1, 2, 4, 0]
    assert [one.cost for one in read(made(0x388, high=6 << 9), made(0x381, high=6 << 9))] == [4, 4]  # STS, LDG


def test_loads_are_of_the_operand_that_reads_them():
    """Around the loop: the left operand's load is read in the turn that follows."""
    turn = load(20, 16), product(10, 22), load(10, 16), load(40, 16)
    passes = {16: (8.0, 4.0)}
    found = read(*turn, arch=70, passes=passes)
    assert [one.cost for one in found if one.unit == model.SHARED] == [4, 8, 6]  # no product reads the last: the mean
    assert read(load(20, 8), product(10, 20), arch=70, passes=passes)[0].cost == 2  # another width


def test_register_pairs_of_volta():
    """Unkindly a product takes 3 cycles where it keeps neither operand of the one just before."""
    turn = product(1, 2, kept=1), product(1, 4, kept=3), product(1, 4), product(1, 4), made(0x210), product(1, 4)
    worst = [one.worst for one in read(*turn, arch=70) if one.unit == model.TENSOR]
    assert worst == [3, 2, 2, 3, 3]
    assert {one.cost for one in read(*turn, arch=70) if one.unit == model.TENSOR} == {2}


@pytest.mark.parametrize(
    ("code", "arch", "unit", "cost"),
    [
        (0x236, 70, model.TENSOR, 2), (0x223, 70, model.FMA, 2), (0x223, 90, model.FMA, 1), (0x224, 90, model.FMA, 2),
        (0x825, 70, model.FMA, 2), (0x210, 70, model.ALU, 2), (0x919, 70, model.SLOW, 0), (0xB82, 90, model.SLOW, 0),
        (0x947, 70, model.ISSUE, 0), (0x918, 90, model.ISSUE, 0), (0x890, 80, model.ISSUE, 0),
        (0xB1D, 70, model.BARRIER, 0),
    ],
)  # fmt: skip
def test_units(code, arch, unit, cost):
    (one,) = read(made(code), arch=arch)
    assert (one.unit, one.cost) == (unit, cost)


# The upper half's low bits: 16x8x8, 16x8x16, and TF32 of 16x8x8 and 16x8x4.
@pytest.mark.parametrize(
    ("shape", "multiply_adds", "cycles"),
    [
        (0x1000, 1024, {75: (8, 8), 80: (4, 4), 90: (4, 4)}),
        (0x1800, 2048, {80: (8, 8), 89: (8, 8), 90: (6, 6.4)}),
        (0x41800, 2048, {80: (8, 8)}),  # bfloat16
        (0x81000, 1024, {80: (8, 8), 90: (6, 6.4)}),
        (0x85000, 512, {80: (4, 4), 90: (4, 4)}),
    ],
    ids=str,
)
def test_products(shape, multiply_adds, cycles):
    """Their multiply-adds, and how long a tensor core takes for them."""
    assert cuda_program.multiply_adds("HMMA", shape) == multiply_adds
    for arch, (kindly, unkindly) in cycles.items():
        (one,) = read(made(0x23C, high=shape), arch=arch)
        assert (one.unit, one.cost, one.worst) == (model.TENSOR, kindly, pytest.approx(unkindly)), arch


def test_unrolled():
    """A loop in a loop in a step: what stands there comes as often as it runs, and jumps back each time."""
    found = unrolled(Loop(0, 6), [Loop(1, 4), Loop(2, 3)], 2)
    inner = [(2, False), (3, True)] * 2
    trip = [(1, False), *inner, (4, True)]
    assert found == [(0, False), *trip, *trip, (5, False), (6, True)]


def branch(by: int) -> tuple[int, int]:
    """To the instruction ``by`` from the one behind it; sm_70 to sm_89 count in quarters of one."""
    low, high = made(0x947)
    field = by * 4 & (1 << 48) - 1
    return low | (field & (1 << 30) - 1) << 34, high | field >> 30


def code_of(*words: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *(word & (1 << 64) - 1 for word in pair)) for pair in words)


@pytest.mark.parametrize(("times", "steps"), [(512, 1), (1024, 2), (256, 1), (128, 1)])
def test_main_loop(times, steps):
    """The innermost one with products and a barrier, whole, unrolled over two steps or with an inner loop."""
    inner = [product(1, 2)] * times
    if times < 512:
        inner.append(branch(-times - 1))
    turn = [made(0x210), *inner, made(0xB1D)]
    turn.append(branch(-len(turn) - 1))
    outer = [made(0x919), *turn]
    found = turn_of(code_of(*outer, branch(-len(outer) - 1)), 70, "float16", 4)
    assert found.steps == steps and found.kinds["HMMA.884"] == 512 * steps and found.kinds["BAR"] == 1
    assert "S2R" not in found.kinds and found.ends[-1] and sum(found.ends) == 1 + (512 // times if times < 512 else 0)


def test_counted_is_of_one_step():
    """A turn of two steps counts half of what it takes; passes are those of all warps of a block."""
    step = [load(1, 16), *[product(1, 2)] * 512, made(0xB1D)]
    one, two = (
        turn_of(code_of(*step * steps, branch(-len(step) * steps - 1)), 70, "float32", 4)._replace(steps=steps)
        for steps in (1, 2)
    )
    found = [cuda_loops.counted(turn, 70, "float32", "by_k") for turn in (one, two)]
    assert [each.passes for each in found] == [4 * 4, 4 * 4]
    assert [each.instructions for each in found] == [515, 514]
    assert found[1].cycles[1] == pytest.approx(found[0].cycles[1], rel=0.02) and found[0].cycles[1][0] > 1024


def test_a_loop_of_no_whole_step():
    turn = [*[product(1, 2)] * 100, made(0xB1D)]
    with pytest.raises(ValueError, match="got 25600 multiply-adds a warp, wanted whole steps of 131072"):
        turn_of(code_of(*turn, branch(-len(turn) - 1)), 70, "float16", 4)


def test_table_is_what_the_command_writes(monkeypatch):
    """The file reads back as it was written, and says when and by which compilers."""
    monkeypatch.setattr(cuda_loops, "compilers", lambda archs: "ptxas 1.2 (sm_70)")
    text = text_of(COUNTED, datetime.date(2026, 1, 2))
    found: dict[str, object] = {}
    exec(compile(text, "counted.py", "exec"), found)
    assert found["COUNTED"] == COUNTED and "2026-01-02" in text and "ptxas 1.2 (sm_70)" in text
    shipped = cuda_loops.TABLE.read_text()
    assert text[text.index("from __future__") :] == shipped[shipped.index("from __future__") :]


def test_write_wants_all_chips(capsys):
    with pytest.raises(SystemExit) as stop:
        cuda_loops.main(["--write", "--arch", "70"])
    assert stop.value.code == 2 and "--write: got --arch [70], wanted all of" in capsys.readouterr().err


def test_compilers_are_named(monkeypatch):
    monkeypatch.setattr(
        cuda_compilers, "compiler", lambda arch: cuda_loops.TABLE.with_name("nvcc" if arch > 70 else "ptxas")
    )
    monkeypatch.setattr(cuda_compilers, "version", lambda path: f"built V12.9.86 {path.name}")
    assert cuda_loops.compilers([70, 75, 80]) == "ptxas 12.9.86 (sm_70); nvcc 12.9.86 (sm_75, sm_80)"
