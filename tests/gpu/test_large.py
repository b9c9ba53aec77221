"""Tensors of more than 2^31 elements: offsets that 32 bits do not hold, checked where they matter, in one dtype."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.functional import gated_conv3d, semhash_gate
from dsts_kernels.ops import mixing_conv3d, tap_sums
from dsts_kernels.testing import assert_close

from ..support.modules import features_for, reference_output
from ..support.oracles import literal_gated, literal_mixing, soft, wide
from .support import DEVICE, HALF, gated_inputs, needs_memory, pair, randn

pytestmark = pytest.mark.gpu

LIMIT = 2**31
CHANNELS, GRID = 64, (8, 64, 64)
SAMPLE = CHANNELS * GRID[0] * GRID[1] * GRID[2]
BATCH = LIMIT // SAMPLE + 2  # the last two samples lie beyond the limit
WATCHED = [0, BATCH - 3, BATCH - 2, BATCH - 1]


def fill(size: tuple[int, ...]) -> torch.Tensor:
    """Noise, channels-last: a few samples of it over and over, for generating is slower than what is tested."""
    few = randn(4, *size[1:], dtype=HALF).contiguous(memory_format=torch.channels_last_3d)
    x = torch.empty(size, dtype=HALF, device=DEVICE, memory_format=torch.channels_last_3d)
    for start in range(0, size[0], 4):
        x[start : start + 4] = few[: size[0] - start]
    return x


@pytest.mark.parametrize("taps", [1, 9])
def test_tap_sums(gpu_backend, taps):
    """Many samples, and one whose channels lie further apart than 32 bits reach."""
    needs_memory(24)
    x = fill((BATCH, CHANNELS, *GRID))
    watched = tap_sums(x, taps, backend=gpu_backend)[WATCHED]
    assert_close(watched, tap_sums(x[WATCHED].double(), taps, backend="eager"), factor=10)
    del x
    x = torch.empty(1, 3, 8, 8192, 16384 - 64, dtype=HALF, device=DEVICE).normal_()
    assert x.numel() > LIMIT
    sums = tap_sums(x, taps, backend=gpu_backend)
    for channel in range(3):
        absolute = x[0, channel].float().abs().sum().double()
        wanted = x[0, channel].sum(dtype=torch.float64)
        assert (sums[0, channel, taps // 2] - wanted).abs() <= 1e-5 * absolute


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
def test_gated_conv3d(gpu_backend, last):
    """Forward, data gradient and gate gradient at both ends of a batch, in either memory format."""
    needs_memory(36)
    x, gate, neuron, spatial, temporal = gated_inputs(BATCH, CHANNELS, CHANNELS, (1, 1, 1), HALF)
    x = fill((BATCH, CHANNELS, *GRID))
    x = x if last else x.contiguous()
    x.requires_grad_()
    gate.requires_grad_()
    out = gated_conv3d(x, gate, neuron, spatial, temporal, backend=gpu_backend)
    grad = out.detach()  # any features do
    dx, dgate = torch.autograd.grad(out, (x, gate), grad)
    doubles = wide([x[WATCHED], gate[WATCHED], neuron[WATCHED], spatial, temporal])
    doubles[0].requires_grad_()
    doubles[1].requires_grad_()
    ref = literal_gated(*doubles)
    assert_close(out[WATCHED], ref, name="output")
    wanted = torch.autograd.grad(ref, doubles[:2], grad[WATCHED].double())
    assert_close(dx[WATCHED], wanted[0], name="gradient of x", factor=2)
    assert_close(dgate[WATCHED], wanted[1], name="gradient of gate", factor=2)


def test_weight_gradient(gpu_backend):
    """Features beyond the limit, summed into the operators of a neuron that only the last samples chose."""
    needs_memory(24)
    _, gate, _, spatial, temporal = gated_inputs(1, CHANNELS, 16, (1, 1, 1), HALF, "hard", neurons=2)
    neuron = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    neuron[-2:] = 1  # these two lie beyond the limit
    x, gate = fill((BATCH, CHANNELS, *GRID)), gate.expand(BATCH, -1).contiguous()
    out = gated_conv3d(x, gate, neuron, spatial.requires_grad_(), temporal.requires_grad_(), backend=gpu_backend)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (spatial, temporal), grad)
    doubles = [
        t.requires_grad_() if i > 2 else t
        for i, t in enumerate(wide([x[-2:], gate[-2:], neuron[-2:], spatial, temporal]))
    ]
    theirs = torch.autograd.grad(literal_gated(*doubles), doubles[3:], grad[-2:].double())
    for g, h in zip(mine, theirs, strict=True):
        assert_close(g[1], h[1], dtype=HALF, factor=2)
        assert torch.isfinite(g[0]).all() and g[0].count_nonzero() > 0


def test_mixing_conv3d(gpu_backend):
    """Forward and data gradient at both ends of a batch."""
    needs_memory(24)
    z = fill((BATCH, CHANNELS, *GRID)).requires_grad_()
    neuron = torch.randint(3, (BATCH,), device=DEVICE)
    mixing = randn(3, CHANNELS, CHANNELS, 1, 1, 1, dtype=HALF, scale=CHANNELS**-0.5)
    out = mixing_conv3d(z, neuron, mixing, backend=gpu_backend)
    (dz,) = torch.autograd.grad(out, z, out.detach())
    doubles = z[WATCHED].detach().double().requires_grad_()
    ref = literal_mixing(doubles, neuron[WATCHED], mixing.double())
    assert_close(out[WATCHED], ref)
    assert_close(dz[WATCHED], torch.autograd.grad(ref, doubles, out[WATCHED].detach().double())[0], factor=2)


def test_stacked_weights(gpu_backend):
    """A stack of operators beyond the limit, read and written at its last neuron; the others hold NaN."""
    needs_memory(32)
    channels, neurons = 4096, 16
    assert neurons * channels * channels * 9 > LIMIT
    x, gate, _, spatial, temporal = gated_inputs(2, channels, channels, (1, 4, 4), HALF, "hard", neurons=1)
    stacks = []
    for weight in (spatial, temporal):
        stack = torch.full((neurons, *weight.shape[1:]), float("nan"), dtype=HALF, device=DEVICE)
        stack[-1] = weight[0]
        stacks.append(stack.requires_grad_())
    neuron = torch.full((2,), neurons - 1, device=DEVICE)
    out = gated_conv3d(x, gate, neuron, *stacks, backend=gpu_backend)
    doubles = [t.requires_grad_() if i > 2 else t for i, t in enumerate(wide([x, gate, neuron * 0, spatial, temporal]))]
    ref = literal_gated(*doubles)
    assert_close(out, ref)
    grad = torch.randn_like(out)
    mine, theirs = torch.autograd.grad(out, stacks, grad), torch.autograd.grad(ref, doubles[3:], grad.double())
    for g, h in zip(mine, theirs, strict=True):
        assert_close(g[-1], h[0], dtype=HALF, factor=2)
        assert g[0].count_nonzero() == 0 and g[-2].count_nonzero() == 0


def test_frozen(gpu_backend):
    """A frozen module over such a batch: routing, panels, output and skip."""
    needs_memory(36)
    ref, fused = pair(gpu_backend, CHANNELS, HALF, num_layers=2, num_neurons=3)
    x = fill((BATCH, CHANNELS, *GRID))
    x[WATCHED] = features_for(ref, x[WATCHED])
    y, routing = fused.eval().freeze()(x, return_routing=True)
    theirs, their_routing = reference_output(ref, x[WATCHED])
    assert torch.equal(routing.neuron[:, WATCHED], their_routing.neuron)
    assert_close(y[WATCHED], theirs, factor=2)


def test_semhash_gate(gpu_backend):
    """Many samples of many channels."""
    needs_memory(24)
    b, c = 2**15 + 1, 2**16
    noise = torch.empty(b, c, dtype=HALF, device=DEVICE).normal_()
    logits, neuron = randn(2, c, dtype=HALF), torch.arange(b, device=DEVICE) % 2
    hard = torch.zeros(b, dtype=torch.bool, device=DEVICE)
    gate = semhash_gate(logits, noise, hard, neuron=neuron, backend=gpu_backend)
    q = logits[neuron[-2:]].double() + noise[-2:].double()
    assert_close(gate[-2:], soft(q))
