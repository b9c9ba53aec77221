"""The rows of the table: one module with known weights, and every implementation of it on those same weights.

:func:`make_reference` builds the literal module once; :func:`build` puts another implementation on its
parameters without copying them (only BatchNorm's running statistics are copied, since a training step changes
them). The folded rows necessarily hold packed weights of their own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.shapes import Problem
from dsts_kernels.bench.handwritten import HandwrittenEval, HandwrittenTrain, lazy_zeros
from dsts_kernels.reference import DSTS, Draws

__all__ = [
    "COMPILE_LIMIT_S",
    "FORCED",
    "VARIANTS",
    "build",
    "make_draws",
    "make_reference",
    "restore_statistics",
    "time_limit",
    "training_step",
]

VARIANTS = {
    "evaluation": ("literal", "compiled", "handwritten", "fused", "frozen"),
    "training": ("literal", "compiled", "handwritten", "fused"),
}
"""Rows by mode. In half types on a CPU ours come again with a way that is forced: see :data:`FORCED`."""
FORCED = {
    mode: tuple(f"{ours} {way}" for ours in ("fused", "frozen") if ours in variants for way in ("direct", "winograd"))
    for mode, variants in VARIANTS.items()
}
COMPILE_LIMIT_S = 60
SEED = 2022
TYPICAL_POSITIONS = 1024


@torch.no_grad()
def make_reference(problem: Problem, dtype: torch.dtype, device: torch.device, lazy: bool = False) -> DSTS:
    """The literal module with seeded weights that leave nothing trivial.

    Convolutions start as torch starts them. Gates are drawn from ``N(0, 1)``, so about half of each neuron's
    channels are spatial; BatchNorm gets random scales, shifts and running statistics of the size that the
    random operators produce; scoring kernels are scaled so that scores differ by about one, as Gumbel draws
    do, and the router's gradient does not vanish.
    lazy: convolutions of zeros that take no memory until written, for the memory measurements.
    """
    torch.manual_seed(SEED)
    options = dict(num_layers=problem.layers, num_neurons=problem.neurons, dtype=dtype)
    if lazy:
        reference = DSTS(problem.channels, **options, device="meta")
        state = {name: lazy_zeros(value, device) for name, value in reference.state_dict().items()}
        reference.load_state_dict(state, assign=True)
    else:
        reference = DSTS(problem.channels, **options, device=device)
    for layer in reference.layers:
        layer.gate.normal_()
        if not lazy:
            layer.scoring.mul_(4 / (TYPICAL_POSITIONS * math.sqrt(problem.channels)))
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.norm.bias.normal_(std=0.1)
        layer.norm.running_mean.normal_(std=0.05)
        layer.norm.running_var.uniform_(0.02, 0.08)
    return reference


def make_draws(problem: Problem, device: torch.device, dtype: torch.dtype) -> Draws:
    """Seeded draws for a training step. Soft and hard samples alternate along layers and batch, soft first:
    exactly half are hard in an even batch, one layer in three with one sample and three layers (the slower
    case)."""
    generator = torch.Generator().manual_seed(SEED)
    size = (problem.layers, problem.batch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = torch.randn(*size, problem.channels, generator=generator, dtype=wide)
    gumbel = -torch.empty(*size, problem.neurons, dtype=wide).exponential_(generator=generator).log()
    hard = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2 == 1
    return Draws(noise.to(device), hard.to(device), gumbel.to(device))


def adopt(kind: Callable[..., nn.Module], problem: Problem, reference: DSTS) -> nn.Module:
    """A module of another class on the reference's parameters, with running statistics of its own."""
    dtype = reference.layers[0].gate.dtype
    module = kind(problem.channels, num_layers=problem.layers, num_neurons=problem.neurons, dtype=dtype, device="meta")
    state = reference.state_dict()
    for name, buffer in reference.named_buffers():
        state[name] = buffer.clone()
    module.load_state_dict(state, assign=True)
    return module


@torch.no_grad()
def restore_statistics(module: nn.Module, reference: DSTS) -> None:
    """Undoes what training steps did to the running statistics."""
    before = dict(reference.named_buffers())
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name.removeprefix("_orig_mod.")])


def build(variant: str, mode: str, problem: Problem, reference: DSTS, backend: str | None = None) -> nn.Module:
    """One row's module, ready for ``mode``. See :data:`VARIANTS` for the names; ``backend`` is for our own. A way that
    is forced is a matter of the step, not of the module.
    """
    variant = variant.partition(" ")[0]
    if variant == "handwritten":
        if mode == "evaluation":
            return HandwrittenEval(reference)
        return adopt(HandwrittenTrain, problem, reference).train()
    if variant in ("literal", "compiled"):
        module = adopt(DSTS, problem, reference).train(mode == "training")
        return torch.compile(module, dynamic=False) if variant == "compiled" else module

    from dsts_kernels import FusedDSTS

    module = adopt(functools.partial(FusedDSTS, backend=backend), problem, reference).train(mode == "training")
    return module.freeze() if variant == "frozen" else module


def training_step(module: nn.Module, x: Tensor, draws: Draws, grad: Tensor) -> Tensor:
    """Forward and backward; ``x`` is a leaf that wants its gradient. Returns the output."""
    y = module(x, draws=draws)
    y.backward(grad)
    return y.detach()


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """``TimeoutError`` in the block after ``seconds``; no limit where the platform has no alarm signal."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
