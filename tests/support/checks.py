"""Ops against the literal answers: output and gradients, each within the tolerance of the dtype it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsts_kernels.functional import gated_conv3d
from dsts_kernels.ops import gated_conv, mixing_conv, mixing_conv3d
from dsts_kernels.testing import TOLERANCES, assert_close

from .inputs import LAYOUTS, randn
from .oracles import literal_gated, literal_gradients, literal_mixing, wide
from .targets import Target

LAST = torch.channels_last_3d


class Convolution(NamedTuple):
    """An op with its backward op and its oracle; ``trained`` are the arguments that have a gradient."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor]]
    literal: Callable[..., Tensor]
    trained: dict[str, int]


GATED = Convolution(
    gated_conv3d, gated_conv.backward_op, literal_gated, {"x": 0, "gate": 1, "spatial": 3, "temporal": 4}
)
MIXING = Convolution(mixing_conv3d, mixing_conv.backward_op, literal_mixing, {"z": 0, "mixing": 2})


def check(
    op: Convolution,
    inputs: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
    forward: bool = True,
    *,
    backend: str,
    grad: Tensor | None = None,
) -> list[Tensor]:
    """The output and the gradients of what ``needs`` says, as they came: through autograd, or the backward op alone."""
    needs = [True] * len(op.trained) if needs is None else list(needs)
    dtype, results, ours = inputs[0].dtype, [], [t.detach() for t in inputs]
    trained = [i for i, need in zip(op.trained.values(), needs, strict=True) if need]
    ref = op.literal(*wide(inputs))
    if forward:
        for i in trained:
            ours[i].requires_grad_()
        out = op.forward(*ours, backend=backend)
        assert out.dtype == dtype and (out.is_contiguous(memory_format=LAST) or not out.numel())
        assert_close(out, ref, name="output")
        results.append(out.detach())
    if forward and not trained:
        return results
    grad = randn(*ref.shape, dtype=dtype, device=ref.device) if grad is None else grad
    if forward:
        given = iter(torch.autograd.grad(out, [ours[i] for i in trained], grad))
        gradients = [next(given) if need else None for need in needs]
    else:
        gradients = op.backward(grad, *ours, needs, backend)
        assert all(need or not g.numel() for g, need in zip(gradients, needs, strict=True))
    theirs = literal_gradients(op.literal, inputs, grad)
    for (name, i), need, g, h in zip(op.trained.items(), needs, gradients, theirs, strict=True):
        if need:
            assert g.dtype == inputs[i].dtype, name
            coarser = max(dtype, g.dtype, key=TOLERANCES.__getitem__)
            assert_close(g, h, dtype=coarser, name=f"gradient of {name}", factor=2)
            results.append(g)
    return results


def noise_like(x: Tensor, outputs: int, layout: str = "channels-first") -> Tensor:
    """A gradient for so many outputs, laid out otherwise."""
    return LAYOUTS[layout](randn(x.shape[0], outputs, *x.shape[2:], dtype=x.dtype, device=x.device))


def opchecked(target: Target) -> tuple[torch.dtype, tuple[int, int, int]]:
    """Dtype and size for :func:`opcheck`: half precision on a GPU, and small where one is stood in for."""
    dtype = torch.float32 if target.device.type == "cpu" else target.half
    return dtype, (1, 2, 3) if target.stand_in else target.size


def opcheck(target: Target, op: object, *arguments: object) -> None:
    """Schema, fakes (strides too) and dispatch; where a GPU is stood in for, not the traced graphs, which take long."""
    tests = {"test_utils": ("test_schema", "test_faketensor")} if target.stand_in else {}
    torch.library.opcheck(op.overload, (*arguments, target.backend), **tests)


def assert_same_bits(runs: Sequence[Sequence[Tensor]]) -> None:
    """Every run gave what the first one gave."""
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
