"""Fixtures of the Triton backend's own tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``multiprocessors(n)``: launch as on a chip that has so many."""
    from dsts_kernels.backends.triton import launch, tuning

    return lambda count: monkeypatch.setattr(launch, "chip", lambda device: (tuning.INTERPRETER, count))
