"""Improved SemHash gates: the chosen neuron's logits plus noise, soft or hard, straight-through (docs/design.md).

Forward gathers ``logits[neuron]``, adds the noise and applies ``r`` or ``b`` by sample in one pass; backward
multiplies by ``dr/dq`` and adds each sample's row back into its neuron's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from . import _checks
from ._library import Derivative, define


def _gate_fake(logits, neuron, noise, hard, backend=None):
    batch = logits.shape[0] if neuron is None else neuron.shape[0]
    return logits.new_empty(batch, logits.shape[1])


def _backward(
    grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, backend: str | None = None
) -> Tensor:
    return choose("semhash_gate", logits.device, logits.dtype, backend).semhash_gate_backward(
        grad, logits, neuron, noise
    )


def _backward_fake(grad, logits, neuron, noise, backend=None):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


backward_op = define(
    "semhash_gate_backward(Tensor grad, Tensor logits, Tensor? neuron, Tensor? noise, str? backend=None) -> Tensor",
    _backward,
    _backward_fake,
)


def _keep(ctx, inputs, output):
    logits, neuron, noise, _, ctx.backend = inputs
    ctx.save_for_backward(logits, neuron, noise)


def _gradients(ctx, grad):
    dlogits = backward_op(grad, *ctx.saved_tensors, ctx.backend) if ctx.needs_input_grad[0] else None
    return dlogits, None, None, None, None


gate_op = define(
    "semhash_gate(Tensor logits, Tensor? neuron, Tensor? noise, Tensor? hard, str? backend=None) -> Tensor",
    None,
    _gate_fake,
    derivative=Derivative(_keep, _gradients),
)


def semhash_gate(
    logits: Tensor,
    noise: Tensor | None = None,
    hard: Tensor | None = None,
    *,
    neuron: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gates of Improved SemHash, with the straight-through gradient.

    ``q = logits + noise``; a hard sample gets ``b = [q > 0]``, a soft one ``r = max(0, min(1, 1.2*sigmoid(q) -
    0.1))``; the gradient is ``1.2*s*(1 - s)`` with ``s = sigmoid(q)`` where ``0 < r < 1``, else 0, for both.

    Args:
        logits: ``(B, C)`` floating, or ``(N, C)`` with ``neuron``.
        noise: ``(B, C)`` floating, added as given; ``None`` adds nothing. It gets no gradient.
        hard: ``(B,)`` bool, which samples are hard; ``None`` means all.
        neuron: ``(B,)`` int64, the row of ``logits`` each sample uses.
        backend: the name of a backend; ``None`` chooses.

    Returns:
        ``(B, C)`` in the dtype of ``logits``.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device.

    Source: docs/design.md, section 1; SemHash in the supplementary material of the paper.

    >>> semhash_gate(torch.tensor([[-3.0, 0.0, 3.0]]))
    tensor([[0., 0., 1.]])
    """
    logits = _checks.floating("logits", logits, 2)
    batch = logits.shape[0]
    if neuron is not None:
        if not isinstance(neuron, Tensor) or neuron.dim() != 1:
            raise ValueError(f"neuron: got {_checks.describe(neuron)}, wanted a tensor of shape (B,)")
        batch = neuron.shape[0]
        _checks.neurons(neuron, batch, logits.device)
    check_gate(logits, noise, hard, batch, logits.device)
    return gate_op(logits, neuron, None if noise is None else noise.to(logits.dtype), hard, backend)


def check_gate(logits: object, noise: object, hard: object, batch: int, device: torch.device) -> None:
    """Refuse what :func:`semhash_gate` does not take, for ``batch`` samples on ``device``."""
    logits = _checks.floating("logits", logits, 2)
    _checks.same_device("logits", logits, device)
    if noise is not None:
        _checks.shaped("noise", noise, (batch, logits.shape[1]), _checks.FLOATS)
        _checks.same_device("noise", noise, device)
    if hard is not None:
        _checks.shaped("hard", hard, (batch,), (torch.bool,))
        _checks.same_device("hard", hard, device)


def saturating_sigmoid(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``max(0, min(1, 1.2*sigmoid(x) - 0.1))``: the soft gate, for a floating tensor of any shape.

    >>> saturating_sigmoid(torch.tensor([-5.0, 0.0, 5.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    x = _checks.floating("x", x)
    soft = torch.zeros(1, dtype=torch.bool, device=x.device)
    return gate_op(x.reshape(1, -1), None, None, soft, backend).reshape(x.shape)
