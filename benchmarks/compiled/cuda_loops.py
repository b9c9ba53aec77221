"""Main loops of the compiled CUDA product kernels: instructions, passes through shared memory, cycles of a step.

``python -m benchmarks.compiled.cuda_loops [--arch 70 75 80 90]`` prints them; with ``--write`` it writes them to
dsts_kernels/roofline/counted.py, from which the roofline predicts. Works on cubins alone: where a branch goes is read
off its code (compared with nvdisasm's labels for these four targets); cycles are those of the model in
dsts_kernels/roofline/multiprocessor.py.
"""

from __future__ import annotations

import argparse
import datetime
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from dsts_kernels.backends.gpu.grids import TILE
from dsts_kernels.roofline.counted import Counted
from dsts_kernels.roofline.loops import KERNELS, load_passes
from dsts_kernels.roofline.multiprocessor import MACHINES, MEMORY, estimate

from . import cubin, cuda_compilers, cuda_program
from .ahead_cuda import PRODUCTS

ARCHS = (70, 75, 80, 90)
BRANCH = 0x147  # the low nine bits of its code
TRIPS = 1, 2, 4, 8, 16  # that loops inside a step may take; all of a step's take equally many
NAMES = ("conv<{}, by K>", "conv<{}, by output>", "data_gradient<{}>", "weight_gradient<{}>")  # of loops.KERNELS
DEPTH = {"float16": 32, "bfloat16": 32, "tf32": 16, "float32": 16}  # of a step: 64 bytes of K
TABLE = cuda_compilers.ROOT / "dsts_kernels" / "roofline" / "counted.py"
DTYPES = {"half": "float16", "bfloat16": "bfloat16", "tf32": "tf32", "float": "float32"}


class Loop(NamedTuple):
    """From an instruction's number to that of the branch back to it."""

    first: int
    last: int


class Turn(NamedTuple):
    """One turn of the main loop: instructions as a warp meets them, and which of them jump back."""

    words: list[cuda_program.Words]
    ends: list[bool]
    kinds: Counter[str]
    steps: Fraction  # that it does: whole ones, or half of one
    warps: int  # of a block


def distance(low: int, high: int, arch: int) -> int:
    """Of a branch, in instructions from the one behind it."""
    field = low >> 34 | (high & 0x3FFFF) << 30
    signed = field - (field >> 47 << 48)
    return (signed << 8 | low >> 16 & 0xFF) // 4 if arch >= 90 else signed // 4


def loops(code: list[tuple[int, int]], arch: int) -> list[Loop]:
    """Every place that is jumped back to, up to the last branch there."""
    last: dict[int, int] = {}
    for at, (low, high) in enumerate(code):
        to = at + 1 + distance(low, high, arch) if low & 0x1FF == BRANCH else at + 1
        if 0 <= to < at:  # a branch to itself fills the end of a kernel
            last[to] = at
    return [Loop(*pair) for pair in sorted(last.items())]


def unrolled(outer: Loop, inside: list[Loop], trips: int) -> list[tuple[int, bool]]:
    """Numbers of a turn's instructions as a warp meets them, and whether it jumps back behind them."""
    found, at = [], outer.first
    while at <= outer.last:
        inner = next((loop for loop in inside if loop.first == at), None)
        if inner is None:
            found.append((at, False))
            at += 1
            continue
        rest = [loop for loop in inside if loop.last <= inner.last and loop != inner]
        found += unrolled(inner, rest, trips) * trips
        at = inner.last + 1
    return [*found[:-1], (found[-1][0], True)]


def turn_of(code: bytes, arch: int, dtype: str, warps: int) -> Turn:
    """Of the innermost loop that has products and a barrier; loops in it that multiply run until a step is whole."""
    words = list(struct.iter_unpack("<QQ", code))
    kinds = [cuda_program.kind_of(low, arch) for low, _ in words]
    done = [cuda_program.multiply_adds(kind, high) for kind, (_, high) in zip(kinds, words, strict=True)]
    needed = TILE * TILE * DEPTH[dtype] // warps
    found = [loop for loop in loops(words, arch) if sum(done[loop.first : loop.last + 1]) * TRIPS[-1] >= needed]
    whole = [loop for loop in found if "BAR" in kinds[loop.first : loop.last + 1]]
    outer = min(whole, key=lambda loop: loop.last - loop.first, default=Loop(0, -1))
    inside = [loop for loop in found if outer.first <= loop.first and loop.last <= outer.last and loop != outer]
    for trips in TRIPS if inside else TRIPS[:1] if whole else ():
        turn = unrolled(outer, inside, trips)
        steps = Fraction(sum(done[at] for at, _ in turn), needed)
        if steps.denominator == 1 or (steps == Fraction(1, 2) and not inside):
            times = Counter(kinds[at] for at, _ in turn)
            return Turn([words[at] for at, _ in turn], [ends for _, ends in turn], times, steps, warps)
    raise ValueError(
        f"main loop for sm_{arch}, {dtype}: got {whole and sum(done[outer.first : outer.last + 1])} multiply-adds "
        f"a warp, wanted whole steps of {needed}, or half of one"
    )


