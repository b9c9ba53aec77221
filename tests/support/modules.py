"""Modules in pairs, the literal one in float64 beside ours, on inputs whose routes no rounding changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.margins import separate_draws, separate_features
from dsts_kernels import Draws, FusedDSTS, Routing, reference
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from .inputs import Device, drawn_in
from .oracles import products

POSITIONS = 100  # of a small sample, roughly
RELU_GRADIENTS = {torch.float64: 10, torch.float32: 2000, torch.float16: 40, torch.bfloat16: 10}
"""Factors on the tolerance of gradients behind a ReLU: an activation within rounding of zero falls on either side of
it, and each that does moves a whole element (see ``benchmarks/parity.py``)."""


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Gates, scores and statistics that leave nothing trivial."""
    for layer in module.layers:
        layer.gate.normal_()
        summed = layer.scoring.shape[1] * POSITIONS if layer.score_reduction == "sum" else 1
        layer.scoring.mul_(8 / summed)  # scores of size one: a softmax that saturates leaves no gradient
        if layer.score_center:
            layer.center.normal_()
        if layer.norm is not None:
            layer.norm.running_mean.normal_(std=0.2)
            layer.norm.running_var.uniform_(0.1, 0.4)
            layer.norm.weight.uniform_(0.5, 1.5)
            layer.norm.bias.normal_(std=0.3)


def pair(
    channels: int = 12,
    dtype: torch.dtype = torch.float64,
    backend: str | None = None,
    device: Device = "cpu",
    **options,
) -> tuple[reference.DSTS, FusedDSTS]:
    """A reference in float64 and a module in ``dtype`` with the same, rounded weights; ``None`` lets it choose."""
    options = dict(num_neurons=3) | options
    ref = reference.DSTS(channels, dtype=torch.float64, device=device, **options)
    fused = FusedDSTS(channels, dtype=dtype, device=device, backend=backend, **options)
    enliven(ref)
    fused.load_state_dict(ref.state_dict())
    ref.load_state_dict(fused.state_dict())
    return ref, fused


@contextlib.contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics are afterwards what they were before."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])


def draws_for(
    ref: reference.DSTS, x: Tensor, dtype: torch.dtype, hard_fraction: float = 0.5, noise_std: float = 1.0
) -> Draws:
    """Draws that any dtype holds exactly and that leave no scores of the reference nearly tied."""
    draws = sample_draws(
        *x.shape[:2],
        ref.layers[0].gate.shape[0],
        len(ref.layers),
        noise_std=noise_std,
        hard_fraction=hard_fraction,
        dtype=drawn_in(dtype),
        device=x.device,
    )
    draws = draws._replace(noise=draws.noise.to(dtype).to(draws.noise.dtype))

    def routing(draws: Draws) -> Routing:
        with torch.no_grad(), products(), kept_statistics(ref.train()):
            return ref(x.double(), wide_draws(draws), return_routing=True)[1]

    return separate_draws(routing, draws)


def wide_draws(draws: Draws) -> Draws:
    return Draws(draws.noise.double(), draws.hard, draws.gumbel.double())


def features_for(ref: reference.DSTS, x: Tensor) -> Tensor:
    """``x`` on which no scores of the reference are nearly tied in evaluation."""

    def routing(x: Tensor) -> Routing:
        with torch.no_grad(), products():
            return ref.eval()(x.double(), return_routing=True)[1]

    return separate_features(routing, x)


def training_step(
    module: nn.Module, x: Tensor, draws: Draws, grad: Tensor
) -> tuple[Tensor, Routing, dict[str, Tensor]]:
    """Output, routing and every gradient by name, ``"x"`` that of the input."""
    leaf = x.detach().requires_grad_()
    y, routing = module(leaf, draws, return_routing=True)
    trained = {"x": leaf} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, list(trained.values()), grad.to(y.dtype))
    return y.detach(), routing, dict(zip(trained, gradients, strict=True))


def reference_step(
    ref: reference.DSTS, x: Tensor, draws: Draws, grad: Tensor
) -> tuple[Tensor, Routing, dict[str, Tensor]]:
    """:func:`training_step` of the reference in float64; its running statistics move on."""
    with products():
        return training_step(ref.train(), x.double(), wide_draws(draws), grad.double())


def reference_output(ref: reference.DSTS, x: Tensor) -> tuple[Tensor, Routing]:
    """Evaluation of the reference in float64."""
    with torch.no_grad(), products():
        return ref.eval()(x.double(), return_routing=True)


def assert_same_routing(ours: Routing, theirs: Routing, dtype: torch.dtype) -> None:
    """The same neurons; gates within the tolerance, scores within that of their largest."""
    assert torch.equal(ours.neuron, theirs.neuron)
    assert ours.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(ours.scores, theirs.scores, dtype=dtype, name="scores", factor=2)
    assert_close(ours.gate, theirs.gate, dtype=dtype, name="gate")


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype, factor: float, leave_out: str = "nothing"
) -> None:
    """Every gradient by name. Norms are taken on the device, for a stack of gradients is gigabytes: what
    ``assert_close`` sees is ``||ref|| + ||out - ref||`` beside ``||ref||``, which is the same relative error."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if leave_out not in name:
            out, ref = ours[name], theirs[name].double()
            assert out.shape == ref.shape, name
            size = ref.norm()[None]
            error = (out.double() - ref).norm()[None]
            assert_close(size + error, size, dtype=dtype, name=f"gradient of {name}", factor=factor)


def assert_same_statistics(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, factor: float = 2) -> None:
    """Running statistics by name."""
    for (name, one), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_close(one.double(), other.double(), dtype=dtype, name=name, factor=factor)
