"""The choice in one launch, and its gradients in one: the results of the single ops, whoever needs which of them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsts_kernels import ops
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from ...support.profiling import profile
from .support import interpreted, launch, spy_on

pytestmark = [interpreted, pytest.mark.usefixtures("poison")]
INPUTS = ("x", "scoring", "logits")


def inputs(batch: int, channels: int, neurons: int, kernel: tuple[int, int, int], dtype: torch.dtype) -> dict:
    """Scores of size one, so that no softmax saturates."""
    x = torch.randn(batch, channels, 2, 3, 4)
    scoring = torch.randn(neurons, 5, channels, *kernel) / (24 * channels) ** 0.5
    return dict(x=x.to(dtype), scoring=scoring.to(dtype), logits=torch.randn(neurons, channels).to(dtype))


def routed(tensors: dict, options: dict, needs: tuple[str, ...], fused: bool) -> list[torch.Tensor | None]:
    """Results, and the gradients of those inputs that need one."""
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in tensors.items()}
    with switched(fuse_routing=fused):
        found = ops.route(**leaves, **options, share=True, backend="triton")
    outputs = [t for t in (found.scores, found.gate, found.share) if t is not None and t.requires_grad]
    loss = sum((y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in needs]) if needs else []
    assert (found.share is None) == (not {"x", "scoring"} & set(needs))
    return [*found, *gradients]


@pytest.mark.parametrize(
    "batch, channels, neurons, kernel, reduction, drawn, dtype",
    [
        (1, 1, 1, (1, 1, 1), "sum", False, torch.float32),
        (4, 20, 3, (1, 1, 1), "sum", True, torch.float16),
        (3, 70, 10, (1, 3, 3), "mean", True, torch.float32),
        (17, 6, 17, (1, 1, 1), "mean", False, torch.float32),
    ],
)
def test_fused_is_composed(batch, channels, neurons, kernel, reduction, drawn, dtype, monkeypatch):
    """Neurons, scores, gates, shares and all gradients, of each set of inputs that may train."""
    tensors = inputs(batch, channels, neurons, kernel, dtype)
    draws = sample_draws(batch, channels, neurons, 1)
    options = dict(noise=draws.noise[0], hard=draws.hard[0], gumbel=draws.gumbel[0], tau=0.7) if drawn else {}
    options["reduction"] = reduction
    for needs in ((), INPUTS, ("x",), ("scoring",), ("logits",)):
        spies = [spy_on(monkeypatch, "route_kernel"), spy_on(monkeypatch, "semhash_kernel")]
        mine, theirs = (routed(tensors, options, needs, fused) for fused in (True, False))
        assert [len(spy.launches) for spy in spies] == [1, 1]
        monkeypatch.undo()
        assert torch.equal(mine[0], theirs[0])
        for found, wanted in zip(mine[1:], theirs[1:], strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                assert found.dtype == wanted.dtype and found.shape == wanted.shape
                assert_close(found, wanted, factor=4)


def test_noise_is_rounded_as_the_ops_do():
    """Draws are float32 beside half logits: unrounded, hard gates at 0 would be 1."""
    tensors, found = inputs(2, 20, 3, (1, 1, 1), torch.float16), []
    tensors["logits"] = torch.linspace(-2, -1, 20).half().expand(3, 20).contiguous()
    noise = 1e-5 - tensors["logits"][:2].float()
    for fused in (True, False):
        leaves = {name: t.detach().requires_grad_(name == "logits") for name, t in tensors.items()}
        with switched(fuse_routing=fused):
            gate = ops.route(**leaves, noise=noise, backend="triton").gate
        found.append((gate.detach(), *torch.autograd.grad(gate.sum(), leaves["logits"])))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    assert not found[0][0].any()


def test_gradients_of_some_results():
    """Of scores alone, gates alone, shares alone: what nobody used has none, as an optimizer's decay must know."""
    tensors = inputs(4, 20, 3, (1, 1, 1), torch.float32)
    draws = sample_draws(4, 20, 3, 1)
    options = dict(noise=draws.noise[0], hard=draws.hard[0], gumbel=draws.gumbel[0], backend="triton", share=True)
    for which in ("scores", "gate", "share"):
        found = []
        for fused in (True, False):
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            with switched(fuse_routing=fused):
                y = getattr(ops.route(**leaves, **options), which)
            loss = (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()
            found.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
        for mine, theirs in zip(*found, strict=True):
            assert (mine is None) == (theirs is None), which
            if mine is not None:
                assert_close(mine, theirs, factor=4)


def test_second_derivatives():
    """Those of the single ops, where they have one."""
    tensors = inputs(4, 20, 3, (1, 1, 1), torch.float32)
    gumbel, found = sample_draws(4, 20, 3, 1).gumbel[0], []
    for fused in (True, False):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        with switched(fuse_routing=fused):
            share = ops.route(**leaves, gumbel=gumbel, backend="triton", share=True).share
            (dscoring,) = torch.autograd.grad(share.square().sum(), leaves["scoring"], create_graph=True)
            found.append(torch.autograd.grad(dscoring.square().sum(), [leaves["x"], leaves["scoring"]]))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, factor=10)


