"""Gated convolution on the GPU against dense masked products in float64, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.functional import gated_conv3d
from dsts_kernels.testing import assert_close, relative_error

from .support import DEVICE, DTYPES, GATES, HALF, LAYOUTS, gated_conv, gated_inputs, gpu_only, randn, widened

pytestmark = [*gpu_only, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]

GRID = 3, 6, 5  # most tests share it, for every grid is a compilation of its own
NAMES = {"x": 0, "gate": 1, "spatial": 3, "temporal": 4}
RAGGED = (3, 20, *GRID), 33
SIZES = [
    pytest.param(*RAGGED, id="ragged"),
    pytest.param((1, 33, *GRID), 20, id="batch-1"),
    pytest.param((8, 64, 8, 7, 7), 64, id="batch-8-swin-plane"),
    pytest.param((2, 100, 4, 16, 16), 100, id="tpn-plane"),
    pytest.param((32, 16, *GRID), 24, id="batch-32"),
    pytest.param((3, 17, 1, 1, 1), 5, id="one-position"),
    pytest.param((2, 8, 4, 1, 6), 8, id="one-row"),
    pytest.param((5, 1, 2, 3, 1), 1, id="one-channel"),
    pytest.param((2, 300, 3, 9, 11), 280, id="many-blocks"),
]


def check(gpu_backend, inputs, trained="x gate spatial temporal", grad_layout="channels-first"):
    """Output and the gradients of what is trained, within the tolerance of the dtype."""
    dtype = inputs[0].dtype
    wide = widened(inputs)
    indices = [NAMES[name] for name in trained.split()]
    for tensors in (inputs, wide):
        for index in indices:
            tensors[index].requires_grad_()
    out, ref = gated_conv3d(*inputs, backend=gpu_backend), gated_conv(*wide)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(out, ref, name="output")
    grad = LAYOUTS[grad_layout](randn(*ref.shape, dtype=dtype))
    mine = torch.autograd.grad(out, [inputs[i] for i in indices], grad)
    theirs = torch.autograd.grad(ref, [wide[i] for i in indices], grad.double())
    for name, g, h in zip(trained.split(), mine, theirs, strict=True):
        assert_close(g, h, dtype=dtype, name=f"gradient of {name}", factor=2)


@pytest.mark.parametrize("size, outputs", SIZES)
def test_sizes(gpu_backend, size, outputs):
    """Batches of 1, 8 and 32, both planes, channels that no tile divides, in half precision."""
    check(gpu_backend, gated_inputs(size, outputs, HALF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size, outputs", [SIZES[0], SIZES[2], SIZES[8]])
def test_dtypes(gpu_backend, size, outputs, dtype):
    """The other two dtypes."""
    check(gpu_backend, gated_inputs(size, outputs, dtype))


@pytest.mark.parametrize("one_neuron", [False, True], ids=["any-neuron", "one-neuron"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gates(gpu_backend, dtype, gate, one_neuron):
    """Every kind of gate, every sample on one neuron or on its own."""
    check(gpu_backend, gated_inputs((5, 48, *GRID), 40, dtype, gate, one_neuron))


@pytest.mark.parametrize("grad_layout", ["channels-first", "channels-last", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(gpu_backend, layout, grad_layout):
    """Any stride order of the features and of the gradient that comes back."""
    inputs = gated_inputs(*RAGGED, HALF)
    inputs[0] = LAYOUTS[layout](inputs[0]).detach()
    check(gpu_backend, inputs, grad_layout=grad_layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "trained",
    ["x", "gate", "x gate", "spatial", "temporal", "spatial temporal", "x spatial temporal", "gate temporal"],
)
def test_what_needs_no_gradient(gpu_backend, trained, dtype):
    """Any part frozen: gates frozen, operators frozen, and the subsets between; the rest is unchanged by it."""
    check(gpu_backend, gated_inputs((4, 48, *GRID), 40, dtype), trained)


def test_strided_weights(gpu_backend):
    """Weights that are slices of larger ones."""
    inputs = gated_inputs(*RAGGED, HALF)
    wider = randn(3, 33, 40, 1, 3, 3, dtype=HALF, scale=0.1)
    inputs[3] = wider[:, :, ::2].detach()
    check(gpu_backend, inputs)


def test_unrouted_neurons_get_zero(gpu_backend):
    """A neuron that nobody chose has a gradient, and it is exactly zero."""
    x, gate, _, spatial, temporal = gated_inputs((4, 48, *GRID), 40, HALF)
    neuron = torch.tensor([2, 0, 2, 2], device=DEVICE)
    out = gated_conv3d(x, gate, neuron, spatial.requires_grad_(), temporal.requires_grad_(), backend=gpu_backend)
    for gradient in torch.autograd.grad(out.float().sum(), (spatial, temporal)):
        assert gradient[1].count_nonzero() == 0 and gradient[2].count_nonzero() > 0


@pytest.mark.parametrize("one_neuron", [False, True], ids=["any-neuron", "one-neuron"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_samples_stay_apart(gpu_backend, dtype, one_neuron):
    """NaN and Inf in one sample, or in its gradient, never reach another sample's result."""
    inputs = gated_inputs((4, 40, *GRID), 48, dtype, one_neuron=one_neuron)
    inputs[0][1, 2], inputs[0][1, 3] = float("nan"), float("inf")
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    out = gated_conv3d(*inputs, backend=gpu_backend)
    grad = torch.randn_like(out)
    grad[1] = float("nan")
    for result in (out, *torch.autograd.grad(out, inputs[:2], grad)):
        assert torch.isfinite(result[[0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(gpu_backend, dtype):
    """Same input, same bits, forward and backward, five times over; samples share neurons."""
    inputs = gated_inputs((8, 96, 8, 7, 7), 80, dtype)
    for i in (0, 1, 3, 4):
        inputs[i].requires_grad_()
    grad, runs = randn(8, 80, 8, 7, 7, dtype=dtype), []
    for _ in range(5):
        out = gated_conv3d(*inputs, backend=gpu_backend)
        runs.append([out, *torch.autograd.grad(out, [inputs[i] for i in (0, 1, 3, 4)], grad)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_empty_batch(gpu_backend):
    """No samples: an empty result, and gradients of zero."""
    inputs = gated_inputs((0, 24, 2, 3, 3), 16, HALF)
    for i in (0, 1, 3, 4):
        inputs[i].requires_grad_()
    out = gated_conv3d(*inputs, backend=gpu_backend)
    assert out.shape == (0, 16, 2, 3, 3)
    found = torch.autograd.grad(out.sum(), [inputs[i] for i in (0, 1, 3, 4)])
    assert all(g.count_nonzero() == 0 for g in found) and found[2].shape == inputs[3].shape


def test_float32_precision_setting(gpu_backend):
    """``torch.set_float32_matmul_precision("high")`` allows TF32 where a GPU has it: about 1e-3, then float32 again."""
    inputs = gated_inputs((2, 256, 4, 16, 16), 128, torch.float32)
    ref = gated_conv(*widened(inputs))
    exact = relative_error(gated_conv3d(*inputs, backend=gpu_backend), ref)
    torch.set_float32_matmul_precision("high")
    loose = relative_error(gated_conv3d(*inputs, backend=gpu_backend), ref)
    torch.set_float32_matmul_precision("highest")
    again = relative_error(gated_conv3d(*inputs, backend=gpu_backend), ref)
    assert exact == again < 1e-5
    has_tf32 = torch.cuda.get_device_capability() >= (8, 0)
    assert 1e-5 < loose < 3e-3 if has_tf32 else loose == exact
