"""What a step of a CUDA product kernel's main loop costs: cycles by :mod:`.multiprocessor`, passes of shared memory.

A *step* brings 64 bytes of K of both operands of a tile of 128 by 128. Its cycles are those of the compiled loop in the
cycle model, for one block on a multiprocessor and for two, which share it; :mod:`.counted` states them. Passes through
shared memory follow from the addresses that lanes use there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .counted import COUNTED

# Filters by K (packed, rows) or by output (listed, columns), data and filter gradient.
KERNELS = ("by_k", "by_output", "data_gradient", "weight_gradient")
WMMA = frozenset(KERNELS)  # whose fragments load_matrix_sync reads on sm_70; others read theirs without conflicts

LANES, BANKS, WORD, ROW = range(32), 32, 4, 128  # ROW: bytes that all banks deliver at once
STEP, TILE = 64, 128  # bytes of K, rows or columns


class Step(NamedTuple):
    """Cycles of a multiprocessor in which each of its blocks does one step: as assumed, and all unfavourable."""

    cycles: float
    worst: float


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
    """Bytes from row to row in shared memory, as ``SharedTile`` of csrc/cuda/product.h has them."""
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


def tf32_fragment(by_k: bool, pitch: int) -> int:
    """Passes of one load of a TF32 fragment: 4 bytes a lane, four lanes along K and eight across."""
    along = [(lane % 4, lane // 4) for lane in LANES]
    return passes((k * WORD + mn * pitch if by_k else k * pitch + mn * WORD for k, mn in along), WORD)


def load_passes(capability: int, dtype: str, kernel: str) -> dict[int, tuple[float, float]]:
    """Passes of a load of the left operand and of the right one, by its bytes a lane, where those are not a word each.

    Other loads meet in no bank: as many passes as a lane loads words.
    """
    by_k = kernel != "weight_gradient", kernel in ("by_k", "data_gradient")
    pitches = [pitch_of(capability, way, 4 if dtype in ("float32", "tf32") else 2) for way in by_k]
    if dtype == "tf32":
        return {WORD: tuple(map(tf32_fragment, by_k, pitches))}
    if capability >= 75 or dtype == "float32" or kernel not in WMMA:
        return {}
    found: dict[int, tuple[float, float]] = {}
    for side in range(2):
        width, loads = (16, 2) if by_k[side] else (8, 4)
        own = volta_fragment(side == 0, by_k[side], pitches[side]) / loads
        other = found.get(width, (width / WORD,) * 2)
        found[width] = (own, other[1]) if side == 0 else (other[0], own)
    return found


def store_passes(by_k: bool, pitch: int, element: int) -> int:
    """Passes of a block to write one operand's tile of a step, 16 bytes a thread, in the order of ``Copies``."""
    across = (STEP if by_k else TILE * element) // 16
    rows = [lane // 4 % 2 * 4 + lane // 8 if by_k else lane // across for lane in LANES]
    instructions = TILE * STEP // 16 // len(LANES)
    return instructions * passes((rows[lane] * pitch + lane % across * 16 for lane in LANES), 16)


def step_of(capability: int, dtype: str, kernel: str, blocks: int) -> Step:
    """Of the compiled loop, with ``blocks`` on a multiprocessor; of a chip between, that of the generation before."""
    generation = max(counted for counted in COUNTED if counted <= capability)
    return Step(*COUNTED[generation][dtype][kernel].cycles[blocks])
