"""Where a sample goes: its relevance scores, the neuron that they choose, its gates, and the share of that choice.

All of it is small, so that on a GPU it costs launches and not work. Where a backend has one kernel for all and nothing
listens, that runs, forward and backward; elsewhere the ops of the single steps do, in plain torch where torch has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..backends.base import Backend
from . import _checks
from ._library import listened, tracked, without_autocast
from .relevance import check_scoring, relevance_scores, spread, summed_over_outputs
from .semhash import check_gate, semhash_gate
from .tap_sums import spread_over_positions


class Routed(NamedTuple):
    """What :func:`route` returns."""

    neuron: Tensor  # (B,) int64
    scores: Tensor  # (B, N) float32 or float64, less the centre, before Gumbel noise
    gate: Tensor  # (B, C) in the dtype of the logits
    share: Tensor | None  # (B,) of the chosen neuron in the softmax, where asked for and a derivative is wanted


class Fused(torch.autograd.Function):
    """One launch forward and one backward on a GPU, by a backend's kernels; one step of autograd anywhere."""

    @staticmethod
    def forward(ctx, x, scoring, logits, noise, hard, gumbel, tau, reduction, backend):
        ctx.tau, ctx.reduction, ctx.backend = tau, reduction, backend
        ctx.divisor = score_divisor(x, scoring, reduction)
        collapsed = summed_over_outputs(scoring).contiguous()
        found = backend.route(x, collapsed, logits, noise, hard, gumbel, ctx.divisor, tau, True)
        neuron, scores, gate, share, sums = found
        ctx.save_for_backward(x, scoring, logits, noise, hard, gumbel, neuron, scores, collapsed, sums)
        need_x, need_scoring, need_logits = ctx.needs_input_grad[:3]
        cut_off = (neuron,) if need_x or need_scoring else (neuron, scores, share)
        ctx.mark_non_differentiable(*cut_off, *(() if need_logits else (gate,)))
        ctx.set_materialize_grads(False)
        return neuron, scores, gate, share

    @staticmethod
    def backward(ctx, _, *gradients):
        if torch.is_grad_enabled():  # a second derivative is wanted
            return (*_once_more(ctx, gradients), *(None,) * 6)
        x, scoring, logits, noise, _, gumbel, neuron, scores, collapsed, sums = ctx.saved_tensors
        dscores, dgate, dshare = gradients
        chosen = dscores is not None or dshare is not None  # else somebody used the gates alone
        need_x, need_scoring, need_logits = ctx.needs_input_grad[:3]
        needs = need_x and chosen, need_scoring and chosen, need_logits and dgate is not None
        dsums, dcollapsed, dlogits = ctx.backend.route_backward(
            gradients, scores, gumbel, neuron, sums, collapsed, logits, noise, ctx.divisor, ctx.tau, needs
        )
        dx = None if dsums is None else spread_over_positions(dsums, x.shape, x.dtype)
        return dx, None if dcollapsed is None else spread(dcollapsed, scoring), dlogits, *(None,) * 6


