"""Upstream-Downstream Learning on a GPU: the step of the CPU, mixed precision, and nothing left of the virtual step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.learning import RoutingMonitor, UpstreamDownstream
from tests.learning.support import Net, batch, everything, learner, same, sgd

pytestmark = pytest.mark.gpu


def to_gpu(pair: tuple) -> tuple:
    return tuple(field.cuda() for field in pair[0]), pair[1].cuda()


def test_step_is_that_of_the_cpu(gpu_backend):
    """Three steps in float32 against float64 on the CPU, the same draws."""
    net = Net(channels=16, norm=None)
    mine = copy.deepcopy(net).float().cuda()
    for layer in mine.dsts.layers:
        layer.backend = gpu_backend
    steps, reference = learner(mine), learner(net)
    for _ in range(3):
        train, val = (batch(6, channels=16) for _ in range(2))
        expected = reference.step(train, val)
        narrow = [(tuple(f.float() if f.is_floating_point() else f for f in pair[0]), pair[1]) for pair in (train, val)]
        found = steps.step(*map(to_gpu, narrow))
        for a, b in zip(found, expected, strict=True):
            assert math.isclose(a, b, rel_tol=1e-3), (found, expected)
    for (name, a), b in zip(mine.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-3, atol=1e-5, msg=name)


def test_mixed_precision(gpu_backend):
    """float16 autocast and a scaler: finite steps; an overflow leaves all but the scale, the GPU's generator too."""
    net = Net(channels=16, dtype=torch.float32).cuda()
    for layer in net.dsts.layers:
        layer.backend = gpu_backend
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    steps = learner(net, scaler=scaler, autocast=torch.float16)
    x, y = torch.randn(6, 3, 2, 8, 8, device="cuda"), torch.arange(6, device="cuda") % 4
    for _ in range(3):
        assert all(map(math.isfinite, steps.step((x, y), (x, y))))
    before = [*everything(net), torch.cuda.get_rng_state()]
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1e38})
    assert math.isinf(steps.step((x, y), (x, y)).upstream_grad_norm)
    assert same(before, [*everything(net), torch.cuda.get_rng_state()]) and scaler.get_scale() < 1e38


def test_same_seed_same_bits(gpu_backend):
    """Noise from the GPU's generator, fused AdamW, the monitor counting: twice the same."""

    def run() -> list:
        torch.manual_seed(5)
        net = Net(channels=16, dtype=torch.float32).cuda()
        for layer in net.dsts.layers:
            layer.backend = gpu_backend
        monitor = RoutingMonitor(net)
        sides = {k: torch.optim.AdamW(o.param_groups[0]["params"], 1e-2, fused=True) for k, o in sgd(net).items()}
        steps = UpstreamDownstream(net, F.cross_entropy, **sides)
        for _ in range(3):
            x, y = torch.randn(6, 3, 2, 8, 8, device="cuda"), torch.arange(6, device="cuda") % 4
            steps.step((x, y), (x, y))
        assert monitor.statistics().samples.tolist() == [54, 54]
        return [p.detach().cpu() for p in net.parameters()]

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        assert same(run(), run())