def turns(arch: int) -> dict[str, dict[str, Turn]]:
    """By dtype and kernel, as ``loops.KERNELS`` has them."""
    wanted = {
        name.format(theirs): (ours, kernel)
        for theirs, ours in DTYPES.items()
        for kernel, name in zip(KERNELS, NAMES, strict=True)
    }
    found: dict[str, dict[str, Turn]] = {}
    for source in (source for source in cuda_compilers.SOURCES if source.stem in PRODUCTS):
        built = cuda_compilers.compile_source(source, arch)
        sections = {section.name: section.data for section in cubin.sections(built.cubin.read_bytes())}
        for kernel in cubin.kernels(built.cubin, arch):
            if kernel.counts["BAR"]:  # else it has no body on this chip
                dtype, name = wanted[str(cubin.readable(kernel.symbol))]
                found.setdefault(dtype, {})[name] = turn_of(
                    sections[f".text.{kernel.symbol}"], arch, dtype, kernel.threads // 32
                )
    return {dtype: {name: found[dtype][name] for name in KERNELS} for dtype in DTYPES.values() if dtype in found}


def counted(turn: Turn, arch: int, dtype: str, kernel: str) -> Counted:
    """One step in the cycle model, alone on a multiprocessor and, where two blocks fit, beside another."""
    program = cuda_program.program(turn.words, turn.ends, arch, load_passes(arch, dtype, kernel))
    unkind = [one.unkind() for one in program]
    cycles = {}
    for blocks in (1, 2) if dtype != "float32" else (1,):
        both = zip((program, unkind), MACHINES[arch], strict=True)
        cycles[blocks] = tuple(
            round(estimate(*one, blocks=blocks, warps=turn.warps) / float(turn.steps)) for one in both
        )
    moved = turn.warps * sum(one.cost for one in program if one.unit in MEMORY)
    return Counted(round(turn.kinds.total() / turn.steps), round(moved / float(turn.steps)), cycles)


def count(arch: int) -> dict[str, dict[str, Counted]]:
    return {
        dtype: {kernel: counted(turn, arch, dtype, kernel) for kernel, turn in row.items()}
        for dtype, row in turns(arch).items()
    }


HEAD = '''"""What `python -m benchmarks.compiled.cuda_loops --write` found in the kernels on {date}; not to be edited.

A step of each product kernel's main loop, by compute capability, dtype of products and kernel.
Compiled by {compilers}.
"""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """Of one step."""

    instructions: int  # of a warp: branches not taken included, inner loops times their trips
    passes: int  # of a block through shared memory and L1
    cycles: dict[int, tuple[int, int]]  # by blocks on a multiprocessor: as assumed, and with all unfavourable


COUNTED: dict[int, dict[str, dict[str, Counted]]] = {{
'''


def compilers(archs: Sequence[int]) -> str:
    """Which compiler made what."""
    told: dict[str, list[str]] = {}
    for arch in archs:
        by = cuda_compilers.compiler(arch)
        release = re.findall(r"V(\d[\d.]*)", cuda_compilers.version(by))[-1]
        told.setdefault(f"{by.name} {release}", []).append(f"sm_{arch}")
    return "; ".join(f"{by} ({', '.join(names)})" for by, names in told.items())


def text_of(found: Mapping[int, Mapping[str, Mapping[str, Counted]]], date: datetime.date) -> str:
    """The module that states what was found."""
    lines = []
    for arch, rows in found.items():
        lines.append(f"    {arch}: {{")
        for dtype, row in rows.items():
            lines += [f'        "{dtype}": {{', *(f'            "{name}": {one!r},' for name, one in row.items())]
            lines.append("        },")
        lines.append("    },")
    return HEAD.format(date=date, compilers=compilers(list(found))) + "\n".join([*lines, "}", ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled.cuda_loops", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--write", action="store_true", help="all of them, to the roofline's counted.py")
    options = parser.parse_args(arguments)
    if options.write and tuple(options.arch) != ARCHS:
        parser.error(f"--write: got --arch {options.arch}, wanted all of {ARCHS}")
    try:
        found = {arch: count(arch) for arch in options.arch}
    except cuda_compilers.Missing as missing:
        raise SystemExit(str(missing)) from None
    text = text_of(found, datetime.date.today())
    print(text[text.index("COUNTED") :])
    if options.write:
        cuda_compilers.write(TABLE, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
