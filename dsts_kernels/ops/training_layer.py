"""A layer in training up to its norm, in one step of autograd, where a backend of the host has one.

Route, gate, convolve, mix and weigh are each small in a small layer, so that its training step spends its time between
them: in nodes of autograd, in checks, in the sum of two gradients of the features. What runs here are the methods that
the ops of the single steps call, in the same order. Those ops stay what compilers, modes and second derivatives see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ._library import autocast_on, listened, tracked
from .gated_conv import gated_conv3d
from .live_layer import fit
from .mixing_conv import MIXING_KERNELS, mixing_conv3d
from .relevance import REDUCTIONS, spread, summed_over_outputs
from .route import Routed, route, score_divisor
from .routing_weight import inner, selected_weight
from .tap_sums import spread_over_positions


class TrainingLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scoring, logits, spatial, temporal, mixing, draws, tau, reduction, requested, backend):
        ctx.tau, ctx.reduction, ctx.requested, ctx.backend = tau, reduction, requested, backend
        ctx.divisor = score_divisor(x, scoring, reduction)
        collapsed = summed_over_outputs(scoring).contiguous()
        ctx.draws = draws
        neuron, scores, gate, sums = backend.choose_neurons(x, collapsed, logits.contiguous(), *draws, ctx.divisor)
        z = backend.gated_conv3d(x, gate, neuron, spatial.contiguous(), temporal.contiguous())
        out = backend.mixing_conv3d(z, neuron, mixing.contiguous()).data  # no view, which autograd watches
        need_x, need_scoring, need_logits = ctx.needs_input_grad[:3]
        weighed = (out,) if need_x or need_scoring else ()
        ctx.save_for_backward(
            x, scoring, logits, spatial, temporal, mixing, neuron, scores, collapsed, sums, gate, z, *weighed
        )
        cut_off = (neuron,) if weighed else (neuron, scores)
        ctx.mark_non_differentiable(*cut_off, *(() if need_logits else (gate,)))
        ctx.set_materialize_grads(False)
        return out, neuron, scores, gate

    @staticmethod
    def backward(ctx, dout, _, dscores, dgate):
        gradients = dout, dscores, dgate
        given = [g for g in gradients if g is not None]
        if torch.is_grad_enabled() or (given and listened(given, profiled=False)):
            return *_by_steps(ctx, gradients), *(None,) * 5
        return *_gradients(ctx, *gradients), *(None,) * 5


def _gradients(ctx, dout: Tensor | None, dscores: Tensor | None, dgate: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of ``x, scoring, logits, spatial, temporal, mixing``."""
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second time
    (x, scoring, *weights, neuron, scores, collapsed, sums, gate, z), weighed = saved[:12], saved[12:]
    logits, spatial, temporal, mixing = (t.contiguous() for t in weights)  # native code reads plain memory
    need_x, need_scoring, need_logits, *need_operators, need_mixing = ctx.needs_input_grad[:6]
    noise, _, gumbel = ctx.draws
    dx = dshare = dcollapsed = dspatial = dtemporal = dmixing = None
    if dout is not None:
        run = choose("gated_conv3d", x.device, x.dtype, ctx.requested, x.shape)  # a block around backward() counts
        needs = [need_x, need_logits, *need_operators]
        dz, dmixing = run.mixing_conv3d_backward(dout, z, neuron, mixing, [any(needs), need_mixing])
        if any(needs):
            found = run.gated_conv3d_backward(dz, x, gate, neuron, spatial, temporal, needs)
            dx, dlisted, dspatial, dtemporal = found
            dgate = dlisted if dgate is None else dgate if dlisted is None else dgate + dlisted
        dshare = inner(dout, *weighed) if weighed else None
    routed = dscores is not None or dshare is not None
    needs = need_x and routed, need_scoring and routed, need_logits and dgate is not None
    dsums, dcollapsed, dlogits = ctx.backend.route_backward(
        (dscores, dgate, dshare), scores, gumbel, neuron, sums, collapsed, logits, noise, ctx.divisor, ctx.tau, needs
    )
    if dsums is not None:
        through = spread_over_positions(dsums, x.shape, x.dtype)
        dx = through if dx is None else dx.add_(through)
    return dx, None if dcollapsed is None else spread(dcollapsed, scoring), dlogits, dspatial, dtemporal, dmixing


def _by_steps(ctx, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The same by the single steps' ops, done anew: with a graph where a second derivative is wanted."""
    given = ctx.saved_tensors[:6]
    inputs = [t for t, needs in zip(given, ctx.needs_input_grad, strict=False) if needs]
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create:
            given = [t.detach().requires_grad_(needs) for t, needs in zip(given, ctx.needs_input_grad, strict=False)]
            inputs = [t for t in given if t.requires_grad]
        outputs = by_steps(*given, ctx.draws, ctx.tau, ctx.reduction, ctx.requested)
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        outputs, wanted = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, inputs, wanted, create_graph=create, allow_unused=True)
    mine = iter(found)
    return [next(mine) if needs else None for needs in ctx.needs_input_grad[:6]]


def by_steps(x, scoring, logits, spatial, temporal, mixing, draws, tau, reduction, backend) -> tuple[Tensor, ...]:
    """The layer's output, scores and gates by the ops of the single steps."""
    noise, hard, gumbel = draws
    routed = route(
        x, scoring, logits, noise=noise, hard=hard, gumbel=gumbel, tau=tau, reduction=reduction, share=True,
        backend=backend, fused=False,
    )  # fmt: skip
    z = gated_conv3d(x, routed.gate, routed.neuron, spatial, temporal, backend=backend)
    z = mixing_conv3d(z, routed.neuron, mixing, backend=backend)
    return z if routed.share is None else selected_weight(z, routed.share), routed.scores, routed.gate


def training_layer(
    x: Tensor,
    scoring: Tensor,
    logits: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    mixing: Tensor,
    draws: tuple[Tensor, Tensor, Tensor],
    *,
    tau: float = 1.0,
    reduction: str = "sum",
    backend: str | None = None,
) -> tuple[Routed, Tensor] | None:
    """What ``route``, ``gated_conv3d``, ``mixing_conv3d`` and ``selected_weight`` give, with their gradients.

    ``draws`` are noise ``(B, C)``, hard ``(B,)`` and gumbel ``(B, N)``, checked. ``None`` where the single steps must
    run: where something listens, no derivative is wanted, arguments are none that all would take as they are, or no
    backend has it in one step. The result has memory of its own, which autograd keeps: nobody may change it.
    """
    given = x, scoring, logits, spatial, temporal, mixing
    if not x.is_cpu or listened(given) or not tracked(given) or autocast_on(x):
        return None
    if reduction not in REDUCTIONS or not fit(*given[:5]):
        return None
    if not _mixes(mixing, spatial) or torch.autograd.forward_ad._current_level >= 0:
        return None
    chosen = choose("gated_conv3d", x.device, x.dtype, backend, x.shape)
    if not chosen.trains_in_one_step():
        return None
    noise, hard, gumbel = (t.contiguous() for t in draws)
    out, neuron, scores, gate = TrainingLayer.apply(
        *given, (noise.to(logits.dtype), hard, gumbel), float(tau), reduction, backend, chosen
    )
    return Routed(neuron, scores, gate, None), out


def _mixes(mixing: Tensor, spatial: Tensor) -> bool:
    neurons, outputs = spatial.shape[:2]
    fits = mixing.shape in [(neurons, outputs, outputs, *kernel) for kernel in MIXING_KERNELS]
    return fits and mixing.dtype == spatial.dtype and mixing.is_cpu
