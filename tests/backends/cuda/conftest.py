"""Fixtures of the CUDA backend's own tests: the chip that launches are for, and how convolutions were shared out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsts_kernels.backends.cuda import kernels
from dsts_kernels.backends.gpu.grids import PersistentGrid


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``multiprocessors(n)``: launch as on a chip that has so many."""
    from ...support.stand_ins import BACKEND

    return lambda count: monkeypatch.setattr(BACKEND, "processors", count)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, PersistentGrid]]:
    """Form and grid of every convolution from now on."""
    record, run = [], kernels.conv

    def conv(panel, filters, form, plan, out, grid, **options) -> None:
        record.append((form, grid))
        run(panel, filters, form, plan, out, grid, **options)

    monkeypatch.setattr(kernels, "conv", conv)
    return record
