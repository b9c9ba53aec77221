"""Every test of the GPU suite: float32 means float32, and memory goes back when a file is done."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_workload import exact_float32


@pytest.fixture(autouse=True)
def float32_is_exact():
    """No TF32 unless a test asks for it."""
    with exact_float32():
        yield


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back():
    """Files run in processes of their own share one GPU."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
