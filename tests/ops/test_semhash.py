"""SemHash gates: values, the straight-through gradient against its formula, and rows that stay apart."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.functional import saturating_sigmoid, semhash_gate
from dsts_kernels.ops.semhash import backward_op, gate_op
from dsts_kernels.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")

SIZES = [
    pytest.param(6, 4, 17, id="ragged"),
    pytest.param(3, 10, 1024, id="paper"),
    pytest.param(0, 3, 8, id="empty-batch"),
    pytest.param(5, 1, 1, id="one-channel"),
]


def sample_inputs(b: int, n: int, c: int, dtype: torch.dtype = torch.float64):
    logits = (torch.randn(n, c, dtype=torch.float64) * 2).to(dtype)
    noise = torch.randn(b, c, dtype=torch.float64).to(dtype)
    return logits, noise, torch.rand(b) < 0.5, torch.randint(n, (b,))


def soft(q: torch.Tensor) -> torch.Tensor:
    return (1.2 * torch.sigmoid(q) - 0.1).clamp(0, 1)


def slope(q: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(q)
    r = 1.2 * s - 0.1
    return torch.where((r > 0) & (r < 1), 1.2 * s * (1 - s), 0.0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("b, n, c", SIZES)
def test_values(backend, b, n, c, dtype):
    """Gathered logits plus noise, hard or soft by sample, in every dtype."""
    logits, noise, hard, neuron = sample_inputs(b, n, c, dtype)
    q = logits[neuron].double() + noise.double()
    gate = semhash_gate(logits, noise, hard, neuron=neuron, backend=backend)
    assert gate.dtype == dtype
    assert_close(gate, torch.where(hard[:, None], (q > 0).double(), soft(q)))


def test_evaluation_is_hard_and_zero_is_closed(backend):
    """Without noise and ``hard`` every gate is hard, and ``q == 0`` gives 0."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, 1e-30, 5.0]])
    assert semhash_gate(logits, backend=backend).tolist() == [[0, 0, 0, 1, 1]]


def test_saturation_is_exact(backend):
    """Far logits give exactly 0 and 1: only then do their channels leave an operator's list."""
    assert saturating_sigmoid(torch.tensor([-3.0, 3.0, -200.0, 200.0]), backend=backend).tolist() == [0, 1, 0, 1]


def test_straight_through_gradient(backend):
    """Hard and soft samples get the same gradient, scattered to their neurons; others get exactly 0."""
    logits, noise, hard, _ = sample_inputs(6, 5, 33)
    neuron = torch.tensor([1, 4, 1, 1, 0, 4])
    grad = torch.randn(6, 33, dtype=torch.float64)
    expected = torch.zeros_like(logits).index_add_(0, neuron, grad * slope(logits[neuron] + noise))
    logits.requires_grad_()
    semhash_gate(logits, noise, hard, neuron=neuron, backend=backend).backward(grad)
    assert_close(logits.grad, expected)
    assert logits.grad[[2, 3]].count_nonzero() == 0


def test_gradcheck_soft(backend):
    """On the soft path finite differences agree."""
    logits = torch.empty(3, 7, dtype=torch.float64).uniform_(-2, 2).requires_grad_()
    hard = torch.zeros(3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda g: semhash_gate(g, None, hard, backend=backend), (logits,))
    assert torch.autograd.gradcheck(lambda g: saturating_sigmoid(g, backend=backend), (logits,))


def test_nan_stays_in_its_sample(backend):
    """NaN noise in one sample reaches neither another gate nor another neuron's gradient."""
    logits, noise, _, _ = sample_inputs(3, 3, 9)
    noise[1] = float("nan")
    logits.requires_grad_()
    gate = semhash_gate(logits, noise, torch.zeros(3, dtype=torch.bool), neuron=torch.arange(3), backend=backend)
    gate.sum().backward()
    assert torch.isfinite(gate[[0, 2]]).all() and torch.isnan(gate[1]).all()
    assert torch.isfinite(logits.grad[[0, 2]]).all()


def test_strided_logits(backend):
    """Transposed and sliced logits are read through their strides."""
    logits = torch.randn(9, 8, dtype=torch.float64).t()[::2]
    assert_close(semhash_gate(logits, None, torch.zeros(4, dtype=torch.bool), backend=backend), soft(logits))


def test_opcheck(backend):
    """Schema, fakes and dispatch of both ops."""
    logits, noise, hard, neuron = sample_inputs(4, 3, 6, torch.float32)
    torch.library.opcheck(gate_op.overload, (logits, neuron, noise, hard, backend))
    torch.library.opcheck(gate_op.overload, (logits, None, None, None, backend))
    torch.library.opcheck(backward_op.overload, (torch.randn(4, 6), logits, neuron, noise, backend))


BAD = {
    "logits-type": (dict(logits=[1.0]), TypeError, "logits: got list"),
    "logits-dtype": (dict(logits=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "logits: got a tensor of shape"),
    "logits-dims": (dict(logits=torch.zeros(3)), ValueError, "logits: .* wanted 2 dimensions"),
    "noise": (dict(noise=torch.zeros(2, 4)), ValueError, r"noise: .*\(2, 4\).* wanted shape \(2, 3\)"),
    "hard-shape": (dict(hard=torch.zeros(3, dtype=torch.bool)), ValueError, r"hard: .* wanted shape \(2,\)"),
    "hard-dtype": (dict(hard=torch.zeros(2)), TypeError, "hard: .* wanted torch.bool"),
    "neuron-dtype": (dict(neuron=torch.zeros(2)), TypeError, "neuron: .* wanted torch.int64"),
    "neuron-low": (dict(neuron=torch.tensor([-1])), ValueError, "neuron: got index -1, wanted 0 <= index < 2"),
    "neuron-high": (dict(neuron=torch.tensor([2])), ValueError, "neuron: got index 2, wanted 0 <= index < 2"),
    "backend": (dict(backend="none-such"), ValueError, "backend: got 'none-such', wanted one of"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    """A wrong argument is named before any kernel runs."""
    arguments = dict(logits=torch.zeros(2, 3)) | change
    with pytest.raises(error, match=message):
        semhash_gate(**arguments)
