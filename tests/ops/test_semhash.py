"""SemHash gates on every target: values, the straight-through gradient against its formula, samples that stay apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsts_kernels.functional import saturating_sigmoid, semhash_gate
from dsts_kernels.ops.semhash import backward_op, gate_op
from dsts_kernels.testing import assert_close

from ..support.checks import assert_same_bits, opcheck, opchecked
from ..support.inputs import every_second
from ..support.oracles import literal_semhash, literal_semhash_gradient, soft
from ..support.targets import Target, dtypes, large
from .stated import HERE, NEURON, SOFT, Dispatch

pytestmark = pytest.mark.usefixtures("poison")

DISPATCH = {
    "semhash_gate": Dispatch(
        ("logits", "noise"),
        lambda logits, noise: semhash_gate(logits, noise, SOFT, neuron=NEURON),
        lambda logits, noise: soft(logits[NEURON] + noise.detach()),
        differentiable=("logits",),  # noise gets no gradient
    ),
    "saturating_sigmoid": Dispatch(("logits",), saturating_sigmoid, soft, op="semhash_gate"),
}
NATIVE = {
    "semhash": dict(
        grad=HERE, logits=HERE, noise=0, neuron=0, hard=0, out=HERE, batch=1, neurons=1, channels=1, backward=True,
        dtype=0,
    )
}  # fmt: skip

SIZES = [
    pytest.param(4, 5, 1, id="one-channel"),
    pytest.param(4, 5, 70, id="ragged"),
    pytest.param(4, 5, 1100, id="several-blocks"),
    *(
        pytest.param(*size, id=name, marks=large)
        for name, size in {
            "paper": (8, 10, 1024),
            "batch-32": (32, 10, 100),
            "one": (1, 1, 1),
            "empty-batch": (0, 3, 8),
            "many-channels": (3, 2, 70_001),
        }.items()
    ),
]


def sample_inputs(target: Target, b: int, n: int, c: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Logits, neuron, noise, hard; none within rounding of where a soft gate saturates and its gradient jumps."""
    neuron = torch.randint(n, (b,), device=target.device)
    hard = torch.rand(b, device=target.device) < 0.5
    logits, noise = target.randn(n, c, dtype=dtype, scale=2), target.randn(b, c, dtype=dtype)
    near = ((logits[neuron].double() + noise.double()).abs() - math.log(11)).abs() < 1e-3
    return [logits, neuron, torch.where(near, noise + 0.125, noise), hard]


def run(
    target: Target,
    logits: Tensor,
    neuron: Tensor | None = None,
    noise: Tensor | None = None,
    hard: Tensor | None = None,
) -> Tensor:
    return semhash_gate(logits, noise, hard, neuron=neuron, backend=target.backend)


@dtypes
@pytest.mark.parametrize("b, n, c", SIZES)
def test_values_and_gradient(target, b, n, c, dtype):
    """Hard, soft and mixed batches; hard and soft samples get the same gradient, added into their neurons' rows."""
    logits, neuron, noise, hard = sample_inputs(target, b, n, c, dtype)
    for is_hard in (hard, ~hard):
        gate = run(target, logits.requires_grad_(), neuron, noise, is_hard)
        assert gate.dtype == dtype
        wanted = literal_semhash(logits.detach(), neuron, noise, is_hard)
        assert_close(gate, wanted)
        assert torch.equal(gate[is_hard].double(), wanted[is_hard])
    grad = target.randn(b, c, dtype=dtype)
    (gradient,) = torch.autograd.grad(gate, logits, grad)
    assert gradient.dtype == dtype
    assert_close(gradient, literal_semhash_gradient(grad, logits.detach(), neuron, noise), dtype=dtype, factor=2)
    unrouted = torch.ones(n, dtype=torch.bool, device=target.device).index_fill_(0, neuron, False)
    assert gradient[unrouted].count_nonzero() == 0


@dtypes
@pytest.mark.parametrize("c", [1, 70, 1100])
def test_without_neuron_noise_or_hard(target, c, dtype):
    """What is left out: rows as they are, no noise, every sample hard; and the gradients without."""
    logits, neuron, *_ = sample_inputs(target, 4, 5, c, dtype)
    logits = torch.where((logits.abs() - math.log(11)).abs() < 1e-2, logits + 0.25, logits)
    closed = torch.zeros(5, dtype=torch.bool, device=target.device)
    assert_close(run(target, logits, neuron), literal_semhash(logits, neuron, None, None))
    assert_close(run(target, logits, None, None, closed), literal_semhash(logits, None, None, closed))
    grad = target.randn(4, c, dtype=dtype)
    for rows, chosen in ((logits[:4], None), (logits, neuron)):
        ours = backward_op(grad, rows, chosen, None, target.backend)
        assert_close(ours, literal_semhash_gradient(grad, rows, chosen, None), dtype=dtype, factor=2)


