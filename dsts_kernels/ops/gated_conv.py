"""Gated convolution: each channel of a sample to its neuron's spatial or temporal operator (docs/design.md).

Forward turns gates into channel lists and runs each operator on its own; backward gives the data gradient with
the gate gradient as its epilogue, and weight gradients over listed channels. A side that needs no gradient costs
nothing: ``ctx.needs_input_grad`` decides what is computed and what is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from . import _checks
from ._library import PLAIN, Derivative, autocast_features, autocast_on, define, empty_features


def _forward_fake(x, gate, neuron, spatial, temporal, backend=None):
    return empty_features(x, spatial.shape[1])


def _backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    neuron: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    needs: list[bool],
    backend: str | None = None,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = choose("gated_conv3d", x.device, x.dtype, backend, x.shape).gated_conv3d_backward
    found = run(grad, x, gate, neuron, spatial, temporal, needs, kept or [])
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _backward_fake(grad, x, gate, neuron, spatial, temporal, needs, backend=None, kept=None):
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        torch.empty_like(gate, memory_format=torch.contiguous_format) if needs[1] else x.new_empty(0),
        spatial.new_empty(spatial.shape) if needs[2] else x.new_empty(0),
        temporal.new_empty(temporal.shape) if needs[3] else x.new_empty(0),
    )


def _listed(gate: Tensor) -> tuple[int, int]:
    """Channels that gates send to either operator, over the batch; all where they are not known (fake tensors)."""
    if type(gate) not in PLAIN or gate.is_meta:
        return gate.numel(), gate.numel()
    return int((gate != 0).sum()), int((gate != 1).sum())


def _flops(x, gate, neuron, spatial, temporal, backend=None, *, out_val) -> int:
    """Two for every multiply-add of direct convolutions of the listed channels."""
    to_spatial, to_temporal = _listed(gate)
    return 2 * (9 * to_spatial + 3 * to_temporal) * spatial.shape[1] * x.shape[2:].numel()


def _backward_flops(grad, x, gate, neuron, spatial, temporal, needs, backend=None, kept=None, *, out_val) -> int:
    """Likewise; gates that train want the data gradient of every channel."""
    to_spatial, to_temporal = _listed(gate)
    taps = 9 * to_spatial * needs[2] + 3 * to_temporal * needs[3]
    if needs[1]:
        taps += 12 * gate.numel()
    elif needs[0]:
        taps += 9 * to_spatial + 3 * to_temporal
    return 2 * taps * spatial.shape[1] * x.shape[2:].numel()


backward_op = define(
    "gated_conv3d_backward(Tensor grad, Tensor x, Tensor gate, Tensor neuron, Tensor spatial, Tensor temporal, "
    "bool[] needs, str? backend=None, Tensor[]? kept=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    strided=("grad", "x"),
    flops=_backward_flops,
)


def _keep(ctx, inputs, output, kept=()):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *kept)


def _gradients(ctx, grad):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    x, gate, neuron, spatial, temporal, *kept = ctx.saved_tensors
    found = backward_op(grad, x, gate, neuron, spatial, temporal, needs, ctx.backend, kept)
    dx, dgate, dspatial, dtemporal = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, dgate, None, dspatial, dtemporal, None


forward_op = define(
    "gated_conv3d(Tensor x, Tensor gate, Tensor neuron, Tensor spatial, Tensor temporal, str? backend=None) -> Tensor",
    None,
    _forward_fake,
    strided=("x",),
    derivative=Derivative(_keep, _gradients, keeps=True),
    flops=_flops,
)


def gated_conv3d(
    x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor, *, backend: str | None = None
) -> Tensor:
    """``z = conv_1x3x3(S_a, gate*x) + conv_3x1x1(T_a, (1 - gate)*x)`` with each sample's own neuron ``a``.

    Args:
        x: ``(B, C, T, H, W)`` floating, any stride order.
        gate: ``(B, C)`` floating; channels at exactly 0 or 1 cost one operator only.
        neuron: ``(B,)`` int64.
        spatial: ``(N, O, C, 1, 3, 3)`` in the dtype of ``x`` (any floating dtype under autocast).
        temporal: ``(N, O, C, 3, 1, 1)`` likewise.
        backend: the name of a backend; ``None`` chooses.

    Returns:
        ``(B, O, T, H, W)``, zero padded, channels-last in memory.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device.

    Source: docs/design.md, section 1, row "specialise".
    """
    x = _checks.features("x", x)
    batch, channels = x.shape[:2]
    dtypes = _checks.FLOATS if autocast_on(x) else (x.dtype,)
    _checks.shaped("gate", gate, (batch, channels), _checks.FLOATS)
    _checks.neurons(neuron, batch, x.device)
    spatial = _checks.floating("spatial", spatial, 6)
    num_neurons, outputs = spatial.shape[:2]
    _checks.shaped("spatial", spatial, (num_neurons, outputs, channels, 1, 3, 3), dtypes)
    _checks.shaped("temporal", temporal, (num_neurons, outputs, channels, 3, 1, 1), dtypes)
    for name, value in (("gate", gate), ("spatial", spatial), ("temporal", temporal)):
        _checks.same_device(name, value, x.device)
    return forward_op(autocast_features(x), gate, neuron, spatial, temporal, backend)
