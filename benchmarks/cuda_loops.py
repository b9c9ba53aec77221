"""Instructions of the main loops of the compiled CUDA product kernels, as dsts_kernels/roofline/loops.py states them.

``python -m benchmarks.cuda_loops [--arch 70 75 80 90]`` prints what stands there as COUNTED. Works on cubins alone:
where a branch goes is read off its code (compared with nvdisasm's labels for these four targets).
"""

from __future__ import annotations

import argparse
import struct
from collections import Counter
from typing import NamedTuple

from . import cubin, cuda_compilers
from .ahead_cuda import PRODUCTS

ARCHS = (70, 75, 80, 90)
BRANCH, FFMA = 0x147, 0x023  # the low nine bits of their codes
TRIPS = 2  # of every loop inside a step: two halves, and in float32 two times four k of each
KERNELS = ("conv<{}, by K>", "conv<{}, by output>", "data_gradient<{}>", "weight_gradient<{}>")
DTYPES = {"half": "float16", "bfloat16": "bfloat16", "tf32": "tf32", "float": "float32"}


class Loop(NamedTuple):
    """From an instruction's number to that of the branch back to it."""

    first: int
    last: int


class Counted(NamedTuple):
    """Warp instructions of one step, and of those, kinds that :mod:`.cubin` tells apart."""

    instructions: int
    kinds: Counter[str]


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


def kind_of(low: int, arch: int) -> str:
    return "FFMA" if low & 0x1FF == FFMA else cubin.kind_of(low, arch) or "other"


def step(code: bytes, arch: int) -> Counted:
    """The innermost loop that has products and a barrier; what stands in loops inside it counts as often as it runs."""
    words = list(struct.iter_unpack("<QQ", code))
    kinds = [kind_of(low, arch) for low, _ in words]

    def products(loop: Loop) -> int:
        found = Counter(kinds[loop.first : loop.last + 1])
        return found["HMMA"] + found["HMMA.884"] + found["FFMA"] // 8

    found = [loop for loop in loops(words, arch) if products(loop) >= 32]
    outer = min((loop for loop in found if "BAR" in kinds[loop.first : loop.last + 1]), key=lambda a: a.last - a.first)
    inside = [loop for loop in found if outer.first <= loop.first and loop.last <= outer.last and loop != outer]
    times: Counter[str] = Counter()
    for at in range(outer.first, outer.last + 1):
        times[kinds[at]] += TRIPS ** sum(loop.first <= at <= loop.last for loop in inside)
    if 75 <= arch < 80 and times["HMMA"]:  # brings 32 bytes of K
        times += times
    return Counted(times.total(), times)


def count(arch: int) -> dict[str, tuple[Counted, ...]]:
    """By dtype, in the order of ``loops.KERNELS``."""
    sources = [source for source in cuda_compilers.SOURCES if source.stem in PRODUCTS]
    found: dict[str, Counted] = {}
    for built in (cuda_compilers.compile_source(source, arch) for source in sources):
        sections = {section.name: section.data for section in cubin.sections(built.cubin.read_bytes())}
        for kernel in cubin.kernels(built.cubin, arch):
            if kernel.counts["BAR"]:  # else it has no body on this chip
                found[str(cubin.readable(kernel.symbol))] = step(sections[f".text.{kernel.symbol}"], arch)
    return {
        ours: tuple(found[name.format(theirs)] for name in KERNELS)
        for theirs, ours in DTYPES.items()
        if KERNELS[0].format(theirs) in found
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_loops", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    try:
        for arch in parser.parse_args(arguments).arch:
            print(arch, {dtype: tuple(one.instructions for one in row) for dtype, row in count(arch).items()})
    except cuda_compilers.Missing as missing:
        raise SystemExit(str(missing)) from None


if __name__ == "__main__":
    main()
