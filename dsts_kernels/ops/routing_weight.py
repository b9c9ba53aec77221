"""The straight-through weight of the chosen neuron: value 1 exactly, gradient of its softmax share (DESIGN 1).

The forward pass is the identity, so it costs nothing; the backward pass needs one inner product a sample,
``<dz', z'>``, and none when the scores are frozen. These are plain tensor expressions: the norm that follows
keeps ``z'`` anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import accumulate_dtype
from .layout import identity


def _inner(grad: Tensor, z: Tensor) -> Tensor:
    """``<grad, z>`` a sample: ``(B,)`` in float32 or float64."""
    wide = accumulate_dtype(z.dtype)
    if z.dtype == wide and z.shape[0] == 1:
        # Both are channels-last here, so this is one dot product over memory as it lies.
        rows = (t.permute(0, 2, 3, 4, 1).reshape(-1) for t in (grad, z))
        return torch.dot(*rows)[None]
    if z.dtype == torch.bfloat16:
        # Products rounded like their factors, summed in float32: a third of the bytes of two float32 copies. Float16
        # products could overflow.
        return (grad * z).sum((1, 2, 3, 4), dtype=wide)
    return (grad.to(wide) * z.to(wide)).sum((1, 2, 3, 4))


class SelectedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, share):
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(z)
        return identity(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad, _inner(grad, ctx.saved_tensors[0]) if ctx.needs_input_grad[1] else None


class AllNeuronsWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, shares, others):
        ctx.save_for_backward(*others)
        return identity(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dshares = torch.stack([_inner(grad, other) for other in ctx.saved_tensors], dim=1)
        return grad, dshares, None


def selected_weight(z: Tensor, share: Tensor) -> Tensor:
    """``z * w`` with ``w = 1`` in value and ``share`` in gradient: ``z (B, O, T, H, W)``, ``share (B,)``."""
    return SelectedWeight.apply(z, share)


def all_neurons_weight(z: Tensor, shares: Tensor, others: list[Tensor]) -> Tensor:
    """``sum_i y_i z'_i`` with straight-through one-hot ``y``.

    ``z`` is the chosen neuron's output, the value of the sum; ``shares (B, N)`` the softmax, whose gradient is
    ``<dz', z'_i>`` with ``others``, every neuron's output.
    """
    return AllNeuronsWeight.apply(z, shares, others)
