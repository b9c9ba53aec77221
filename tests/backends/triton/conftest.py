"""Fixtures of the Triton backend's own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``multiprocessors(n)``: launch as on a chip that has so many."""
    from dsts_kernels.backends.triton import launch, tuning

    return lambda count: monkeypatch.setattr(launch, "chip", lambda device: (tuning.INTERPRETER, count))


@pytest.fixture
def min_k_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``min_k_blocks(n)``: no program that shares a tile has fewer. Grids are kept, so those of before are dropped."""
    from dsts_kernels.backends.gpu import grids
    from dsts_kernels.backends.triton import tuning

    def set_least(least: int) -> None:
        monkeypatch.setattr(grids, "MIN_K_BLOCKS", least)
        tuning.grid_of.cache_clear()

    yield set_least
    tuning.grid_of.cache_clear()
