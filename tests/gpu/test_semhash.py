"""SemHash gates on the GPU: values and the straight-through gradient against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dsts_kernels.functional import saturating_sigmoid, semhash_gate
from dsts_kernels.testing import assert_close

from .support import DEVICE, DTYPES, gpu_only, randn

pytestmark = [*gpu_only, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]

SIZES = [
    pytest.param(6, 4, 17, id="ragged"),
    pytest.param(8, 10, 1024, id="paper"),
    pytest.param(32, 10, 100, id="batch-32"),
    pytest.param(1, 1, 1, id="one"),
    pytest.param(0, 3, 8, id="empty-batch"),
    pytest.param(3, 2, 70_001, id="many-channels"),
]


def sample_inputs(b: int, n: int, c: int, dtype: torch.dtype):
    """Logits, noise, hard, neuron; none within rounding of where a soft gate saturates and its gradient jumps."""
    hard, neuron = torch.rand(b, device=DEVICE) < 0.5, torch.randint(n, (b,), device=DEVICE)
    logits, noise = randn(n, c, dtype=dtype, scale=2), randn(b, c, dtype=dtype)
    near = ((logits[neuron].double() + noise.double()).abs() - math.log(11)).abs() < 1e-3
    return logits, torch.where(near, noise + 0.125, noise), hard, neuron


def soft(q: torch.Tensor) -> torch.Tensor:
    return (1.2 * torch.sigmoid(q) - 0.1).clamp(0, 1)


def slope(q: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(q)
    r = 1.2 * s - 0.1
    return torch.where((r > 0) & (r < 1), 1.2 * s * (1 - s), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b, n, c", SIZES)
def test_values_and_gradient(gpu_backend, b, n, c, dtype):
    """Gathered logits plus noise, hard or soft by sample; the gradient is that of the soft gate for both."""
    logits, noise, hard, neuron = sample_inputs(b, n, c, dtype)
    q = logits[neuron].double() + noise.double()
    gate = semhash_gate(logits.requires_grad_(), noise, hard, neuron=neuron, backend=gpu_backend)
    assert gate.dtype == dtype
    assert_close(gate, torch.where(hard[:, None], (q > 0).double(), soft(q)))
    assert torch.equal(gate[hard].double(), (q[hard] > 0).double())
    grad = randn(b, c, dtype=dtype)
    wanted = torch.zeros(n, c, dtype=torch.float64, device=DEVICE).index_add_(0, neuron, grad.double() * slope(q))
    (found,) = torch.autograd.grad(gate, logits, grad)
    assert_close(found, wanted, dtype=dtype, factor=2)
    unrouted = torch.ones(n, dtype=torch.bool, device=DEVICE).index_fill_(0, neuron, False)
    assert found[unrouted].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_neuron_noise_or_hard(gpu_backend, dtype):
    """Rows as they are; hard where nothing says otherwise, and a logit of zero is closed."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, 2**-14, 5.0]], device=DEVICE).to(dtype)
    assert semhash_gate(logits, backend=gpu_backend).tolist() == [[0, 0, 0, 1, 1]]


def test_saturation_is_exact(gpu_backend):
    """Far logits give exactly 0 and 1, in a tensor of any shape."""
    far = torch.tensor([[-3.0, 3.0], [-200.0, 200.0]], device=DEVICE)
    assert saturating_sigmoid(far, backend=gpu_backend).tolist() == [[0, 1], [0, 1]]
    x = randn(3, 5, 4, 7)
    assert_close(saturating_sigmoid(x, backend=gpu_backend), soft(x.double()))


def test_strided_logits(gpu_backend):
    """Transposed and sliced logits are read through their strides."""
    logits = randn(9, 8).t()[::2]
    closed = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    assert_close(semhash_gate(logits, None, closed, backend=gpu_backend), soft(logits.double()))


def test_nan_stays_in_its_sample(gpu_backend):
    """NaN noise in one sample reaches neither another gate nor another neuron's gradient."""
    logits, noise, _, _ = sample_inputs(3, 3, 90, torch.float32)
    noise[1] = float("nan")
    closed = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    neuron = torch.arange(3, device=DEVICE)
    gate = semhash_gate(logits.requires_grad_(), noise, closed, neuron=neuron, backend=gpu_backend)
    (gradient,) = torch.autograd.grad(gate.sum(), logits)
    assert torch.isfinite(gate[[0, 2]]).all() and torch.isnan(gate[1]).all()
    assert torch.isfinite(gradient[[0, 2]]).all()


def test_gradient_repeats_bit_for_bit(gpu_backend):
    """Many samples add into one neuron's row in a fixed order."""
    logits, noise, hard, _ = sample_inputs(32, 3, 1000, torch.float32)
    neuron, grad = torch.ones(32, dtype=torch.int64, device=DEVICE), randn(32, 1000)
    gate = semhash_gate(logits.requires_grad_(), noise, hard, neuron=neuron, backend=gpu_backend)
    runs = [torch.autograd.grad(gate, logits, grad, retain_graph=True)[0] for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs)
