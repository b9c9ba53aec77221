"""What the main loop of a CUDA product kernel costs inside a multiprocessor: warp instructions and shared memory.

A *step* of the loop brings 64 bytes of K of both operands of a tile of 128 by 128. Instructions are counted in SASS,
cycles of shared memory worked out from the addresses that lanes use there; how much of either is lost besides is an
estimate (:mod:`.chips`). Bank conflicts are included, conflicts of registers are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Warp instructions of one step: all that stand in the loop that holds the products of a whole step (512 HMMA.884, 64
# HMMA.16816, or twice 64 HMMA.1688), inner loops times their trips, branches not taken included. Counted on 2026-11-26
# by `python -m benchmarks.cuda_loops`, sm_70 as NVRTC 12.9 and its ptxas compile it, others as nvcc 13.0 does. By dtype
# of products, then by kernel: filters by K (packed, rows) or by output (listed, columns), data and filter gradient.
KERNELS = ("by_k", "by_output", "data_gradient", "weight_gradient")
COUNTED: dict[int, dict[str, tuple[int, int, int, int]]] = {
    70: {"float16": (773, 828, 822, 766), "float32": (1248, 1384, 1286, 1336)},
    75: {"float16": (324, 368, 326, 394), "float32": (1223, 1364, 1263, 1334)},
    80: {
        "float16": (171, 193, 169, 175),
        "bfloat16": (171, 193, 169, 175),
        "tf32": (300, 358, 298, 411),
        "float32": (1228, 1350, 1243, 1336),
    },
    90: {
        "float16": (171, 220, 168, 186),
        "bfloat16": (171, 222, 168, 186),
        "tf32": (304, 366, 298, 388),
        "float32": (1236, 1361, 1237, 1352),
    },
}

LANES, BANKS, WORD, ROW = range(32), 32, 4, 128  # ROW: bytes that all banks deliver at once
STEP, TILE = 64, 128  # bytes of K, rows or columns


class Step(NamedTuple):
    """Of one block, as cycles that it takes of a multiprocessor."""

    issue: float
    shared: float


def passes(addresses: Iterable[int], width: int) -> int:
    """How often shared memory is read or written for one instruction, ``width`` bytes a lane.

    Lanes go together as far as their bytes fill all banks; of those, each bank serves one word at a time.
    """
    lanes, together = list(addresses), ROW // width
    found = 0
    for first in range(0, len(lanes), together):
        words = {(at + more) // WORD for at in lanes[first : first + together] for more in range(0, width, WORD)}
        banks = [word % BANKS for word in words]
        found += max(map(banks.count, set(banks)))
    return found


def pitch_of(capability: int, by_k: bool, element: int) -> int:
    """Bytes from row to row in shared memory, as ``SharedTile`` of csrc/cuda/product.h has them: on sm_70, of float32."""
    return STEP + 16 if by_k else TILE * element + (32 if capability < 75 else 16)


def volta_fragment(left: bool, by_k: bool, pitch: int) -> int:
    """Passes to load a 16x16 half fragment on sm_70, where every element goes to two lanes.

    Lanes' addresses are those of the SASS of load_matrix_sync: where it lies by K, a lane takes its row by two loads of
    16 bytes, else four neighbours of four rows by four loads of 8 bytes.
    """
    quads = [(lane & 3, lane >> (2 if left else 3) & 1, lane >> 4 & 1) for lane in LANES]
    if by_k:
        return 2 * passes(((low + 8 * high + 4 * upper) * pitch for low, high, upper in quads), 16)
    return 4 * passes((low * pitch + 2 * (8 * high + 4 * upper) for low, high, upper in quads), 8)


def fragments(capability: int, dtype: str, by_k: tuple[bool, bool], pitches: tuple[int, int]) -> int:
    """Passes of a block to load the operands of a step."""
    if dtype == "float32":  # 8 warps, a thread 8 rows by 8 columns: passes of 4 k, by either layout, counted in SASS
        return 8 * 4 * (32 + 32)
    if capability < 75:  # 4 warps load 4 fragments of either side, twice
        return 4 * 2 * 4 * sum(volta_fragment(i == 0, by_k[i], pitches[i]) for i in range(2))
    # 4 warps load half of either side, in passes that meet every bank: tests/backends/cuda/test_banks.py
    return 4 * 2 * (TILE // 2) * STEP // ROW


def store_passes(by_k: bool, pitch: int, element: int) -> int:
    """Passes of a block to write one operand's tile of a step, 16 bytes a thread, in the order of ``Copies``."""
    across = (STEP if by_k else TILE * element) // 16
    rows = [lane // 4 % 2 * 4 + lane // 8 if by_k else lane // across for lane in LANES]
    instructions = TILE * STEP // 16 // len(LANES)
    return instructions * passes((rows[lane] * pitch + lane % across * 16 for lane in LANES), 16)


def step_of(capability: int, dtype: str, kernel: str, width: int) -> Step:
    """``width``: bytes a cycle of shared memory. Four schedulers issue one instruction a cycle each."""
    generation = max(counted for counted in COUNTED if counted <= capability)
    warps, element = 8 if dtype == "float32" else 4, 4 if dtype in ("float32", "tf32") else 2
    by_k = (kernel != "weight_gradient", kernel in ("by_k", "data_gradient"))
    pitches = tuple(pitch_of(capability, way, element) for way in by_k)
    moved = fragments(capability, dtype, by_k, pitches) + sum(map(store_passes, by_k, pitches, (element, element)))
    if capability < 80:  # steps pass through registers, and so through L1, which is the same memory
        moved += 2 * TILE * STEP // ROW
    instructions = COUNTED[generation][dtype][KERNELS.index(kernel)]
    return Step(instructions * warps / 4, moved * ROW / width)
