"""Gradients with the switches on: Triton's launches in its interpreter, both gradients on the stand-in."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import first_run
from dsts_kernels import FusedDSTS
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from ..backends.triton.support import interpreted, spy_on

pytestmark = interpreted
SWITCHES = {"gluon_data_gradient": True, "gluon_weight_gradient": True}
CASES = {
    "data": first_run.Gradients(24, (0, 2, 0), (2, 4, 6), torch.float16, switch="gluon_data_gradient"),
    "data, channels-first": first_run.Gradients(24, (1,), (2, 4, 6), torch.float16, False, None, "gluon_data_gradient"),
    "data, no neuron": first_run.Gradients(16, (2, -1, 9), (2, 4, 6), torch.float16, switch="gluon_data_gradient"),
    "weight": first_run.Gradients(72, (0, 2, 0), (2, 4, 6), torch.float16),
    "weight, no neuron": first_run.Gradients(40, (2, -1, 9), (2, 4, 6), torch.float16),
    "weight of mixing": first_run.Gradients(40, (2, 1, 2), (2, 4, 6), torch.float16, kernel=(1, 1, 1)),
    "weight of wide mixing": first_run.Gradients(40, (2, 1, 2), (2, 4, 6), torch.float16, kernel=(1, 3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_first_run_compares(name, hopper):
    """What the first run on a GPU does there but for timing: right, one launch, twice the same bits."""
    case = CASES[name]
    operands = first_run.operands_of(case, torch.device("cpu"))
    assert first_run.compare_gradients(case, operands) == 1
    assert len(hopper) == 2 and all(one.machine.multiplied for one in hopper)


@pytest.mark.parametrize("name", ["data", "weight"])
def test_first_run_tells_a_wrong_result(name, hopper, monkeypatch):
    case = CASES[name]
    operands = first_run.operands_of(case, torch.device("cpu"))
    backward = type(first_run.BACKENDS["eager"]).gated_conv3d_backward

    def wrong(*arguments: object) -> tuple:
        return tuple(t if t is None else t * 1.1 for t in backward(*arguments))

    monkeypatch.setattr(type(first_run.BACKENDS["eager"]), "gated_conv3d_backward", wrong)
    with pytest.raises(AssertionError, match="beside plain PyTorch in float32: relative error"):
        first_run.compare_gradients(case, operands)


def test_training_step(hopper, monkeypatch):
    """A whole step of a module: every gradient as by the older kernels, none of which is launched."""
    dsts = FusedDSTS(40, num_layers=2, num_neurons=3, score_reduction="mean", norm=None, backend="triton").half()
    with torch.no_grad():
        for layer in dsts.layers:
            layer.gate.normal_()
    x, grad, draws, found = torch.randn(3, 40, 2, 4, 6), torch.randn(3, 40, 2, 4, 6), sample_draws(3, 40, 3, 2), []
    older = [spy_on(monkeypatch, f"{kind}_gradient_kernel") for kind in ("data", "weight")]
    for switches in (SWITCHES, dict.fromkeys(SWITCHES, False)):
        dsts.zero_grad(set_to_none=True)
        features = x.half().requires_grad_()
        with switched(**switches):
            y = dsts(features, draws=draws)
            y.backward(grad.half())
        found.append([y.detach(), features.grad, *(p.grad for p in dsts.parameters())])
        # Of each layer the gradients of features and gates, of both operators' filters, and of the mixing kernel's.
        assert len(hopper) == 6 and sum(len(spy.launches) for spy in older) == (0 if switches is SWITCHES else 6)
    for one, wanted in zip(*found, strict=True):
        assert_close(one, wanted.double())
