"""Switches: each change of how the GPU path works can be turned off, so that old and new are timed beside each other.

Users need none of them; ``python -m benchmarks.gpu.changes`` turns one off at a time. They hold for the whole process,
because a backward pass runs in threads of autograd's own. A change that could give other results on a GPU where
it never ran is off by default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace


@dataclass(frozen=True, eq=False)  # found without comparing: the same values are the same object (switched)
class Switches:
    """One field a change; ``False`` is how it was before."""

    plain_where_faster: bool = True
    """:func:`dsts_kernels.backends.choose` follows what was measured (:mod:`.measured`); without it the first backend
    that can run an op runs it."""

    flat_gather: bool = True
    """Triton's gathers store their tiles as vectors, which leaves loads a layout of their own: lanes read neighbours of
    a list."""

    early_gather: bool = True
    """A frozen layer's first launch in Triton sends for channels-last features, from memory to L2, before it works the
    choice out."""

    gluon_gather: bool = False
    """A frozen layer's first launch on channels-last features in Gluon, where Triton has what it takes: whole positions
    in shared memory, the choice worked out meanwhile (:mod:`..triton.route_rows`). Right on an H200, and no faster."""

    turned_gather: bool = True
    """CUDA C++ gathers from features whose positions lie side by side 16 bytes at a time, not by elements."""

    gluon_conv: bool = True
    """A frozen layer's convolution on Hopper is the kernel in Gluon (``triton/gluon``), where its waves are full."""

    gluon_data_gradient: bool = True
    """Likewise the gradients of features and gates, where gates train (``triton/gluon/data_gradient.py``)."""

    gluon_weight_gradient: bool = True
    """Likewise the gradients of both operators' filters (``triton/gluon/weight_gradient.py``)."""

    fuse_routing: bool = True
    """Scores, Gumbel noise, choice, share and gates are one launch of Triton, and their gradients another."""

    keep_counters: bool = True
    """In Triton a convolution's counters stay zero from launch to launch, and on the default stream no launch fills
    them."""

    remember_launches: bool = True
    """In Triton the compiled kernel of an earlier launch of the same kind is taken again."""

    record_calls: bool = True
    """In Triton all launches of an op are done again as an earlier call of the same kind did them
    (:mod:`..triton.recorded`); it takes ``remember_launches``."""

    whole_waves: bool = True
    """A convolution whose CTAs end nearly together without it shares no tiles (:func:`.grids.dealt_waves`)."""

    flat_norm: bool = True
    """BatchNorm sees features with frames and rows as one dimension, for which torch has faster kernels
    (:mod:`dsts_kernels.norm`)."""

    keep_lists: bool = True
    """A backward pass takes groups and lists of its forward pass instead of making them again. Without it
    filters are not kept either, since groups say where they lie."""

    read_filters: bool = True
    """Where no gradient reads more, Triton lays out filters of those channels that a sample of the neuron reads."""

    keep_filters: bool = True
    """A backward pass takes filters as its forward pass laid them out: ``12*C*O`` numbers for each neuron chosen."""


_current = Switches()
_known = {astuple(_current): _current}  # by values, so that what is kept by switches is found again


def current() -> Switches:
    """The switches as they are now."""
    return _current


@contextlib.contextmanager
def switched(**changes: bool) -> Iterator[Switches]:
    """The switches with ``changes`` inside the block, for every thread of the process.

    >>> with switched(plain_where_faster=False) as inside:
    ...     assert not current().plain_where_faster

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
    before, wanted = _current, replace(_current, **changes)
    _current = _known.setdefault(astuple(wanted), wanted)
    try:
        yield _current
    finally:
        _current = before
