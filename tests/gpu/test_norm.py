"""BatchNorm on a flat view of features: that torch takes the kernels it is meant to, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dsts_kernels import norm as norms
from dsts_kernels.backends.gpu import switches
from dsts_kernels.testing import assert_close

from .support import DEVICE, HALF

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.bfloat16 != HALF, reason="the view is for bfloat16, which this GPU lacks"),
]
STEPS = ("collect_statistics", "transform_input", "backward_reduce", "backward_elemt")
SHAPE = (4, 64, 4, 8, 8)


def channels_last() -> torch.Tensor:
    return torch.randn(SHAPE, device=DEVICE, dtype=HALF).contiguous(memory_format=torch.channels_last_3d)


def test_torch_takes_its_channels_last_kernels():
    """All four kernels of a training step; without the view not all of them."""
    norm, x, grad = nn.BatchNorm3d(SHAPE[1]).to(DEVICE, HALF), channels_last().requires_grad_(), channels_last()
    found = {}
    for flat in (True, False):
        with switches.switched(flat_norm=flat):
            norms.normalize(norm, x).backward(grad)
            activities = [torch.profiler.ProfilerActivity.CUDA]
            # The way is chosen before: a profiler is a listener, which sees the norm called as it is.
            call = norms.flat_batch_norm if norms.takes_flat(norm, x) else type(norm).forward
            with torch.profiler.profile(activities=activities) as profiler:
                call(norm, x).backward(grad)
        names = [event.key for event in profiler.key_averages() if "channels_last" in event.key]
        found[flat] = {step for step in STEPS if any(step in name for name in names)}
    assert found[True] == set(STEPS)
    assert found[False] < found[True]


def test_the_same_as_without():
    """Output, gradients and statistics, in training and evaluation."""
    norm, x, grad, results = nn.BatchNorm3d(SHAPE[1]).to(DEVICE, HALF), channels_last(), channels_last(), []
    for flat in (True, False):
        mine, features = copy.deepcopy(norm), x.clone().requires_grad_()
        with switches.switched(flat_norm=flat):
            assert norms.takes_flat(mine, features) == flat
            y = norms.normalize(mine, features)
            y.backward(grad)
            evaluated = norms.normalize(mine.eval(), x)
        results.append([y, evaluated, features.grad, mine.weight.grad, mine.bias.grad, *mine.buffers()])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine.double(), theirs.double(), dtype=HALF)
