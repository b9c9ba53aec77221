"""Fixtures of the CUDA backend's own tests: the chip that launches are for, and how convolutions were shared out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsts_kernels.backends.cuda import kernels


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``multiprocessors(n)``: launch as on a chip that has so many."""
    from ...support.stand_ins import BACKEND

    return lambda count: monkeypatch.setattr(BACKEND, "processors", count)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, kernels.Problem]]:
    """Form and grid of every convolution from now on."""
    record, run = [], kernels.conv

    def conv(panel, filters, form, plan, out, p, **options) -> None:
        record.append((form, p))
        run(panel, filters, form, plan, out, p, **options)

    monkeypatch.setattr(kernels, "conv", conv)
    return record
