"""Compile the CUDA kernels for every chip, with no GPU, and report what the compiler made of each.

``python -m benchmarks.compiled.ahead_cuda [--arch 70 75 80] [--ptx DIR [--wmma]]`` prints registers, spills, shared
memory, CTAs that a multiprocessor holds, and instructions by kind. tests/backends/cuda/test_ahead.py asserts what
must hold.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.gpu.grids import TILE
from dsts_kernels.backends.packing import TILE_BYTES

from . import cubin, cuda_compilers

NEURONS, CHANNELS = 10, 1024  # of the layer that kernels are launched for
PRODUCTS = ("conv", "data_gradient", "weight_gradient")
FILTER_TILES = 4  # of a CTA that lays filters out
BYTES = {"half": 2, "bfloat16": 2, "tf32": 4, "float": 4}
VECTOR, LINE = 16, 128  # bytes


class Chip(NamedTuple):
    """What a multiprocessor holds, and how many the largest chip has."""

    processors: int
    smem_kib: int
    threads: int
    blocks: int


CHIPS = {
    70: Chip(80, 96, 2048, 32), 75: Chip(72, 64, 1024, 16), 80: Chip(108, 164, 2048, 32), 86: Chip(84, 100, 1536, 16),
    87: Chip(16, 164, 1536, 16), 88: Chip(16, 100, 1536, 16), 89: Chip(142, 100, 1536, 24),
    90: Chip(132, 228, 2048, 32), 100: Chip(148, 228, 2048, 32), 103: Chip(160, 228, 2048, 32),
    110: Chip(20, 228, 1536, 24), 120: Chip(188, 100, 1536, 24), 121: Chip(48, 100, 1536, 24),
}  # fmt: skip


def reserved(arch: int) -> int:
    """Shared bytes that the system takes of every CTA."""
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
    static_smem: int
    dynamic_smem: int
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
    """Of one step, as csrc/cuda/tiles.h."""
    size = BYTES[element]
    if element != "float" and arch >= 75:
        return TILE * (64 if arch >= 80 else 32)
    step = 64  # bytes of K
    return TILE * (step + VECTOR) if by_k else step // size * (TILE * size + 2 * VECTOR)


def product_smem(element: str, a_by_k: bool, b_by_k: bool, arch: int) -> int:
    """``product_smem`` of csrc/cuda/tiles.h."""
    stages = 2 if arch < 80 else 3 if element == "float" else 4
    columns = TILE // 4 if 75 <= arch < 80 else TILE // 2  # that an epilogue takes at once
    epilogue = TILE * (columns + 4) * 4 + TILE * 9 * 4
    return max(stages * (operand_bytes(element, a_by_k, arch) + operand_bytes(element, b_by_k, arch)), epilogue)


# sizeof(ConvSmem), sizeof(GradientSmem): what tests/backends/cuda/test_ahead.py asks the C++ compiler.
CONV_SMEM, GRADIENT_SMEM = 192, 2176


def launched_ctas(element: str, arch: int) -> int:
    """The most CTAs that a convolution is launched with."""
    return min(CHIPS[arch].processors * grids.resident_ctas(arch, element == "float"), grids.MAX_CTAS)


def dynamic_smem(name: cubin.Name, arch: int, threads: int, num_ctas: int | None = None) -> int:
    """Bytes of shared memory that the launchers in csrc/cuda ask for."""
    first = str(name.arguments[0]) if name.arguments else ""
    panel = grids.GATHER_POSITIONS * (TILE_BYTES + VECTOR)
    match name.base:
        case "conv":
            by_k = bool(name.arguments[1])
            num_ctas = launched_ctas(first, arch) if num_ctas is None else num_ctas
            return product_smem(first, True, by_k, arch) + CONV_SMEM + 4 * (3 * num_ctas + 1 + threads)
        case "data_gradient":
            return product_smem(first, True, True, arch) + GRADIENT_SMEM
        case "weight_gradient":
            return product_smem(first, False, False, arch)
        case "tap_sums":
            _, taps, vector, by_channel = name.arguments
            return 4 * threads * taps * (vector if by_channel else 1)
        case "group_samples":
            return 4 * (3 * threads // 32 + NEURONS)
        case "list_channels":
            return 4 * 3 * threads // 32
        case "gather_panel":
            return panel
        case "route_and_gather":
            return panel + 4 * (256 + NEURONS)
        case "gather_panel_turned" | "route_and_gather_turned":
            turned = FILTER_TILES * LINE * (LINE // BYTES[first])  # as many tiles of squares as filters have
            return turned if name.base == "gather_panel_turned" else turned + 4 * (256 + NEURONS)
        case "gather_panel_whole" | "route_and_gather_whole":
            size = BYTES[first]
            block = TILE_BYTES // size
            tile = grids.whole_positions(CHANNELS * size) * (CHANNELS * size + VECTOR)
            if name.base == "gather_panel_whole":
                return tile + 2 * CHANNELS * (2 + 4)
            return tile + (CHANNELS + block) * 2 + 4 * (256 + NEURONS)
        case "pack_filters" | "unpack_filters":
            return (
                FILTER_TILES * LINE * (LINE // BYTES[str(name.arguments[-1])])
            )  # by channel; by output at most 16 KiB
        case "semhash_forward" | "semhash_backward":
            return 0
    raise KeyError(f"{name}: not known how much shared memory it is launched with")


def resident(arch: int, threads: int, registers: int, shared: int) -> int:
    """CTAs that a multiprocessor holds at the same time."""
    chip = CHIPS[arch]
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // of_warp // 4 * 4 // warps  # registers lie in four parts
    unit = 128 if arch >= 80 else 256
    by_shared = chip.smem_kib * 1024 // max(-(-(shared + reserved(arch)) // unit) * unit, unit)
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
        static_smem = int(static[1]) if static else 0
        dynamic, registers = dynamic_smem(name, built.arch, kernel.threads), int(found["registers"])
        rows.append(
            Resources(
                built.source, built.arch, name, kernel.threads, registers, int(found["stack"]), int(found["stores"]),
                int(found["loads"]), static_smem, dynamic,
                resident(built.arch, kernel.threads, registers, static_smem + dynamic), kernel.counts,
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
        "| kernel | chip | threads | registers | spilled, stores/loads | stack | shared | CTAs an SM | HMMA | "
        + " | ".join(COLUMNS)
        + " |",
        "| --- | --- |" + " ---: |" * (7 + len(COLUMNS)),
    ]
    for one in found:
        if one.supported:
            counts = " | ".join(str(one.counts[kind] or "") for kind in COLUMNS)
            lines.append(
                f"| {one.name} | sm_{one.arch} | {one.threads} | {one.registers} | {one.spill_stores}/{one.spill_loads}"
                f" | {one.stack} | {one.static_smem}+{one.dynamic_smem} | {one.resident} | {one.tensor or ''}"
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
