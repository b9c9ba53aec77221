"""Switches between an older and a newer way of the GPU backends: ``benchmarks/gpu`` times both in one call.

No environment variable and no option reads them; what ships is the defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Switches:
    """One field a change, the newer way where it is true."""

    fuse_routing: bool = True  # scores, Gumbel noise, choice, share and gates in a launch, and their gradients in one
    keep_counters: bool = True  # Triton: a convolution's counters stay zero from launch to launch, no launch fills them
    remember_launches: bool = True  # Triton: the compiled kernel of an earlier launch of the same kind is taken again


_current = Switches()


def current() -> Switches:
    """The switches as they are now, of the whole process."""
    return _current


@contextlib.contextmanager
def switched(**fields: bool) -> Iterator[None]:
    """A block with other switches, ``switched(keep_counters=False)``: of the whole process, autograd's threads too."""
    global _current
    before = _current
    _current = dataclasses.replace(before, **fields)
    try:
        yield
    finally:
        _current = before
