"""The literal answers, as the equations read: one sample at a time, all channels under a mask, meant for float64.

Convolutions are put together from matrix products, one a tap: a GPU multiplies float64 matrices at full rate, while a
library's float64 convolutions are nobody's concern and may be a hundred times slower. ``test_oracles.py`` holds that
they are convolutions.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels import reference


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64, indices as they are, detached."""
    return [t.detach().double() if t.is_floating_point() else t for t in tensors]


def conv3d(x: Tensor, weight: Tensor, padding: int | Sequence[int] = 0) -> Tensor:
    """``torch.nn.functional.conv3d`` of the reference's kinds as matrix products."""
    kernel = weight.shape[2:]
    pads = (padding,) * 3 if isinstance(padding, int) else tuple(padding)
    t, h, w = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], pads, kernel, strict=True))
    padded = F.pad(x, [p for p in reversed(pads) for _ in range(2)]) if any(pads) else x
    out = x.new_zeros(x.shape[0], weight.shape[0], t * h * w)
    for i, j, k in itertools.product(*map(range, kernel)):
        window = padded[:, :, i : i + t, j : j + h, k : k + w].flatten(2)  # (B, C, P)
        out = torch.baddbmm(out, weight[:, :, i, j, k].expand(x.shape[0], -1, -1), window)
    return out.unflatten(2, (t, h, w))


@contextlib.contextmanager
def products() -> Iterator[None]:
    """The reference convolves with :func:`conv3d` inside the block."""
    before = reference.F
    reference.F = SimpleNamespace(conv3d=conv3d, relu=F.relu, one_hot=F.one_hot)
    try:
        yield
    finally:
        reference.F = before


def literal_gated(x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    """Each sample under its neuron's spatial operator where the gate is open, under its temporal one elsewhere."""
    samples = []
    for b, n in enumerate(reference.numbers(neuron)):
        g = gate[b, :, None, None, None]
        z = conv3d((g * x[b])[None], spatial[n], padding=(0, 1, 1))
        samples.append(z + conv3d(((1 - g) * x[b])[None], temporal[n], padding=(1, 0, 0)))
    return torch.cat(samples) if samples else x.new_empty(0, spatial.shape[1], *x.shape[2:])


def literal_mixing(z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
    """Each sample under its neuron's kernel."""
    padding = tuple(k // 2 for k in mixing.shape[3:])
    samples = [conv3d(z[b : b + 1], mixing[n], padding=padding) for b, n in enumerate(reference.numbers(neuron))]
    return torch.cat(samples) if samples else torch.empty_like(z)


def literal_tap_sums(x: Tensor, taps: int) -> Tensor:
    """What each tap of a zero-padded kernel meets, summed over all positions: ``(B, C, taps)``."""
    side = 3 if taps == 9 else 1
    h, w = x.shape[3:]
    padded = F.pad(x, (side // 2,) * 4)
    met = [padded[..., i : i + h, j : j + w].sum((2, 3, 4)) for i in range(side) for j in range(side)]
    return torch.stack(met, dim=-1)


def literal_relevance(x: Tensor, scoring: Tensor, reduction: str = "sum") -> Tensor:
    """Outputs of every neuron's scoring convolution, summed or averaged: ``(B, N)``."""
    kernel = scoring.shape[3:]
    outputs = conv3d(x, scoring.flatten(0, 1), padding=tuple(k // 2 for k in kernel))
    outputs = outputs.unflatten(1, scoring.shape[:2]).flatten(2)  # (B, N, K*P)
    return outputs.mean(2) if reduction == "mean" else outputs.sum(2)


def soft(q: Tensor) -> Tensor:
    """The saturating sigmoid."""
    return (1.2 * torch.sigmoid(q) - 0.1).clamp(0, 1)


def slope(q: Tensor) -> Tensor:
    """Its derivative; 0 where it saturates."""
    s = torch.sigmoid(q)
    r = 1.2 * s - 0.1
    return torch.where((r > 0) & (r < 1), 1.2 * s * (1 - s), 0.0)


def summed_logits(logits: Tensor, neuron: Tensor | None, noise: Tensor | None) -> Tensor:
    """``(B, C)`` in float64: each sample's row with its noise."""
    q = logits.double() if neuron is None else logits.double()[neuron]
    return q if noise is None else q + noise.double()


def literal_semhash(logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
    """Hard or soft gates by sample; hard where nothing says otherwise."""
    q = summed_logits(logits, neuron, noise)
    is_hard = torch.ones(len(q), dtype=torch.bool, device=q.device) if hard is None else hard
    return torch.where(is_hard[:, None], (q > 0).double(), soft(q))


def literal_semhash_gradient(grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None) -> Tensor:
    """Straight through: the gradient of the soft gate for every sample, added into its neuron's row."""
    gradient = grad.double() * slope(summed_logits(logits, neuron, noise))
    if neuron is None:
        return gradient
    return torch.zeros(logits.shape, dtype=torch.float64, device=grad.device).index_add_(0, neuron, gradient)


def literal_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients in float64 of every floating input; zeros where there are no samples."""
    inputs = wide(inputs)
    trained = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    if not grad.numel():
        return [torch.zeros_like(t) for t in trained]
    return list(torch.autograd.grad(function(*inputs), trained, grad.double()))
