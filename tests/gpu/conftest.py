"""Every test of the GPU suite: backends in turn, and float32 means float32."""

from __future__ import annotations

import pytest

from dsts_kernels.testing import exact_float32

from ..support.targets import GPU_BACKENDS, HALF
from .support import why_not


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend; skipped with its own reason where it cannot run, or not in the dtype that the test is about."""
    reason = why_not(request.param, request.node.callspec.params.get("dtype", HALF))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def float32_is_exact():
    """No TF32 unless a test asks for it."""
    with exact_float32():
        yield
