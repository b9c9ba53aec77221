"""Relevance scores without a scoring convolution (docs/design.md, 2.1).

``v_i = sum over all outputs of conv(m_i, x)`` is linear in both, so it is the inner product of the kernel summed
over its outputs with the tap sums of x: one pass over x, one over the kernels and an ``N x C`` product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import accumulate_dtype
from ..backends.memory import lazy_zeros
from . import _checks
from ._library import apply, define, without_autocast
from .tap_sums import tap_sums_op

SCORING_KERNELS = ((1, 1, 1), (1, 3, 3))
REDUCTIONS = ("sum", "mean")


def spread(grad: Tensor, like: Tensor) -> Tensor:
    """``grad (N, C, taps)`` for every output of scoring kernels ``like``."""
    total = lazy_zeros(like.shape, like.dtype, like.device, dict.fromkeys(range(like.shape[0]), True))
    return total.copy_(grad.view(like[:, :1].shape).expand(like.shape))


spread_op = define(
    "spread_scoring_gradient(Tensor grad, Tensor like) -> Tensor",
    spread,
    lambda grad, like: torch.empty_like(like, memory_format=torch.contiguous_format),
)


def summed_over_outputs(scoring: Tensor) -> Tensor:
    return scoring.sum(1, dtype=accumulate_dtype(scoring.dtype)).flatten(2)


class CollapseScoring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scoring):
        ctx.save_for_backward(scoring)
        return summed_over_outputs(scoring)

    @staticmethod
    def backward(ctx, grad):
        # Every output of a kernel has the same gradient. Autograd would store it by a copy into fresh small pages.
        (scoring,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return grad.reshape(scoring[:, :1].shape).expand(scoring.shape).to(scoring.dtype)
        return spread_op(grad, scoring)


def collapse_scoring(scoring: Tensor) -> Tensor:
    """Scoring kernels ``(N, K, C, 1, h, w)`` summed over outputs: ``(N, C, h*w)``, float32 or float64."""
    return apply(CollapseScoring, summed_over_outputs, scoring)


def relevance_scores(x: Tensor, scoring: Tensor, *, reduction: str = "sum", backend: str | None = None) -> Tensor:
    """How relevant each neuron is to each sample: ``v_i = sum over all outputs of conv(m_i, x)``.

    Args:
        x: ``(B, C, T, H, W)`` floating, any stride order.
        scoring: ``(N, K, C, 1, 1, 1)`` or ``(N, K, C, 1, 3, 3)``, zero-padded kernels of ``K`` outputs.
        reduction: ``"sum"`` (the paper) or ``"mean"`` over the same elements (**assumption**).
        backend: the name of a backend; ``None`` chooses.

    Returns:
        ``(B, N)`` in float32 (float64 for float64 input), under autocast too.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device.

    Source: docs/design.md, section 1, rows "relevance" and "choice"; Table 2 of the paper for the kernels.
    """
    x = _checks.features("x", x)
    check_scoring(x, scoring, reduction)
    with without_autocast(x):
        collapsed = collapse_scoring(scoring)
        sums = tap_sums_op(x, collapsed.shape[2], backend)
        scores = sums.flatten(1) @ collapsed.flatten(1).t()
        if reduction == "mean":
            scores = scores / (scoring.shape[1] * x.shape[2] * x.shape[3] * x.shape[4])
    return scores


def check_scoring(x: Tensor, scoring: object, reduction: object) -> None:
    """Refuse what :func:`relevance_scores` does not take of features ``x``."""
    scoring = _checks.floating("scoring", scoring, 6)
    sizes, kernel = scoring.shape[:3], tuple(scoring.shape[3:])
    if 0 in sizes or sizes[2] != x.shape[1] or kernel not in SCORING_KERNELS:
        raise ValueError(
            f"scoring: got {_checks.describe(scoring)}, wanted (N, K, {x.shape[1]}, 1, 1, 1) or "
            f"(N, K, {x.shape[1]}, 1, 3, 3)"
        )
    if (scoring.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"scoring: got {_checks.describe(scoring)}, wanted the precision of x, {x.dtype}")
    _checks.same_device("scoring", scoring, x.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted 'sum' or 'mean'")
