"""Compile the CUDA kernels for every chip, with no GPU, and report what the compiler made of each.

``python -m benchmarks.compiled.ahead_cuda [--arch 70 75 80] [--ptx DIR [--wmma]]`` prints registers, spills, shared
memory, blocks that a multiprocessor holds, and instructions by kind. tests/backends/cuda/test_ahead.py asserts what
must hold.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from . import cubin, cuda_compilers

NEURONS = 10
PRODUCTS = ("conv", "data_gradient", "weight_gradient")
TILE = 128  # of products: sides of a tile
FILTER_TILES = 4  # of a block that lays filters out
CHANNELS, ROWS_BYTES = 1024, 16384  # of features; of whole rows that a block of a gather holds
BYTES = {"half": 2, "bfloat16": 2, "tf32": 4, "float": 4}
MOST_PROGRAMS = 1024


class Chip(NamedTuple):
    """What a multiprocessor holds, and how many the largest chip has."""

    processors: int
    shared_kib: int
    threads: int
    blocks: int


CHIPS = {
    70: Chip(80, 96, 2048, 32), 75: Chip(72, 64, 1024, 16), 80: Chip(108, 164, 2048, 32), 86: Chip(84, 100, 1536, 16),
    87: Chip(16, 164, 1536, 16), 88: Chip(16, 100, 1536, 16), 89: Chip(142, 100, 1536, 24),
    90: Chip(132, 228, 2048, 32), 100: Chip(148, 228, 2048, 32), 103: Chip(160, 228, 2048, 32),
    110: Chip(20, 228, 1536, 24), 120: Chip(188, 100, 1536, 24), 121: Chip(48, 100, 1536, 24),
}  # fmt: skip


def reserved(arch: int) -> int:
    """Shared bytes that the system takes of every block."""
    return 1024 if arch >= 80 else 0


class Resources(NamedTuple):
    """One kernel for one target."""

    source: str
    arch: int
    name: cubin.Name
    threads: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    dynamic_shared: int
    resident: int
    counts: Counter[str]

    @property
    def element(self) -> str:
        return str(self.name.arguments[0]) if self.name.arguments else ""

    @property
    def tensor(self) -> int:
        """Instructions of tensor cores."""
        return self.counts["HMMA"] + self.counts["HMMA.884"]

    @property
    def supported(self) -> bool:
        """Whether it has a body: bfloat16 and TF32 products start with sm_80."""
        return self.name.base not in PRODUCTS or self.element in ("half", "float") or self.arch >= 80


def operand_bytes(element: str, by_k: bool, arch: int) -> int:
    """Of one step: ``SharedTile::kBytes`` of csrc/cuda/product.h, and ``SwizzledTile::kBytes`` of turing.h."""
    size = BYTES[element]
    depth, vector = 64 // size, 16 // size
    if element != "float" and arch >= 75:
        return TILE * (64 if arch >= 80 else 32)
    rows, columns = (TILE, depth) if by_k else (depth, TILE)
    return rows * (columns + (1 if by_k else 2) * vector) * size


def product_bytes(element: str, a_by_k: bool, b_by_k: bool, arch: int) -> int:
    """``product_bytes`` of csrc/cuda/product.h."""
    stages = 2 if arch < 80 else 3 if element == "float" else 4
    columns = TILE // 4 if 75 <= arch < 80 else TILE // 2  # that an epilogue takes at once
    chunk = TILE * (columns + 4) * 4 + TILE * 9 * 4
    return max(stages * (operand_bytes(element, a_by_k, arch) + operand_bytes(element, b_by_k, arch)), chunk)


# sizeof(ConvShared), sizeof(GradientShared): what tests/backends/cuda/test_ahead.py asks the C++ compiler.
CONV_SHARED, GRADIENT_SHARED = 192, 2176


def launched_programs(element: str, arch: int) -> int:
    """The most programs a convolution is launched with: as ``conv_grid`` has them."""
    chip = CHIPS[arch]
    block = 44 if arch < 75 else 32 if arch < 80 else 70  # KiB: block_kib of the launchers
    twice = element != "float" and chip.shared_kib >= 2 * block
    return min(chip.processors * (2 if twice else 1), MOST_PROGRAMS)


def dynamic_shared(name: cubin.Name, arch: int, threads: int, programs: int | None = None) -> int:
    """Bytes that the launchers in csrc/cuda ask for."""
    first = str(name.arguments[0]) if name.arguments else ""
    panel = 64 * (128 + 16)
    match name.base:
        case "conv":
            by_k = bool(name.arguments[1])
            programs = launched_programs(first, arch) if programs is None else programs
            return product_bytes(first, True, by_k, arch) + CONV_SHARED + 4 * (3 * programs + 1 + threads)
        case "data_gradient":
            return product_bytes(first, True, True, arch) + GRADIENT_SHARED
        case "weight_gradient":
            return product_bytes(first, False, False, arch)
        case "tap_sums":
            _, taps, vector, by_channel = name.arguments
            return 4 * threads * taps * (vector if by_channel else 1)
        case "group":
            return 4 * (3 * threads // 32 + NEURONS)
        case "list":
            return 4 * 3 * threads // 32
        case "pack":
            return panel
        case "route_and_gather":
            return panel + 4 * (256 + NEURONS)
        case "gather_rows" | "route_and_gather_rows":
            size = BYTES[first]
            block, rows = 128 // size, min(64, ROWS_BYTES // (CHANNELS * size))
            tile = rows * (CHANNELS * size + 16)
            if name.base == "gather_rows":
                return tile + 2 * CHANNELS * (2 + 4)
            return tile + (CHANNELS + block) * 2 + 4 * (256 + NEURONS)
        case "pack_filters" | "unpack_filters":
            return FILTER_TILES * 128 * (128 // BYTES[str(name.arguments[-1])])  # by channel; by output at most 16 KiB
        case "semhash_forward" | "semhash_backward":
            return 0
    raise KeyError(f"{name}: not known how much shared memory it is launched with")


def resident(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at the same time."""
    chip = CHIPS[arch]
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // of_warp // 4 * 4 // warps  # registers lie in four parts
    unit = 128 if arch >= 80 else 256
    by_shared = chip.shared_kib * 1024 // max(-(-(shared + reserved(arch)) // unit) * unit, unit)
    return min(by_registers, by_shared, chip.threads // (32 * warps), chip.blocks)


LOG = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)'.*?Function properties for (?P=symbol)\s+(?P<stack>\d+) bytes stack "
    r"frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)


