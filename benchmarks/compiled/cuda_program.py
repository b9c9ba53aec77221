"""Reads a step of a compiled main loop as a program of the cycle model, dsts_kernels/roofline/multiprocessor.py.

An instruction in a cubin has 16 bytes; bits 105 to 125 say how the compiler scheduled it: stall count, yield,
scoreboards. Which unit takes it is its code. What an access to shared memory costs depends on the lanes' addresses,
which are not in the code: they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from dsts_kernels.roofline import multiprocessor as model
from dsts_kernels.roofline.multiprocessor import Instruction

from . import cubin

T = TypeVar("T")
Words = tuple[int, int]  # the lower and upper eight bytes of an instruction
Passes = Mapping[int, tuple[float, float]]  # by bytes a lane loads: passes for the left operand, for the right one

# Units by the low nine bits of codes. CONTROL takes an issue slot only: BSYNC, CALL, BSSY, BRA, WARPSYNC, BMOV, NOP.
CONTROL = frozenset((0x141, 0x144, 0x145, 0x147, 0x148, 0x155, 0x118))
SLOW = frozenset((0x119, 0x182, 0x1C2, 0x1C3, 0x189, 0x108, 0x106))  # S2R, LDC, R2UR, S2UR, SHFL, MUFU, VOTE
FMA = range(0x23, 0x28)  # FFMA, IMAD and its wide and high forms
FFMA, COMMIT, AWAIT = 0x023, 0x1AF, 0x11A  # ..., LDGDEPBAR, DEPBAR
UNIFORM = range(0x80, 0x100)  # has a unit of its own, which does not bind here
UNITS = {
    **dict.fromkeys(("HMMA", "HMMA.884"), model.TENSOR),
    **dict.fromkeys(("LDS", "LDSM", "STS", "LDL", "STL", "LD", "ST"), model.SHARED),
    **dict.fromkeys(("LDG", "STG"), model.GLOBAL),
    "LDGSTS": model.COPY,
    "BAR": model.BARRIER,
}
NEVER, ZEROS = 0xF, 0xF  # the predicate !PT: of an instruction, and of a copy that writes zeros

# Multiply-adds a cycle of a scheduler's tensor core, kindly and not; TF32 has half. From Turing on they follow from the
# stall counts by which the compiler spaces a warp's products: 6 cycles for one of 16x8x16 on Hopper, unkindly 6.4 (63%
# of the peak, an estimate).
RATE = {70: (128.0, 128.0), 75: (128.0, 128.0), 80: (256.0, 256.0), 90: (2048 / 6.0, 2048 / 6.4)}
MIN_CYCLES = {90: 4.0}  # cycles of the shortest product: of 16x8x4 and of 16x8x8
FRESH = 3.0  # Volta, unkindly: of a product none of whose three register pairs was read by the one before
LANES = {70: 2.0, 90: 1.0}  # cycles of a float32 multiply-add; other arithmetic takes 2
# Passes of 16 bytes a lane from or to L2, at full width and at half of it. A copy that goes to shared memory at once
# may hold the pipe as long as L2 takes to deliver it: 512 bytes at a multiprocessor's share of 5120 a cycle.
LINES = (4.0, 8.0)
COPIES = {80: (4.0, 11.0), 90: (4.0, 13.0)}


def kind_of(low: int, arch: int) -> str:
    return "FFMA" if low & 0x1FF == FFMA else cubin.kind_of(low, arch) or "other"


def of_generation(table: Mapping[int, T], arch: int) -> T:
    """What is known of the last generation up to a chip's."""
    return table[max(known for known in table if known <= arch)]


def multiply_adds(kind: str, high: int) -> int:
    """Of a warp's instruction; its depth is in the upper half."""
    if kind == "HMMA":
        return 16 * 8 * (16 if high >> 11 & 1 else 4 if high >> 14 & 1 else 8)
    return {"HMMA.884": 8 * 8 * 4, "FFMA": 32}.get(kind, 0)  # a quarter of four products of 8x8x4


def product_cycles(kind: str, high: int, arch: int) -> tuple[float, float]:
    """Of a tensor core, kindly and not."""
    tf32 = kind == "HMMA" and high >> 19 & 1
    done = multiply_adds(kind, high) * (2 if tf32 else 1)
    least = of_generation({0: 1.0, **MIN_CYCLES}, arch)
    kindly, unkindly = (max(done / rate, least) for rate in of_generation(RATE, arch))
    return kindly, unkindly


