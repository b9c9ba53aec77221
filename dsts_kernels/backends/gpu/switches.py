"""Switches: each change of how the GPU path works can be turned off, so that old and new are timed beside each other.

Users need none of them; ``python -m benchmarks.gpu.changes`` turns one off at a time. They hold for the whole process,
because a backward pass runs in threads of autograd's own. A change that could give other results on a GPU where
it never ran is off by default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Switches:
    """One field a change; ``False`` is how it was before."""

    whole_waves: bool = True
    """A convolution whose CTAs end nearly together without it shares no tiles (:func:`.grids.dealt_waves`)."""
    flat_norm: bool = True
    """BatchNorm sees features with frames and rows as one dimension, for which torch has faster kernels
    (:mod:`dsts_kernels.norm`)."""
    keep_lists: bool = True
    """A backward pass takes groups and lists of its forward pass instead of making them again."""
    keep_filters: bool = True
    """A backward pass takes filters as its forward pass laid them out: ``12*C*O`` numbers for each neuron chosen."""


_current = Switches()


def current() -> Switches:
    """The switches as they are now."""
    return _current


@contextlib.contextmanager
def switched(**changes: bool) -> Iterator[Switches]:
    """The switches with ``changes`` inside the block, for every thread of the process.

    >>> with switched(whole_waves=False) as inside:
    ...     assert not current().whole_waves

    Raises:
        TypeError: no switch has that name, or a value is no ``bool``.
    """
    global _current
    names = [field.name for field in fields(Switches)]
    for name, value in changes.items():
        if name not in names:
            raise TypeError(f"switched: got {name!r}, wanted one of {', '.join(names)}")
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, wanted True or False")
    before, _current = _current, replace(_current, **changes)
    try:
        yield _current
    finally:
        _current = before
