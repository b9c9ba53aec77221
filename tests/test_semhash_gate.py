"""``SemHashGate`` on every target: the formulas in float64, what it draws, shapes, autocast, compilation, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dsts_kernels import SemHashGate
from dsts_kernels.testing import assert_close

from .support.oracles import literal_semhash, literal_semhash_gradient, soft
from .support.targets import Target, dtypes

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [
    pytest.param((4, 6), 1, id="channels"),
    pytest.param((5, 3, 2, 2, 2), 1, id="features"),
    pytest.param((2, 3, 5), 2, id="codes"),
    pytest.param((2, 3, 5), -1, id="all-but-the-last"),
    pytest.param((7,), 0, id="one-sample"),
    pytest.param((0, 4), 1, id="empty-batch"),
]


def inputs(target: Target, shape: tuple[int, ...], dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, noise and hard samples; nothing within rounding of where a soft gate saturates and its gradient jumps."""
    logits, noise = target.randn(*shape, dtype=dtype, scale=2), target.randn(*shape, dtype=dtype)
    near = ((logits.double() + noise.double()).abs() - math.log(11)).abs() < 1e-3
    hard = torch.rand(shape[: len(shape) - 1 if dims == -1 else dims], device=target.device) < 0.5
    return logits.requires_grad_(), torch.where(near, noise + 0.125, noise), hard


def rows(tensor: Tensor, hard: Tensor) -> Tensor:
    """``(samples, what each holds)``."""
    return tensor.detach().reshape(hard.numel(), math.prod(tensor.shape[hard.dim() :]))


@dtypes
@pytest.mark.parametrize("shape, dims", SHAPES)
def test_formulas(target, shape, dims, dtype):
    """Values and the straight-through gradient, with draws as given, in training."""
    logits, noise, hard = inputs(target, shape, dims, dtype)
    gate = SemHashGate(sample_dims=dims, backend=target.backend)(logits, noise, hard)
    assert gate.dtype == dtype and gate.shape == logits.shape
    wanted = literal_semhash(rows(logits, hard), None, rows(noise, hard), hard.reshape(-1))
    assert_close(rows(gate, hard), wanted)
    assert set(gate[hard].unique().tolist()) <= {0, 1}
    grad = target.randn(*shape, dtype=dtype)
    (found,) = torch.autograd.grad(gate, logits, grad)
    wanted = literal_semhash_gradient(rows(grad, hard), rows(logits, hard), None, rows(noise, hard))
    assert_close(rows(found, hard), wanted, dtype=dtype, factor=2)


@dtypes
def test_evaluation(target, dtype):
    """Hard for all, the same every time, whatever is given; with and without a gradient, which is straight through."""
    gate = SemHashGate(5, backend=target.backend).eval()
    logits, noise, hard = inputs(target, (3, 5, 2), 1, dtype)
    logits = torch.where((logits.detach().abs() - math.log(11)).abs() < 1e-2, logits.detach() + 0.25, logits.detach())
    logits[0, 0], logits[0, 1, 0] = 0, torch.nan
    before = torch.get_rng_state()
    plain = gate(logits)
    assert torch.equal(torch.get_rng_state(), before) and plain.dtype == dtype
    assert torch.equal(plain, (logits > 0).to(dtype))
    logits = logits.nan_to_num(1.0).requires_grad_()
    seen = gate(logits, noise, hard)
    assert torch.equal(seen.detach()[1:], plain[1:]) and seen.detach().unique().tolist() in ([0, 1], [0], [1])
    grad = target.randn(3, 5, 2, dtype=dtype)
    (found,) = torch.autograd.grad(seen, logits, grad)
    wanted = literal_semhash_gradient(rows(grad, hard), rows(logits, hard), None, None)
    assert_close(rows(found, hard), wanted, dtype=dtype, factor=2)


