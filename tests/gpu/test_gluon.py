"""The Gluon kernels on a GPU: first in processes that are killed when they hang, then as ops' kernels."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import first_run
from dsts_kernels.backends import explain
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton.gluon import plan

pytestmark = pytest.mark.gpu
hung: list[str] = []  # seven cases that hang would take the whole part of ``make gpu`` with them


@pytest.fixture
def hopper():
    reason = plan.unfit(torch.cuda.get_device_capability(), torch.bfloat16)
    if reason is not None:
        pytest.skip(f"gluon: {reason}")


@pytest.mark.parametrize(
    "case",
    [
        "one tile",
        "ragged",
        "float16",
        "nine taps",
        "channels-first",
        "tpn",
        "swin",
        "data ragged",
        "weight ragged",
        "data no neuron",
        "weight no neuron",
        "data channels-first",
        "weight mixing",
        "data tpn",
        "weight tpn",
    ],
)
def test_in_a_process_of_its_own(case, hopper):
    """Right, twice the same bits, and it ends: a deadlock fails the Gluon cases that follow, and no other test."""
    if hung:
        pytest.fail(f"not run, as {hung[0]!r} was killed")
    ok, text = first_run.watched(case, 2 * first_run.SECONDS)
    if "killed after" in text:
        hung.append(case)
    assert ok, text


def test_explain_says_which_kernel_runs():
    """With the switch off, and on a GPU without the feature, the older one, with its reason."""
    with switched(gluon_conv=False):
        assert "not in Gluon: " in explain("frozen_layer", "cuda", torch.bfloat16)
    text = explain("frozen_layer", "cuda", torch.bfloat16)
    fits = plan.unfit(torch.cuda.get_device_capability(), torch.bfloat16) is None
    assert ("its convolution in Gluon" in text) == fits
    with switched(gluon_data_gradient=True, gluon_weight_gradient=True):
        text = explain("gated_conv3d", "cuda", torch.bfloat16)
    assert text.count("not in Gluon: ") == (0 if fits else 2)
