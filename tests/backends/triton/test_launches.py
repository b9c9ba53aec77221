"""What is launched: kernels in a compiled graph, how many a frozen layer takes, 64-bit counting, parts of tap sums."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import functional
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import features
from dsts_kernels.ops import mixing_conv3d, tap_sums
from dsts_kernels.testing import assert_close

from ...support.inputs import SIZE, gated_inputs
from ...support.stand_ins import BACKEND, KERNELS, everything, pair
from .support import NAMES, interpreted, spy_on

pytestmark = interpreted


OPS = {
    "tap_sums": lambda x, gate, neuron: tap_sums(x, 9, backend="triton"),
    "semhash_gate": lambda x, gate, neuron: functional.semhash_gate(
        gate, torch.zeros(2, 8), torch.tensor([True, False]), neuron=neuron, backend="triton"
    ),
    "gated_conv3d": lambda x, gate, neuron: functional.gated_conv3d(
        x, gate, neuron, torch.ones(2, 4, 8, 1, 3, 3), torch.ones(2, 4, 8, 3, 1, 1), backend="triton"
    ),
    "mixing_conv3d": lambda x, gate, neuron: mixing_conv3d(x, neuron, torch.ones(2, 8, 8, 1, 3, 3), backend="triton"),
}
LAUNCHED = {
    "tap_sums": ["tap_sums_kernel"],
    "semhash_gate": ["semhash_kernel", "semhash_backward_kernel"],
    "gated_conv3d": ["conv_kernel", "data_gradient_kernel"],
    "mixing_conv3d": ["conv_kernel"],
}


@pytest.mark.parametrize("name", OPS)
def test_compiled(name, monkeypatch):
    """One graph with the kernels in it, forward and backward: the launchers really run, with the same bits."""
    torch._dynamo.reset()
    x, gate = torch.randn(2, 8, *SIZE, requires_grad=True), torch.rand(2, 8).round().requires_grad_()
    neuron, results = torch.tensor([1, 0]), []
    for function in (OPS[name], torch.compile(OPS[name], fullgraph=True, backend="eager")):
        spies = [spy_on(monkeypatch, kernel) for kernel in LAUNCHED[name]]
        y = function(x, gate, neuron)
        found = torch.autograd.grad(y.square().sum(), (x, gate), allow_unused=True)
        assert all(spy.launches for spy in spies)
        results.append([y, *(g for g in found if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_compiles(monkeypatch):
    """A frozen module is one graph, of two launches a layer and one for the first layer's sums."""
    torch._dynamo.reset()
    _, fused = pair(8)
    fast, x = fused.eval().freeze(), torch.randn(2, 8, *SIZE)
    y, spies = fast(x), [spy_on(monkeypatch, name) for name in NAMES]
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="eager")(x), y)
    assert sum(len(spy.launches) for spy in spies) == 2 * 2 + 1


def test_counting_in_64_bits(monkeypatch):
    """Kernels compiled for samples of more than 2^31 elements do the same."""
    inputs = gated_inputs(2, 12, 12)
    _, fused = pair(12)
    fast = fused.eval().freeze()
    wanted = everything(inputs[0], inputs, fast)
    monkeypatch.setattr(features, "needs_int64", lambda *tensors: True)
    spies = [spy_on(monkeypatch, "weight_gradient_kernel", INDEX_64=True)]
    spies += [spy_on(monkeypatch, name) for name in ("conv_kernel", "data_gradient_kernel", "gather_panel_kernel")]
    spies += [spy_on(monkeypatch, name) for name in ("tap_sums_kernel", "route_and_gather_kernel")]
    for mine, theirs in zip(everything(inputs[0], inputs, fast), wanted, strict=True):
        assert torch.equal(mine, theirs)
    for spy in spies:
        assert spy.launches
        assert all(constants["INDEX_64"] or "INDEX_64" in spy.constants for _, constants in spy.launches)


def test_tap_sums_of_many_parts(multiprocessors):
    """A small batch on a large chip is summed in parts; on a small one in fewer."""
    x = torch.randn(1, 20, 6, 7, 9)
    for count in (1, 2, 5):
        multiprocessors(count)
        for taps in (1, 9):
            assert KERNELS.partial_tap_sums(x, taps).shape[1] == min(6, 4 * count)
            assert_close(BACKEND.tap_sums(x, taps), BACKENDS["eager"].tap_sums(x.double(), taps))