@pytest.mark.parametrize("fraction, samples", [(0.5, 8), (0.5, 7), (0.25, 8), (0.3, 10), (0.0, 6), (1.0, 6), (0.5, 1)])
def test_share_of_hard_samples(fraction, samples):
    """Exactly so many, what is left over by a coin; each sample is hard or soft as a whole, each one in turn."""
    gate = SemHashGate(noise_std=0.0, hard_fraction=fraction)
    gates = torch.stack([gate(torch.full((samples, 3, 2), 0.5)) for _ in range(200)])
    hard = (gates == 1).all(-1).all(-1)  # a soft gate of these logits is 0.65
    assert torch.equal(hard | ((gates - soft(torch.tensor(0.5))).abs() < 1e-6).all(-1).all(-1), torch.ones_like(hard))
    low = math.floor(round(fraction * samples, 9))
    high = math.ceil(round(fraction * samples, 9))
    counts = hard.sum(1).tolist()
    assert set(counts) == {low, high}
    if low < high:
        share = counts.count(high) / len(counts)
        assert abs(share - (fraction * samples - low)) < 6 * (0.25 / len(counts)) ** 0.5
    if 0 < fraction < 1:
        assert hard.any(0).all() and not hard.all(0).any()


def test_codes_are_hard_one_by_one():
    """With two dimensions of samples some codes of an item are hard and others soft."""
    hard = SemHashGate(sample_dims=2, noise_std=0.0)(torch.full((4, 64, 3), 0.5)) == 1
    assert torch.equal(hard.any(-1), hard.all(-1)) and hard.any(-1).sum() == 128
    assert 0 < hard[0].sum() < hard[0].numel()


@pytest.mark.parametrize("std", [0.0, 0.25, 0.5])
def test_noise(std):
    """Its mean and deviation; soft gates of logits near 0 show it."""
    gate = SemHashGate(noise_std=std, hard_fraction=0.0)
    soft_gate = gate(torch.zeros(64, 256, dtype=torch.float64))
    noise = torch.logit((soft_gate.clamp(1e-9, 1 - 1e-9) + 0.1) / 1.2)
    count = noise.numel()
    assert abs(noise.mean().item()) <= 6 * std / count**0.5 + 1e-12
    assert abs(noise.std().item() - std) <= 6 * std / (2 * count) ** 0.5 + 1e-12


