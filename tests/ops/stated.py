"""What the op files of this folder state of their ops for tests of all ops: gathered here, so each stands once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Dispatch(NamedTuple):
    """``DISPATCH`` of a test file: how ``test_dispatch`` calls an op, and the literal version of it."""

    operands: tuple[str, ...]  # of test_dispatch.operands
    ours: Callable
    literal: Callable
    differentiable: tuple[str, ...] | None = None  # operands with a gradient; None: all
    backward: bool = True  # whether its gradient is an op of its own
    second: bool = False  # whether it has second derivatives


def stated(name: str) -> dict[str, Any]:
    """``DISPATCH`` (by op) or ``NATIVE`` (by function of the native module: good arguments) of every op file."""
    entries: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != "test_dispatch.py":
            entries |= getattr(importlib.import_module(f"tests.ops.{path.stem}"), name, {})
    return entries
