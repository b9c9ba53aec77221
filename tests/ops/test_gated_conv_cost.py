"""What a gated convolution costs on a CPU: products and calls of library convolutions, counted, not timed."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.backends import convolution, groups
from dsts_kernels.functional import gated_conv3d
from dsts_kernels.testing import assert_close

from ..support.inputs import gated_inputs, hard_gate

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("gate", ["hard", "all-spatial", "all-temporal"])
def test_a_hard_gate_costs_only_its_taps(backend, gate, monkeypatch):
    """Counted, not timed: forward and weight gradients touch 9 taps of a spatial channel, 3 of a temporal one."""
    macs = count_macs(monkeypatch)
    x, g, neuron, spatial, temporal = gated_inputs(1, 16, 8, (2, 4, 4), torch.float64, gate)
    spatial.requires_grad_()
    temporal.requires_grad_()
    gated_conv3d(x, g, neuron, spatial, temporal, backend=backend).sum().backward()
    taps = 9 * int(g.sum()) + 3 * int((1 - g).sum())
    assert macs == {"forward": taps * 8 * 32, "data_gradient": 0, "weight_gradient": taps * 8 * 32}


@pytest.mark.parametrize(
    "trains, data, weights",
    [("x", "listed", 0), ("gate", "all", 0), ("x gate", "all", 0), ("operators", None, "listed")],
)
def test_a_frozen_side_costs_nothing(backend, trains, data, weights, monkeypatch):
    """Frozen gates need listed channels only, frozen operators no weight gradient, frozen input no data gradient."""
    macs = count_macs(monkeypatch)
    x, g, neuron, spatial, temporal = gated_inputs(1, 16, 8, (2, 4, 4), torch.float64, "hard")
    for tensor, name in ((x, "x"), (g, "gate"), (spatial, "operators"), (temporal, "operators")):
        tensor.requires_grad_(name in trains)
    gated_conv3d(x, g, neuron, spatial, temporal, backend=backend).sum().backward()
    taps = {"listed": 9 * int(g.sum()) + 3 * int((1 - g).sum()), "all": 12 * 16, None: 0, 0: 0}
    assert macs["data_gradient"] == taps[data] * 8 * 32
    assert macs["weight_gradient"] == taps[weights] * 8 * 32


def test_samples_of_a_neuron_share_a_call(backend, monkeypatch):
    """Equal gates and neuron: one convolution for the batch, not one a sample."""
    calls = []
    original = convolution.forward
    monkeypatch.setattr(convolution, "forward", lambda *a: calls.append(a[0].shape[0]) or original(*a))
    x, _, _, spatial, temporal = gated_inputs(4, 12, 9, (3, 5, 4), torch.float64)
    gate = hard_gate(1, 12, torch.float64).expand(4, -1)
    gated_conv3d(x, gate, torch.zeros(4, dtype=torch.int64), spatial, temporal, backend=backend)
    assert calls == [4, 4]


def test_calls_stay_within_their_positions(backend, monkeypatch):
    """A large batch on one neuron is cut into calls, with the same result; its weight gradient is not."""
    inputs = gated_inputs(5, 12, 9, (3, 5, 4), torch.float64, "all-half", "one")
    whole = gated_conv3d(*inputs, backend=backend)
    monkeypatch.setattr(groups, "CALL_POSITIONS", 2 * 60)
    macs = count_macs(monkeypatch)
    inputs[3].requires_grad_()
    out = gated_conv3d(*inputs, backend=backend)
    assert_close(out, whole)
    out.sum().backward()
    assert macs["forward"] == 12 * 12 * 9 * 5 * 60 and macs["weight_gradient"] == 9 * 12 * 9 * 5 * 60


def count_macs(monkeypatch) -> dict[str, int]:
    """Multiply-adds of every library convolution, by what it is for."""
    macs = dict.fromkeys(("forward", "data_gradient", "weight_gradient"), 0)

    def spy(name, original):
        def run(a, b, kernel):
            taps = kernel[0] * kernel[1] * kernel[2]
            if name == "weight_gradient":  # (b, c, T, H, W), (b, O, T, H, W)
                macs[name] += a.numel() * b.shape[1] * taps
            else:  # (b, T, H, W, c), (O, taps, c)
                macs[name] += a[..., 0].numel() * b.numel()
            return original(a, b, kernel)

        return run

    for name in macs:
        monkeypatch.setattr(convolution, name, spy(name, getattr(convolution, name)))
    return macs
