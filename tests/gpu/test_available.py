"""Where the GPU suite must run: the one test here that does not ask the backend itself whether to be skipped."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.backends import BACKENDS

from .support import BACKEND, DEVICE

NO_GPU = "no CUDA GPU here: torch.cuda.is_available() is False"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]


def test_triton_can_run_on_ampere_and_later():
    """Where the chip and the package are there, nothing is missing."""
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("older than Ampere")
    assert BACKENDS[BACKEND].why_not("gated_conv3d", DEVICE, torch.bfloat16) is None
