"""What a kernel can do wrong, and which of its lines runs."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path

sources: set[str] = set()  # files of kernels that were loaded


class Fault(Exception):
    """A mistake of the kernel."""


class Deadlock(Fault):
    """Everybody waits."""


class PhaseFault(Fault):
    """A wait for another phase than the one that is due, or arrivals and bytes that no phase expects."""


class Hazard(Fault):
    """Data is used before it is there, or after it may be gone."""


def line() -> str:
    """The kernel's line that runs, ``conv.py:91: mbarrier.wait(...)``."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in sources:
        frame = frame.f_back
    if frame is None:
        return "outside of a kernel"
    name, number = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(name).name}:{number}: {linecache.getline(name, number).strip()}"
