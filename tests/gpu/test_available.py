"""Where the GPU suite must run: the tests here that do not ask a backend itself whether to be skipped."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.backends.cuda import native_targets, runs_on

from .support import HALF, why_not

pytestmark = pytest.mark.gpu


def test_triton_can_run_on_ampere_and_later():
    """Where the chip and the package are there, nothing is missing."""
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("older than Ampere")
    assert why_not("triton", torch.bfloat16) is None


def test_cuda_can_run_where_it_was_built():
    """Where the native module has code for this chip, nothing is missing: the half precision it has, and float32."""
    if native_targets() is None:
        pytest.skip("the native module was built without CUDA kernels")
    version, targets = native_targets()
    if not runs_on(targets, *torch.cuda.get_device_capability()):
        pytest.skip(f"nvcc {version} built no code for this GPU")
    assert why_not("cuda", HALF) is None and why_not("cuda", torch.float32) is None


def test_bfloat16_is_refused_before_ampere():
    """With a reason that names what runs instead."""
    if torch.cuda.get_device_capability() >= (8, 0):
        pytest.skip("Ampere or later")
    assert why_not("triton", torch.float16) is not None
    if why_not("cuda", torch.float16) is None:
        assert "float16 runs" in why_not("cuda", torch.bfloat16)
