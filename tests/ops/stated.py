"""What the op files of this folder state of their ops for tests of all ops: gathered here, so each stands once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

N, O, C = 3, 4, 5
NEURON = torch.tensor([0, 2, 1, 2])
SOFT = torch.zeros(4, dtype=torch.bool)
HERE = 4096  # an address of NATIVE that is none: to read it ends the process


class Dispatch(NamedTuple):
    """``DISPATCH`` of a test file: how ``test_dispatch`` calls a function of the package, and its literal version."""

    operands: tuple[str, ...]  # of operands(), in order
    ours: Callable
    literal: Callable
    differentiable: tuple[str, ...] | None = None  # operands with a gradient; None: all
    op: str = ""  # the op that it calls, where that has another name
    backward: bool = True  # whether its gradient is an op of its own, not a plain expression
    second: bool = False  # whether it has second derivatives


def operands() -> dict[str, torch.Tensor]:
    """What the public ops take, in float64, of samples that chose ``NEURON``."""
    return {
        "x": torch.randn(4, C, 2, 3, 4, dtype=torch.float64),
        "gate": torch.rand(4, C, dtype=torch.float64),
        "spatial": torch.randn(N, O, C, 1, 3, 3, dtype=torch.float64),
        "temporal": torch.randn(N, O, C, 3, 1, 1, dtype=torch.float64),
        "mixing": torch.randn(N, C, C, 1, 3, 3, dtype=torch.float64),
        "logits": torch.randn(N, C, dtype=torch.float64),
        "noise": torch.randn(4, C, dtype=torch.float64),
        "scoring": torch.randn(N, 2, C, 1, 3, 3, dtype=torch.float64),
    }


def stated(name: str) -> dict[str, Any]:
    """``DISPATCH`` (by function) or ``NATIVE`` (by CUDA function: good arguments) of every op file."""
    entries: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != "test_dispatch.py":
            entries |= getattr(importlib.import_module(f"tests.ops.{path.stem}"), name, {})
    return entries