def test_nan_stays_in_its_sample():
    tensors = inputs(4, 20, 3, (1, 1, 1), torch.float32)
    tensors["x"][1, 3, 0, 0, 0] = torch.nan
    found = ops.route(**tensors, backend="triton")
    assert found.scores[1].isnan().all() and not found.scores[[0, 2, 3]].isnan().any()
    assert int(found.neuron[1]) == 0 and found.gate.isfinite().all()


def test_whoever_listens_sees_the_ops(monkeypatch):
    """A mode sees the single ops; the profiler sees what runs without it."""
    tensors, spy = inputs(4, 20, 3, (1, 1, 1), torch.float32), spy_on(monkeypatch, "route_kernel")
    with profile():
        ops.route(**tensors, backend="triton")
    assert len(spy.launches) == 1
    with FlopCounterMode(display=False):
        ops.route(**tensors, backend="triton")
    assert len(spy.launches) == 1


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(scoring=torch.zeros(3, 5, 19, 1, 1, 1)), ValueError, r"scoring: got .*, wanted \(N, K, 20, 1, 1, 1\)"),
        (dict(noise=torch.zeros(4, 19)), ValueError, r"noise: got .*, wanted shape \(4, 20\)"),
        (dict(hard=torch.zeros(3, dtype=torch.bool)), ValueError, r"hard: got .*, wanted shape \(4,\)"),
        (dict(gumbel=torch.zeros(4, 4)), ValueError, r"gumbel: got .*, wanted shape \(4, 3\)"),
        (dict(reduction="max"), ValueError, "reduction: got 'max', wanted 'sum' or 'mean'"),
    ],
    ids=["scoring", "noise", "hard", "gumbel", "reduction"],
)
def test_bad_arguments(change, error, match):
    """Refused before any kernel runs, by the ops' own errors."""
    with pytest.raises(error, match=match):
        ops.route(**inputs(4, 20, 3, (1, 1, 1), torch.float32) | change, backend="triton")


def test_choices_that_are_large():
    """Too many for one launch: neurons for a thread's registers, or samples one after the other."""
    from dsts_kernels.backends import BACKENDS

    fits = BACKENDS["triton"].fuses_routing
    assert fits(16, 256) and fits(409, 10) and not fits(1, 257) and not fits(410, 10)


def test_counters_are_zero_again(monkeypatch):
    """Convolutions leave their counters as they found them, so that the next one fills none."""
    from dsts_kernels.ops import mixing_conv3d

    monkeypatch.setattr(launch, "_counters", {})
    z, neuron, mixing = torch.randn(3, 40, 3, 5, 4), torch.tensor([1, 0, 1]), torch.randn(2, 40, 40, 1, 3, 3)
    first = mixing_conv3d(z, neuron, mixing, backend="triton")
    (kept,) = launch._counters.values()
    assert kept.numel() and not kept.any()
    assert torch.equal(mixing_conv3d(z, neuron, mixing, backend="triton"), first)
    assert next(iter(launch._counters.values())) is kept and not kept.any()
    with switched(keep_counters=False):
        assert launch.zeroed(4, z.device) is not launch.zeroed(4, z.device)
        assert torch.equal(mixing_conv3d(z, neuron, mixing, backend="triton"), first)


def test_counters_of_the_default_stream_alone(monkeypatch):
    """On another stream somebody may be warming up for a graph: nothing that is made there outlives its launch."""
    device, stream = torch.device("cuda", 0), [0]
    plain = torch.zeros
    monkeypatch.setattr(launch, "_counters", {})
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **kwargs: plain(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False)
    assert launch.zeroed(9, device) is launch.zeroed(9, device)
    kept = dict(launch._counters)
    stream[0] = 77
    assert launch.zeroed(9, device) is not launch.zeroed(9, device)
    assert launch._counters == kept


def test_measured_by_size(monkeypatch):
    """The choice in one launch is asked for at the features' size: where plain PyTorch was faster, it is not taken."""
    module, asked = importlib.import_module("dsts_kernels.ops.route"), []
    original = module.choose
    monkeypatch.setattr(module, "choose", lambda *args: asked.append(args[4:]) or original(*args))
    ops.route(**inputs(4, 20, 3, (1, 1, 1), torch.float32), backend="triton")
    assert asked == [(torch.Size((4, 20, 2, 3, 4)),)]
