"""The paper's modules at full size: TPN 1024x8x16x16 and Swin-B 1024x16x7x7, three layers, ten neurons.

Weights, features and draws are numbers that every dtype holds exactly, so that one float64 result serves all three.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import NAMED_SHAPES
from dsts_kernels import FusedDSTS, reference
from dsts_kernels.testing import assert_close

from ..support.modules import (
    RELU_GRADIENTS,
    assert_same_gradients,
    assert_same_routing,
    draws_for,
    enliven,
    features_for,
    kept_statistics,
    reference_output,
    reference_step,
    training_step,
)
from .support import DEVICE, HALF, needs_memory, randn

pytestmark = pytest.mark.gpu

CHANNELS, NEURONS = 1024, 10
OPTIONS = dict(num_neurons=NEURONS, score_reduction="mean")
SPREAD = 16  # of the scores over what they start as: mean scores of 1024 channels are small
GIB_A_SAMPLE = {"tpn": 2.0, "swin": 0.8}  # of a float64 training step


def snapped(x: torch.Tensor) -> torch.Tensor:
    """The nearest number that bfloat16 and float16 both hold."""
    return x.bfloat16().half().bfloat16().to(x.dtype)


@pytest.fixture(scope="module")
def ref():
    """The literal module in float64: 3.5 GB."""
    needs_memory(16)
    module = reference.DSTS(CHANNELS, dtype=torch.float64, device=DEVICE, **OPTIONS)
    enliven(module)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                t.copy_(snapped(t * SPREAD if name.endswith("scoring") else t))
    return module


@pytest.fixture(scope="module")
def trained(request, ref):
    """``(shape, batch, activation)`` to input, draws, gradient and what the reference makes of them."""
    shape, batch, activation = request.param
    needs_memory(16 + batch * GIB_A_SAMPLE[shape])
    for layer in ref.layers:
        layer.activation = activation
    size = (batch, CHANNELS, *NAMED_SHAPES[shape])
    x, grad = snapped(randn(*size)), snapped(randn(*size))
    draws = draws_for(ref, x, HALF)
    draws = draws._replace(noise=snapped(draws.noise))
    with kept_statistics(ref):
        found = reference_step(ref, x, draws, grad)
    yield x, draws, grad, activation, found
    for layer in ref.layers:
        layer.activation = "relu"


TRAINED = [
    ("tpn", 8, "relu"),
    ("swin", 8, None),
    ("swin", 1, "relu"),
    ("tpn", 1, None),
    ("swin", 32, "relu"),
]


def module_of(gpu_backend: str, ref: reference.DSTS, dtype: torch.dtype, activation: str | None = "relu") -> FusedDSTS:
    fused = FusedDSTS(CHANNELS, **OPTIONS, activation=activation, device=DEVICE, dtype=dtype, backend=gpu_backend)
    fused.load_state_dict(ref.state_dict())
    return fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", TRAINED, indirect=True, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}")
def test_training(gpu_backend, trained, ref, dtype):
    """Output, routing and every gradient of a whole step; one sample's norm leaves the router no gradient."""
    x, draws, grad, activation, (theirs, their_routing, wanted) = trained
    if dtype != HALF and x.shape[0] == 32:
        pytest.skip("the largest batch runs in one half precision")
    mine, routing, found = training_step(
        module_of(gpu_backend, ref, dtype, activation), x.to(dtype), draws, grad.to(dtype)
    )
    assert_close(mine, theirs, name="output", factor=2)
    assert_same_routing(routing, their_routing, dtype)
    factor = RELU_GRADIENTS[dtype] if activation else 5
    assert_same_gradients(found, wanted, dtype, factor, "scoring" if x.shape[0] == 1 else "nothing")


@pytest.fixture(scope="module", params=list(NAMED_SHAPES))
def evaluated(request, ref):
    """32 samples of a shape and the reference's output on them, eight at a time."""
    needs_memory(24)
    x = snapped(randn(32, CHANNELS, *NAMED_SHAPES[request.param]))
    parts = [features_for(ref, part) for part in x.split(8)]
    outputs = [reference_output(ref, part)[0] for part in parts]
    return torch.cat(parts), torch.cat(outputs)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_frozen(gpu_backend, evaluated, ref, batch, layout):
    """Batches of 1, 8 and 32 in half precision, in both memory formats."""
    x, theirs = (t[:batch] for t in evaluated)
    fast = module_of(gpu_backend, ref, HALF).eval().freeze()
    y = fast(x.to(HALF).contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    assert_close(y, theirs, factor=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_frozen_in_other_dtypes(gpu_backend, evaluated, ref, dtype):
    """A batch of 8."""
    x, theirs = (t[:8] for t in evaluated)
    assert_close(module_of(gpu_backend, ref, dtype).eval().freeze()(x.to(dtype)), theirs, factor=2)


def test_evaluation(gpu_backend, evaluated, ref):
    """The live module in evaluation, a batch of 8 in half precision."""
    x, theirs = (t[:8] for t in evaluated)
    assert_close(module_of(gpu_backend, ref, HALF).eval()(x.to(HALF)), theirs, factor=2)