@dtypes
def test_evaluation_is_hard_and_zero_is_closed(target, dtype):
    """Without noise and ``hard`` every gate is hard, and ``q == 0`` gives 0."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, 2**-14, 5.0]], device=target.device).to(dtype)
    assert run(target, logits).tolist() == [[0, 0, 0, 1, 1]]


def test_saturation_is_exact(target):
    """Far logits give exactly 0 and 1, in a tensor of any shape: only then do channels leave an operator's list."""
    far = torch.tensor([[-3.0, 3.0], [-200.0, 200.0]], device=target.device)
    assert saturating_sigmoid(far, backend=target.backend).tolist() == [[0, 1], [0, 1]]
    x = target.randn(3, 5, 4, 7)
    assert_close(saturating_sigmoid(x, backend=target.backend), soft(x.double()))


def test_strided_operands(target):
    """Transposed logits, and slices of everything, are read through their strides."""
    logits, neuron, noise, hard = sample_inputs(target, 4, 5, 20)
    transposed = target.randn(20, 8).t()[::2]
    closed = torch.zeros(4, dtype=torch.bool, device=target.device)
    assert_close(run(target, transposed, None, None, closed), soft(transposed.double()))
    strided = [every_second(logits), every_second(neuron), every_second(noise)]
    hard = torch.stack((hard, ~hard), 1)[:, 0]
    assert_close(run(target, *strided, hard), literal_semhash(*strided, hard))
    grad = every_second(target.randn(4, 20))
    ours = backward_op(grad, *strided, target.backend)
    assert_close(ours, literal_semhash_gradient(grad, *strided), factor=2)


def test_a_neuron_out_of_range(gpu_target):
    """It gives NaN for its sample, hard or soft, and no gradient."""
    logits, _, noise, hard = sample_inputs(gpu_target, 3, 5, 20, torch.float32)
    far = torch.tensor([0, 5, -1], device=gpu_target.device)
    for is_hard in (None, hard, ~hard):
        gate = run(gpu_target, logits, far, noise, is_hard)
        assert gate[0].isfinite().all() and gate[1:].isnan().all()
    grad = gpu_target.randn(3, 20, dtype=torch.float32)
    ours = backward_op(grad, logits, far, noise, gpu_target.backend)
    assert_close(ours, literal_semhash_gradient(grad[:1], logits, far[:1], noise[:1]), dtype=torch.float32, factor=2)


def test_nan_stays_in_its_sample(target):
    """NaN noise in one sample reaches neither another gate nor another neuron's gradient."""
    logits, _, noise, _ = sample_inputs(target, 3, 3, 90)
    noise[1] = torch.nan
    closed = torch.zeros(3, dtype=torch.bool, device=target.device)
    gate = run(target, logits.requires_grad_(), torch.arange(3, device=target.device), noise, closed)
    (gradient,) = torch.autograd.grad(gate.sum(), logits)
    assert gate[[0, 2]].isfinite().all() and gate[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_an_empty_batch(target):
    """No samples: no gates, and a gradient of zero."""
    logits, neuron = target.randn(3, 6).requires_grad_(), torch.zeros(0, dtype=torch.int64, device=target.device)
    gate = run(target, logits, neuron)
    assert gate.shape == (0, 6)
    assert torch.autograd.grad(gate.sum(), logits)[0].count_nonzero() == 0


def test_gradient_repeats_bit_for_bit(target, in_any_order):
    """Many samples add into one neuron's row in a fixed order."""
    b, c = (6, 40) if target.stand_in else (32, 1000)
    logits, _, noise, _ = sample_inputs(target, b, 3, c)
    neuron, grad, runs = torch.ones(b, dtype=torch.int64, device=target.device), target.randn(b, c), []
    for again in range(2 if target.stand_in else 5):
        if again:
            in_any_order()
        runs.append([backward_op(grad, logits, neuron, noise, target.backend)])
    assert_same_bits(runs)


def test_opcheck(target):
    """Schema, fakes and dispatch of both ops."""
    dtype, _ = opchecked(target)
    logits, neuron, noise, hard = sample_inputs(target, 4, 3, 6, dtype)
    grad = target.randn(4, 6, dtype=dtype)
    opcheck(target, gate_op, logits, neuron, noise, hard)
    opcheck(target, gate_op, logits, None, None, None)
    opcheck(target, backward_op, grad, logits, neuron, noise)
    opcheck(target, backward_op, grad, logits, neuron, None)


def test_gradcheck_soft(backend):
    """On the soft path finite differences agree."""
    logits = torch.empty(3, 7, dtype=torch.float64).uniform_(-2, 2).requires_grad_()
    hard = torch.zeros(3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda g: semhash_gate(g, None, hard, backend=backend), (logits,))
    assert torch.autograd.gradcheck(lambda g: saturating_sigmoid(g, backend=backend), (logits,))


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
