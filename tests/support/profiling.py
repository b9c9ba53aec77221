"""torch's profiler, where a test needs somebody who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

OLD = torch.__version__ < (2, 7)


@contextlib.contextmanager
def profile() -> Iterator[None]:
    """``torch.profiler.profile()``. torch 2.6 cannot start it in every process: its binding reads an empty set of
    scopes, the default, as one of any size, and runs out of memory (``set_caster::load`` in ``libtorch_python``)."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(torch.profiler.profile())
        except (MemoryError, RuntimeError) as error:
            if OLD:
                pytest.xfail(f"torch {torch.__version__} does not start its own profiler here: {error}")
            raise
        yield