def resources(built: cuda_compilers.Built) -> list[Resources]:
    """What was made of one source for one target."""
    said = {found["symbol"]: found for found in LOG.finditer(built.log.read_text())}
    rows = []
    for kernel in cubin.kernels(built.cubin, built.arch):
        found, name = said[kernel.symbol], cubin.readable(kernel.symbol)
        static = re.search(r"(\d+) bytes smem", found["rest"])
        static_shared = int(static[1]) if static else 0
        dynamic, registers = dynamic_shared(name, built.arch, kernel.threads), int(found["registers"])
        rows.append(
            Resources(
                built.source, built.arch, name, kernel.threads, registers, int(found["stack"]), int(found["stores"]),
                int(found["loads"]), static_shared, dynamic,
                resident(built.arch, kernel.threads, registers, static_shared + dynamic), kernel.counts,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda one: str(one.name))


def compile_all(archs: list[int], processes: int = 2) -> list[Resources]:
    """Every kernel for every target."""
    found = [one for built in cuda_compilers.compile_all(archs, processes) for one in resources(built)]
    return sorted(found, key=lambda one: (one.arch, one.source))


COLUMNS = ("LDGSTS", "LDSM", "LDS", "STS", "LDG", "STG", "LD", "ST", "LDL", "STL", "BAR", "ATOMG", "RED")


def markdown(found: list[Resources]) -> str:
    lines = [
        "| kernel | chip | threads | registers | spilled, stores/loads | stack | shared | blocks an SM | HMMA | "
        + " | ".join(COLUMNS)
        + " |",
        "| --- | --- |" + " ---: |" * (7 + len(COLUMNS)),
    ]
    for one in found:
        if one.supported:
            counts = " | ".join(str(one.counts[kind] or "") for kind in COLUMNS)
            lines.append(
                f"| {one.name} | sm_{one.arch} | {one.threads} | {one.registers} | {one.spill_stores}/{one.spill_loads}"
                f" | {one.stack} | {one.static_shared}+{one.dynamic_shared} | {one.resident} | {one.tensor or ''}"
                f" | {counts} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled.ahead_cuda", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=list(CHIPS), help="default: sm_70 and all of nvcc's")
    parser.add_argument("--ptx", type=Path, help="only write PTX, for sm_70 or the first --arch, to this folder")
    parser.add_argument("--wmma", action="store_true", help="of sm_70 for simulators, which know no mma.sync")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        if options.ptx:
            defines = [cuda_compilers.WMMA] if options.wmma else []
            for path in cuda_compilers.write_ptx(options.ptx, (options.arch or [70])[0], *defines):
                print(path)
            return
        archs = options.arch or [70, *(arch for arch in cuda_compilers.nvcc_targets() if arch > 70)]
        reasons = {arch: cuda_compilers.missing(arch) for arch in archs}
        if options.arch is None and reasons[70]:
            print(reasons[70], flush=True)
            archs.remove(70)
        start = time.perf_counter()
        found = compile_all(archs, options.processes)
        print(markdown(found))
        print(f"\n{len(found)} kernels in {time.perf_counter() - start:.0f} s")
    except cuda_compilers.Missing as missing:
        raise SystemExit(str(missing)) from None


if __name__ == "__main__":
    main()
