"""What a step of a CUDA product kernel's main loop costs: cycles by :mod:`.multiprocessor`, passes of shared memory.

A *step* brings 64 bytes of K of both operands of a tile of :data:`TILE` by as many. Its cycles are those of the
compiled loop in the cycle model, for one block on a multiprocessor and for two, which share it; :mod:`.counted` states
them. Passes through shared memory follow from the addresses that lanes use there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..backends.gpu.grids import TILE
from .counted import COUNTED

# Filters by K (packed, stored) or by output (listed, transposed), data and filter gradient.
KERNELS = ("by_k", "by_output", "data_gradient", "weight_gradient")

LANES, BANKS, WORD, ROW = range(32), 32, 4, 128  # ROW: bytes that all banks deliver at once
STEP = 64  # bytes of K


class Step(NamedTuple):
    """Cycles of a multiprocessor in which each of its blocks does one step: as assumed, and all unfavourable."""

    cycles: float
    worst: float


def passes(addresses: Iterable[int], width: int) -> int:
    """How often shared memory is read or written for one instruction, ``width`` bytes a lane.

    Lanes go together as far as their bytes fill all banks; of those, each bank serves one word at a time.
    """
    lanes, together = list(addresses), ROW // width
    count = 0
    for first in range(0, len(lanes), together):
        words = {(at + byte) // WORD for at in lanes[first : first + together] for byte in range(0, width, WORD)}
        banks = [word % BANKS for word in words]
        count += max(map(banks.count, set(banks)))
    return count


def pitch_of(capability: int, by_k: bool, element: int) -> int:
    """Bytes from row to row in shared memory, as ``SharedTile`` of csrc/cuda/product.h has them: sm_70, and float32."""
    return STEP + 16 if by_k else TILE * element + (32 if capability < 75 else 16)


def quad_load(left: bool, by_k: bool, pitch: int) -> int:
    """Passes of one load of an operand for quad pairs on sm_70, as ``QuadOperand`` of csrc/cuda/volta.h reads it.

    By K a lane reads 8 bytes of its own row, else 16 bytes of its own k.
    """
    lanes = [(lane % 4, lane // 16, lane >> (2 if left else 3) & 1) for lane in LANES]
    if by_k:
        return passes(((8 * upper + 4 * half + low) * pitch for low, upper, half in lanes), 8)
    return passes((low * pitch + 2 * (16 * upper + 8 * half) for low, upper, half in lanes), 16)


def load_passes(capability: int, dtype: str, kernel: str) -> dict[int, tuple[float, float]]:
    """Passes of a load of the left operand and of the right one, by its bytes a lane.

    Loads that are not named meet in no bank: as many passes as a lane loads words (from sm_75 on
    tests/backends/cuda/test_banks.py asks the kernels themselves).
    """
    if capability >= 75 or dtype == "float32":
        return {}
    by_k = kernel != "weight_gradient", kernel in ("by_k", "data_gradient")
    by_width: dict[int, tuple[float, float]] = {}
    for side in range(2):
        width = 8 if by_k[side] else 16
        load = quad_load(side == 0, by_k[side], pitch_of(capability, by_k[side], 2))
        left, right = by_width.get(width, (width / WORD,) * 2)
        by_width[width] = (load, right) if side == 0 else (left, load)
    return by_width


def store_passes(by_k: bool, pitch: int, element: int) -> int:
    """Passes of a block to write one operand's tile of a step, 16 bytes a thread, in the order of ``CopyPlan``."""
    across = (STEP if by_k else TILE * element) // 16
    rows = [lane // 4 % 2 * 4 + lane // 8 if by_k else lane // across for lane in LANES]
    instructions = TILE * STEP // 16 // len(LANES)
    return instructions * passes((rows[lane] * pitch + lane % across * 16 for lane in LANES), 16)


def step_of(capability: int, dtype: str, kernel: str, blocks: int) -> Step:
    """Of the compiled loop, with ``blocks`` on a multiprocessor; of a chip between, that of the generation before."""
    generation = max(counted for counted in COUNTED if counted <= capability)
    return Step(*COUNTED[generation][dtype][kernel].cycles[blocks])
