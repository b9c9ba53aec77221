"""The straight-through weight of the chosen neuron: value 1 exactly, gradient of its softmax share (docs/design.md).

The forward pass is the identity, so it costs nothing; the backward pass needs one inner product per sample,
``<dz', z'>``, and none when the scores are frozen. The functions return what they were given, seen anew: the norm that
follows keeps ``z'`` anyway. Where nothing follows, the caller asks for memory of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import accumulate_dtype
from ._library import apply


def identity(z: Tensor) -> Tensor:
    """``z`` as a new tensor on the same memory, with the strides it has.

    ``view_as`` makes up the stride of a dimension of size 1, and torch's BatchNorm on a CPU, given a batch of one
    with such a stride, computes its backward pass from the wrong elements (seen with torch 2.13).
    """
    return torch.ops.aten.alias.default(z)


def inner(grad: Tensor, z: Tensor) -> Tensor:
    """``<grad, z>`` per sample: ``(B,)`` in float32 or float64."""
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
    def backward(ctx, grad):
        return grad, inner(grad, ctx.saved_tensors[0]) if ctx.needs_input_grad[1] else None


class AllNeuronsWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, shares, *others):
        ctx.save_for_backward(*others)
        return identity(z)

    @staticmethod
    def backward(ctx, grad):
        others = ctx.saved_tensors  # once: activation checkpointing refuses a second time
        dshares = torch.stack([inner(grad, other) for other in others], dim=1)
        if torch.is_grad_enabled():  # a second derivative is wanted, and `others` came without a graph
            dshares = NoDerivativeOfOthers.apply(dshares.detach().requires_grad_())
        return grad, dshares, *(None for _ in others)


class NoDerivativeOfOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dshares):
        return dshares.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            "routing_gradient: got 'all' and a second derivative, wanted first derivatives only "
            "(the literal dsts_kernels.reference.DSTS has second ones)"
        )


def _weighed(z: Tensor, share: Tensor) -> Tensor:
    """``z`` times a straight-through 1, in plain torch and in memory of its own."""
    wide = accumulate_dtype(z.dtype)
    weight = (1 + (share - share.detach())).to(wide)
    return (z.to(wide) * weight[:, None, None, None, None]).to(z.dtype)


def _weighed_sum(z: Tensor, shares: Tensor, *others: Tensor) -> Tensor:
    """``z`` plus nothing, with every share's gradient, in plain torch."""
    wide = accumulate_dtype(z.dtype)
    nothing = (shares - shares.detach()).to(wide)
    for i, other in enumerate(others):
        z = z + (other.to(wide) * nothing[:, i, None, None, None, None]).to(z.dtype)
    return z


def selected_weight(z: Tensor, share: Tensor, *, fresh: bool = False) -> Tensor:
    """``z * w`` with ``w = 1`` in value and ``share`` in gradient: ``z (B, O, T, H, W)``, ``share (B,)``.

    ``fresh`` results have memory of their own, which whoever gets them may change; others share that of ``z``.
    """
    return _weighed(z, share) if fresh else apply(SelectedWeight, _weighed, z, share)


def all_neurons_weight(z: Tensor, shares: Tensor, others: list[Tensor], *, fresh: bool = False) -> Tensor:
    """``sum_i y_i z'_i`` with straight-through one-hot ``y``.

    ``z`` is the chosen neuron's output, the value of the sum; ``shares (B, N)`` the softmax, whose gradient is
    ``<dz', z'_i>`` with ``others``, every neuron's output.
    """
    return _weighed_sum(z, shares, *others) if fresh else apply(AllNeuronsWeight, _weighed_sum, z, shares, *others)
