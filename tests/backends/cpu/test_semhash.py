"""The gate's kernels against float64 formulas, on NaN-poisoned outputs; 1, 2 and 3 threads bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .support import _C, check, check_threads, dtypes

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


def semhash_forward(
    logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None, batch: int, threads: int = 1
) -> Tensor:
    gate = torch.full((batch, logits.shape[1]), torch.nan, dtype=logits.dtype)
    _C.semhash_forward(logits, neuron, noise, hard, gate, threads)
    return gate


def semhash_backward(
    grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, threads: int = 1
) -> Tensor:
    out = torch.full_like(logits, torch.nan)
    _C.semhash_backward(grad, logits, neuron, noise, out, threads)
    return out


def soft_ref(q):
    return (1.2 * q.sigmoid() - 0.1).clamp(0, 1)


@dtypes
@pytest.mark.parametrize("C", [1, 7, 17, 33, 1024])
@pytest.mark.parametrize("B", [0, 1, 40])
def test_values(dtype, C, B):
    """Soft and hard gates, forward and backward, follow the formulas for every dtype and width."""
    N = 5
    logits, noise, grad = (torch.randn(n, C, dtype=torch.float64).mul(2).to(dtype) for n in (N, B, B))
    neuron, hard = torch.randint(0, N - 1, (B,)), torch.arange(B) % 2 == 0
    q = logits.double()[neuron] + noise.double()
    gate = check_threads(lambda k: [semhash_forward(logits, neuron, noise, hard, B, k)])[0]
    check(gate, torch.where(hard[:, None], (q > 0).double(), soft_ref(q)), dtype)
    s = q.sigmoid()
    slope = torch.where((soft_ref(q) > 0) & (soft_ref(q) < 1), 1.2 * s * (1 - s), 0.0)
    ref = torch.zeros(N, C, dtype=torch.float64).index_add_(0, neuron, grad.double() * slope)
    dlogits = check_threads(lambda k: [semhash_backward(grad, logits, neuron, noise, k)])[0]
    check(dlogits, ref, dtype, 4)
    assert not dlogits[N - 1].any()


def test_defaults():
    """Null neuron, noise and hard mean: own row, no noise, every sample hard; q == 0 closes the gate."""
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, -0.0]])
    assert torch.equal(semhash_forward(logits, None, None, None, 2), (logits > 0).float())
    soft = semhash_forward(logits, None, None, torch.zeros(2, dtype=torch.bool), 2)
    check(soft, soft_ref(logits.double()), torch.float32)


def test_extremes():
    """Infinite, huge and NaN logits: exact 0 and 1 when saturated, soft NaN stays NaN, hard NaN is 0."""
    logits = torch.tensor([[torch.inf, -torch.inf, 200.0, -200.0, torch.nan]])
    soft = semhash_forward(logits, None, None, torch.zeros(1, dtype=torch.bool), 1)
    assert soft[0, :4].tolist() == [1, 0, 1, 0] and soft[0, 4].isnan()
    assert semhash_forward(logits, None, None, None, 1).tolist() == [[1, 0, 1, 0, 0]]


def test_backward_isolates():
    """A NaN gradient stays in its neuron's row, and a saturated gate passes nothing, not even 0 * Inf."""
    logits = torch.tensor([[0.0, 9.0], [0.0, 0.0], [0.0, 0.0]])
    grad = torch.tensor([[1.0, torch.inf], [torch.nan, torch.nan]])
    out = semhash_backward(grad, logits, torch.tensor([0, 1]), None)
    assert out[0].tolist() == pytest.approx([0.3, 0.0]) and out[1].isnan().all() and not out[2].any()


def test_bad_neuron():
    """A neuron index out of range raises before anything is written."""
    logits, gate = torch.zeros(2, 3), torch.full((2, 3), 7.0)
    for bad in (-1, 2):
        neuron = torch.tensor([0, bad])
        with pytest.raises(IndexError, match="neuron index"):
            _C.semhash_forward(logits, neuron, None, None, gate, 1)
        with pytest.raises(IndexError, match="neuron index"):
            _C.semhash_backward(logits, logits, neuron, None, gate, 1)
    assert (gate == 7).all()