def _once_more(ctx, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of the single steps' ops, with a graph of their own."""
    tensors = ctx.saved_tensors[:6]
    inputs = [t for t, needs in zip(tensors, ctx.needs_input_grad, strict=False) if needs]
    x, scoring, logits, noise, hard, gumbel = tensors
    found = route(
        x, scoring, logits, noise=noise, hard=hard, gumbel=gumbel, tau=ctx.tau, reduction=ctx.reduction, share=True,
        backend=ctx.backend.name, fused=False,
    )  # fmt: skip
    pairs = [(y, g) for y, g in zip(found[1:], gradients, strict=True) if g is not None and y.requires_grad]
    outputs, given = zip(*pairs, strict=True)
    mine = iter(torch.autograd.grad(outputs, inputs, given, create_graph=True, allow_unused=True))
    return [next(mine) if needs else None for needs in ctx.needs_input_grad[:3]]


def less_center(gumbel: Tensor | None, center: Tensor, batch: int) -> Tensor:
    """``(B, N)``: kernels add Gumbel noise to scores and choose by the sum, so a centre goes there, with its sign."""
    if gumbel is None:
        return (-center).expand(batch, -1)
    return _checks.shaped("gumbel", gumbel, (batch, len(center)), _checks.FLOATS).to(center.dtype) - center


def score_divisor(x: Tensor, scoring: Tensor, reduction: str) -> int:
    """What turns sums into scores."""
    return scoring.shape[1] * x.shape[2:].numel() if reduction == "mean" else 1


def fusing_backend(tensors: tuple[Tensor | None, ...], neurons: int, backend: str | None) -> Backend | None:
    """The backend that routes features, the first of ``tensors``, in one launch, where it may."""
    if torch.compiler.is_compiling() or not isinstance(tensors[0], Tensor) or listened(tensors, profiled=False):
        return None
    x = tensors[0]
    chosen = choose("tap_sums", x.device, x.dtype, backend, x.shape)
    return chosen if chosen.fuses_routing(x.shape[0], neurons) else None


def in_one_launch(
    x: Tensor,
    scoring: Tensor,
    logits: Tensor,
    noise: Tensor | None,
    hard: Tensor | None,
    gumbel: Tensor | None,
    tau: float,
    reduction: str,
    chosen: Backend,
) -> Routed:
    """:func:`route` by the kernels of ``chosen``; the share comes wherever scores have a derivative."""
    _checks.features("x", x)
    check_scoring(x, scoring, reduction)
    check_gate(logits, noise, hard, x.shape[0], x.device)
    if gumbel is not None:
        _checks.shaped("gumbel", gumbel, (x.shape[0], scoring.shape[0]), _checks.FLOATS)
        _checks.same_device("gumbel", gumbel, x.device)
    noise, hard, gumbel = (None if t is None else t.contiguous() for t in (noise, hard, gumbel))
    logits = logits.contiguous()
    if tracked((x, scoring, logits)):
        neuron, scores, gate, share = Fused.apply(
            x, scoring, logits, noise, hard, gumbel, float(tau), reduction, chosen
        )
        return Routed(neuron, scores, gate, share if share.requires_grad else None)
    with without_autocast(x):
        collapsed = summed_over_outputs(scoring).contiguous()
    divisor = score_divisor(x, scoring, reduction)
    neuron, scores, gate, *_ = chosen.route(x, collapsed, logits, noise, hard, gumbel, divisor, tau, False)
    return Routed(neuron, scores, gate, None)


def route(
    x: Tensor,
    scoring: Tensor,
    logits: Tensor,
    *,
    noise: Tensor | None = None,
    hard: Tensor | None = None,
    gumbel: Tensor | None = None,
    center: Tensor | None = None,
    tau: float = 1.0,
    reduction: str = "sum",
    share: bool = False,
    backend: str | None = None,
    fused: bool = True,
) -> Routed:
    """Scores of every neuron, the largest with ``gumbel``, that neuron's gates, its share of ``softmax(scores / tau)``.

    Args:
        x: ``(B, C, T, H, W)`` floating, any stride order.
        scoring: ``(N, K, C, 1, 1, 1)`` or ``(N, K, C, 1, 3, 3)``.
        logits: ``(N, C)`` of gates.
        noise, hard, gumbel: draws ``(B, C)``, ``(B,)`` bool and ``(B, N)``; ``None`` as in evaluation.
        center: ``(N,)`` floating, subtracted from scores; it gets no gradient. ``None`` subtracts nothing.
        reduction: ``"sum"`` or ``"mean"`` of scores.
        share: return the share too, where a derivative is wanted.
        backend: the name of a backend; ``None`` chooses.
        fused: in one launch where that can be.

    Raises:
        TypeError, ValueError: as :func:`~.relevance.relevance_scores` and :func:`~.semhash.semhash_gate`.

    Source: docs/design.md, section 1, rows "relevance" to "gate".
    """
    given = x, scoring, logits, noise, hard, gumbel
    if center is not None:
        _checks.shaped("center", center, logits.shape[:1], _checks.FLOATS)
        center = center.detach()
    chosen = fusing_backend((*given, center), logits.shape[0], backend) if fused else None
    if chosen is not None:
        shift = gumbel if center is None else less_center(gumbel, center, x.shape[0])
        found = in_one_launch(*given[:5], shift, tau, reduction, chosen)
        found = found if center is None else found._replace(scores=found.scores - center)
        return found if share else found._replace(share=None)
    scores = relevance_scores(x, scoring, reduction=reduction, backend=backend)
    scores = scores if center is None else scores - center.to(scores.dtype)
    noisy = scores if gumbel is None else scores + gumbel.to(scores.dtype)
    neuron = noisy.argmax(dim=1)
    gate = semhash_gate(logits, noise, hard, neuron=neuron, backend=backend)
    if not (share and noisy.requires_grad):
        return Routed(neuron, scores, gate, None)
    return Routed(neuron, scores, gate, torch.softmax(noisy / tau, dim=1).gather(1, neuron[:, None])[:, 0])