def scheduled(words: Words) -> dict[str, object]:
    """What the compiler says of when an instruction may issue."""
    control = words[1] >> 41
    stall, yields, result, reads, waits = (
        control & 15, control >> 4 & 1, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    )  # fmt: skip
    return {
        "stall": stall,
        "stays": bool(yields),
        "result": None if result == 7 else result,
        "reads": None if reads == 7 else reads,
        "waits": tuple(number for number in range(model.SCOREBOARDS) if waits >> number & 1),
    }


def width_of(kind: str, high: int) -> int:
    """Bytes a lane."""
    if kind == "LDSM":
        return 4 << (high >> 8 & 3)  # one, two or four matrices
    return (1, 1, 2, 2, 4, 8, 16, 16)[high >> 9 & 7]


def side_of(at: int, turn: Sequence[Words], kinds: Sequence[str], width: int) -> int | None:
    """The operand of the next product that reads what was loaded: 0 left, 1 right, None if no product reads it so."""
    loaded = turn[at][0] >> 16 & 0xFF
    registers = range(loaded, loaded + max(width // 4, 1))
    for ahead in range(1, len(turn)):
        low = turn[(at + ahead) % len(turn)][0]
        if kinds[(at + ahead) % len(turn)] in ("HMMA", "HMMA.884", "FFMA"):
            for side in range(2):
                if low >> 24 + 8 * side & 0xFF in registers:
                    return side
    return None


def accesses(at: int, turn: Sequence[Words], kinds: Sequence[str], arch: int, passes: Passes) -> tuple[float, float]:
    """Passes through shared memory, kindly and not."""
    (low, high), kind = turn[at], kinds[at]
    if low >> 12 & 0xF == NEVER or (kind == "LDGSTS" and high >> 23 & 0xF == ZEROS):
        return 0.0, 0.0  # no lane takes part; rows and columns are taken to lie inside, as in the kernels' busy tiles
    if UNITS[kind] == model.GLOBAL:
        return LINES
    if UNITS[kind] == model.COPY:
        return of_generation(COPIES, arch)
    width = width_of(kind, high)
    found = max(width / model.WORD, 1.0)
    if kind == "LDS" and width in passes:
        side = side_of(at, turn, kinds, width)
        found = sum(passes[width]) / 2 if side is None else passes[width][side]
    return found, found


def fresh_pairs(at: int, turn: Sequence[Words], kinds: Sequence[str]) -> int:
    """Pairs of registers that a Volta product reads and the one just before did not keep; the sum is always read."""
    (low, _), (before, kept) = turn[at], turn[at - 1]
    keeps = kept >> 58 if at and kinds[at - 1] == "HMMA.884" else 0
    same = (low >> 24 + 8 * side & 0xFF == before >> 24 + 8 * side & 0xFF and keeps >> side & 1 for side in range(2))
    return 3 - sum(map(bool, same))


def costs(at: int, turn: Sequence[Words], kinds: Sequence[str], arch: int, passes: Passes) -> tuple[int, float, float]:
    """An instruction's unit, and what it takes of it, kindly and not."""
    low, kind = turn[at][0], kinds[at]
    code = low & 0x1FF
    if kind in UNITS:
        unit = UNITS[kind]
        if unit == model.TENSOR:
            kindly, unkindly = product_cycles(kind, turn[at][1], arch)
            return unit, kindly, FRESH if arch < 75 and fresh_pairs(at, turn, kinds) == 3 else unkindly
        return unit, *((0.0, 0.0) if unit == model.BARRIER else accesses(at, turn, kinds, arch, passes))
    for codes, unit in (((COMMIT,), model.COMMIT), ((AWAIT,), model.AWAIT), (SLOW, model.SLOW), (CONTROL, model.ISSUE)):
        if code in codes:
            return unit, 0.0, 0.0
    if code in UNIFORM:
        return model.ISSUE, 0.0, 0.0
    cycles = of_generation(LANES, arch) if code == FFMA else 2.0
    return model.FMA if code in FMA else model.ALU, cycles, cycles


def program(turn: Sequence[Words], ends: Sequence[bool], arch: int, passes: Passes) -> list[Instruction]:
    """Of the instructions of a step in the order in which a warp meets them; ``ends``: which of them jump back."""
    kinds = [kind_of(low, arch) for low, _ in turn]
    found = []
    for at, words in enumerate(turn):
        unit, kindly, unkindly = costs(at, turn, kinds, arch, passes)
        one = Instruction(unit, **scheduled(words), cost=kindly, worst=unkindly, jumps=ends[at])
        if unit == model.AWAIT:
            one = one._replace(result=words[0] >> 44 & 7, allowed=words[0] >> 38 & 63)
        found.append(one)
    return found