def test_generator(target):
    """The same generator, the same bits; torch's own one is not touched. Without one it is what a seed repeats."""
    gate = SemHashGate(6, backend=target.backend)
    logits = target.randn(5, 6)
    before = torch.get_rng_state()
    first, second, other = (
        gate(logits, generator=torch.Generator(target.device).manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.manual_seed(8)
    first = gate(logits)
    torch.manual_seed(8)
    assert torch.equal(gate(logits), first)


def test_a_copy_and_its_options():
    """Copies draw as it does; options are attributes that may change between steps."""
    gate = SemHashGate(2, noise_std=0.0)
    assert not list(gate.parameters()) and not gate.state_dict()
    logits = torch.full((4, 2), 0.5)
    copied = copy.deepcopy(gate)
    copied.hard_fraction = 1.0
    assert (copied(logits) == 1).all() and (gate(logits) == 1).sum() == 4
    assert repr(copied) == "SemHashGate(2, sample_dims=1, noise_std=0.0, hard_fraction=1.0)"


def test_gradcheck(backend):
    """On the soft path finite differences agree."""
    gate = SemHashGate(sample_dims=2, backend=backend)
    logits = torch.empty(2, 3, 4, dtype=torch.float64).uniform_(-1.5, 1.5).requires_grad_()
    noise = torch.empty_like(logits).uniform_(-0.5, 0.5)
    closed = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda q: gate(q, noise, closed), (logits,))


def test_nan_stays_in_its_sample(target):
    """NaN logits in one sample reach no other one's gate or gradient."""
    logits = target.randn(3, 20)
    logits[1] = torch.nan
    closed = torch.zeros(3, dtype=torch.bool, device=target.device)
    gate = SemHashGate(backend=target.backend)(logits.requires_grad_(), None, closed)
    (gradient,) = torch.autograd.grad(gate.sum(), logits)
    assert gate[[0, 2]].isfinite().all() and gate[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_strided(target):
    """Features whose channels lie last, and transposed codes."""
    logits, noise, hard = inputs(target, (3, 8, 2, 2, 2), 1, target.dtype)
    last = logits.detach().contiguous(memory_format=torch.channels_last_3d)
    gate = SemHashGate(8, backend=target.backend)
    assert torch.equal(gate(last, noise, hard), gate(logits.detach(), noise, hard))
    crossed = target.randn(6, 4).t()
    gate = SemHashGate(6, hard_fraction=0.0, noise_std=0.0, backend=target.backend)
    assert_close(gate(crossed), soft(crossed.double()))
    assert torch.equal(gate.eval()(crossed), (crossed > 0).to(crossed.dtype))


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    """Behind a layer that autocast turns to bfloat16: gates in bfloat16, gradients for float32 weights."""
    model = nn.Sequential(nn.Linear(4, 8), SemHashGate(8)).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        gate = model(torch.randn(6, 4))
        loss = (gate * torch.randn(6, 8)).sum()
    loss.backward()
    assert gate.dtype == torch.bfloat16
    assert model[0].weight.grad.dtype == torch.float32 and model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_compiled(training, grad):
    """One graph for several batches, with draws given and drawn; the gradient, too."""
    torch._dynamo.reset()
    gate = SemHashGate(6).train(training)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for batch in (4, 5, 7):
        logits = torch.randn(batch, 6, requires_grad=grad)
        noise, hard = torch.randn(batch, 6), torch.rand(batch) < 0.5
        found, wanted = compiled(logits, noise, hard), gate(logits, noise, hard)
        assert_close(found, wanted)
        if grad:
            (mine,), (theirs,) = (torch.autograd.grad(y.sum(), logits) for y in (found, wanted))
            assert_close(mine, theirs)
        drawn = compiled(logits)
        whole = ((drawn == 0) | (drawn == 1)).all(1).sum()
        assert drawn.shape == logits.shape and whole >= (batch // 2 if training else batch)


def test_exported():
    """Evaluation without a gradient is plain torch, which every exporter knows."""
    logits = torch.randn(3, 6)
    gate = SemHashGate(6).eval()
    with torch.no_grad():
        program = torch.export.export(gate, (logits,))
    assert not [node for node in program.graph.nodes if "dsts_kernels" in str(node.target)]
    assert torch.equal(program.module()(logits), gate(logits))


BAD = {
    "channels-type": (dict(channels=2.0), TypeError, "channels: got float 2.0, wanted an int of at least 1"),
    "channels": (dict(channels=0), ValueError, "channels: got 0, wanted at least 1"),
    "sample_dims": (dict(sample_dims=-2), ValueError, "sample_dims: got -2, wanted at least -1"),
    "noise_std": (dict(noise_std=-1.0), ValueError, "noise_std: got -1.0, wanted a finite number at least 0"),
    "hard_fraction": (dict(hard_fraction=1.5), ValueError, "hard_fraction: got 1.5, wanted .* at most 1"),
    "backend": (dict(backend="none-such"), ValueError, "backend: got 'none-such', wanted None or"),
}


@pytest.mark.parametrize("options, error, message", BAD.values(), ids=BAD)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        SemHashGate(**options)


FLAT = torch.zeros(2, 3)
BAD_INPUT = {
    "logits-type": (dict(logits=[1.0]), TypeError, "logits: got list"),
    "logits-dtype": (dict(logits=FLAT.long()), TypeError, "logits: got a tensor of shape .* wanted a dense tensor in"),
    "logits-dims": (dict(logits=torch.zeros(3)), ValueError, "logits: .* wanted 2 dimensions or more: sample_dims"),
    "logits-channels": (dict(logits=torch.zeros(2, 4)), ValueError, "logits: .* wanted 3 channels in dimension 1"),
    "noise": (dict(noise=torch.zeros(2, 4)), ValueError, r"noise: .* wanted shape \(2, 3\)"),
    "noise-dtype": (dict(noise=FLAT.long()), TypeError, "noise: .* wanted torch.float"),
    "hard": (dict(hard=torch.zeros(3, dtype=torch.bool)), ValueError, r"hard: .* wanted shape \(2,\)"),
    "hard-dtype": (dict(hard=torch.zeros(2)), TypeError, "hard: .* wanted torch.bool"),
    "generator": (dict(generator=7), TypeError, "generator: got int 7, wanted a torch.Generator"),
    "noise-device": (dict(noise=FLAT.to("meta")), ValueError, "noise: got a tensor on meta, wanted cpu"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change, error, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(change, error, message, training):
    """Named in evaluation, too, where draws are not used."""
    with pytest.raises(error, match=message):
        SemHashGate(3).train(training)(**(dict(logits=FLAT) | change))


def test_not_scripted():
    with pytest.raises(RuntimeError, match=r"torch.jit.script: got SemHashGate"):
        torch.jit.script(SemHashGate())
