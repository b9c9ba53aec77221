"""Mixing: each sample through its own neuron's 1x1x1, 1x3x3 or 3x1x1 convolution (docs/design.md)."""

from __future__ import annotations

from torch import Tensor

from ..backends import choose
from . import _checks
from ._library import Derivative, autocast_features, autocast_on, define, empty_features

MIXING_KERNELS = ((1, 1, 1), (1, 3, 3), (3, 1, 1))


def _forward_fake(z, neuron, mixing, backend=None):
    return empty_features(z, mixing.shape[1])


def _backward(
    grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool], backend: str | None = None
) -> tuple[Tensor, Tensor]:
    run = choose("mixing_conv3d", z.device, z.dtype, backend, z.shape).mixing_conv3d_backward
    return tuple(z.new_empty(0) if t is None else t for t in run(grad, z, neuron, mixing, needs))


def _backward_fake(grad, z, neuron, mixing, needs, backend=None):
    return (
        empty_features(z, z.shape[1]) if needs[0] else z.new_empty(0),
        mixing.new_empty(mixing.shape) if needs[1] else z.new_empty(0),
    )


def _flops(z, neuron, mixing, backend=None, *, out_val) -> int:
    """Two for every multiply-add."""
    return 2 * z.numel() * mixing.shape[2:].numel()


def _backward_flops(grad, z, neuron, mixing, needs, backend=None, *, out_val) -> int:
    return _flops(z, neuron, mixing, out_val=None) * sum(needs)


backward_op = define(
    "mixing_conv3d_backward(Tensor grad, Tensor z, Tensor neuron, Tensor mixing, bool[] needs, "
    "str? backend=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    strided=("grad", "z"),
    flops=_backward_flops,
)


def _keep(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    dz, dmixing = backward_op(grad, *ctx.saved_tensors, needs, ctx.backend)
    return dz if needs[0] else None, None, dmixing if needs[1] else None, None


forward_op = define(
    "mixing_conv3d(Tensor z, Tensor neuron, Tensor mixing, str? backend=None) -> Tensor",
    None,
    _forward_fake,
    strided=("z",),
    derivative=Derivative(_keep, _gradients),
    flops=_flops,
)


def mixing_conv3d(z: Tensor, neuron: Tensor, mixing: Tensor, *, backend: str | None = None) -> Tensor:
    """``z' = conv(W_a, z)`` with each sample's own neuron ``a``.

    Args:
        z: ``(B, O, T, H, W)`` floating, any stride order.
        neuron: ``(B,)`` int64.
        mixing: ``(N, O, O, kt, kh, kw)`` with a 1x1x1, 1x3x3 or 3x1x1 kernel, in the dtype of ``z``.
        backend: the name of a backend; ``None`` chooses.

    Returns:
        ``(B, O, T, H, W)``, zero padded, channels-last in memory.

    Source: docs/design.md, section 1, row "mix"; Table 3 of the paper for the kernels.
    """
    z = _checks.features("z", z)
    mixing = _checks.floating("mixing", mixing, 6)
    outputs = z.shape[1]
    kernel = tuple(mixing.shape[3:])
    if tuple(mixing.shape[1:3]) != (outputs, outputs) or kernel not in MIXING_KERNELS:
        wanted = " or ".join(str(k) for k in MIXING_KERNELS)
        raise ValueError(
            f"mixing: got {_checks.describe(mixing)}, wanted (N, {outputs}, {outputs}, *kernel) with a kernel of "
            f"{wanted}"
        )
    if mixing.dtype != z.dtype and not autocast_on(z):
        raise TypeError(f"mixing: got {_checks.describe(mixing)}, wanted {z.dtype}")
    _checks.neurons(neuron, z.shape[0], z.device)
    _checks.same_device("mixing", mixing, z.device)
    return forward_op(autocast_features(z), neuron, mixing, backend)
