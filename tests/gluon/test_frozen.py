"""A frozen module with the switch on: Triton's launches in its interpreter, the convolution on the stand-in."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import first_run
from dsts_kernels import FusedDSTS
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.testing import assert_close

from ..backends.triton.support import interpreted, spy_on

pytestmark = interpreted


@pytest.mark.parametrize("scoring_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_frozen_module(scoring_kernel, mixing_kernel, hopper, monkeypatch):
    """Right, routed alike; one launch a layer, and none of the older kernel but for mixing that does not fold."""
    options = dict(num_layers=2, num_neurons=3, scoring_kernel=scoring_kernel, mixing_kernel=mixing_kernel)
    dsts = FusedDSTS(24, **options, score_reduction="mean", backend="eager").eval().half()
    with torch.no_grad():
        for layer in dsts.layers:
            layer.gate.normal_()
            layer.norm.bias.normal_()
    x, spy = torch.randn(3, 24, 2, 4, 6).half(), spy_on(monkeypatch, "conv_kernel")
    frozen = dsts.freeze(backend="triton")
    y, routing = frozen(x, return_routing=True)
    wanted, wanted_routing = dsts.double()(x.double(), return_routing=True)
    assert torch.equal(routing.neuron, wanted_routing.neuron)
    assert_close(y, wanted, factor=2)
    assert len(hopper) == 2 and all(one.machine.multiplied for one in hopper)
    assert len(spy.launches) == (0 if mixing_kernel == (1, 1, 1) else 2)
    hopper.clear()
    with switched(gluon_conv=False):
        assert_close(frozen(x), wanted, factor=2)
    assert not hopper, "the switch was off"


def test_first_run_compares(hopper):
    """What the first run on a GPU does there but for timing; a wrong result is told."""
    case = first_run.Case(24, 3, (2, 4, 6), torch.float16, taps=9)
    frozen, module, x = first_run.frozen_of(case, torch.device("cpu"))
    assert first_run.compare(frozen, module, x) == 2 and len(hopper) == 4
    with torch.no_grad():
        module.layers[1].norm.bias.add_(1)
    with pytest.raises(AssertionError, match="beside plain PyTorch in float32: relative error"):
        first_run.compare(frozen, module, x)
