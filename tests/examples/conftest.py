"""The recipe counts with torchmetrics, which imports torchvision where that is installed, beside whatever torch."""

from __future__ import annotations

import pytest

from tests.support import torchvision_ops


@pytest.fixture(autouse=True)
def torchvision_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in those that a test starts."""
    monkeypatch.setenv("PYTHONPATH", torchvision_ops.for_processes())
