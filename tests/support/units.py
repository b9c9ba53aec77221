"""A stand-in for a processor with matrix units: it says what it has, how fast it is, and that oneDNN knows it.

Products are then made in half types as on such a chip, by what torch has here for them: oneDNN from AVX-512 on, else
torch's own loops, which are slow.
"""

from __future__ import annotations

import functools

import pytest
import torch

from dsts_kernels.backends import processor

MATRIX = ("amx_bf16", "amx_fp16", "amx_int8", "avx512_bf16", "avx512_vnni")


def pretend(
    patch: pytest.MonkeyPatch,
    units: tuple[str, ...] = MATRIX,
    speedup: float = 7.0,
    refused: str = "",
    library: bool = True,
    slow: tuple[str, ...] = (),
) -> None:
    """Until ``patch`` is undone this processor has ``units``, so many times as fast as float32 in all but ``slow``."""
    patch.setattr(processor, "offered", lambda: {name: name in units for name in MATRIX} | {"refused": refused})
    patch.setattr(processor, "speedup", lambda dtype, step="forward": 1.0 if step in slow else speedup)
    if library:
        patch.setattr(processor, "why_not_library", lambda dtype: None)
    patch.setattr(processor, "_unit", functools.cache(processor._unit.__wrapped__))


def pretend_float32(patch: pytest.MonkeyPatch) -> None:
    """As if float32 were a half type that is fast: oneDNN reorders its filters on every machine."""
    unit = processor.UNITS[torch.bfloat16][0]
    patch.setattr(processor, "unit_of", lambda dtype: unit if dtype == torch.float32 else None)
