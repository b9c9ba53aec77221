"""A layer on live weights in evaluation, up to mixing: route, gate and convolve in one call of a backend that has one.

Each step is small, so that a small layer spends its time between them. What runs is what the ops of the single steps
run; they stay what compilers, exporters, modes and autograd see.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import choose
from ._library import autocast_on, listened, tracked
from .relevance import REDUCTIONS, SCORING_KERNELS, summed_over_outputs
from .route import Routed, score_divisor


def live_layer(
    x: Tensor,
    scoring: Tensor,
    logits: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    *,
    reduction: str = "sum",
    backend: str | None = None,
) -> tuple[Routed, Tensor] | None:
    """What :func:`~.route.route` and :func:`~.gated_conv.gated_conv3d` give in evaluation, with hard gates.

    ``None`` where these must run: where something listens, a derivative is wanted, arguments are none that both would
    take as they are, or no backend has it in one call.
    """
    given = x, scoring, logits, spatial, temporal
    if not x.is_cpu or listened(given) or tracked(given) or autocast_on(x):
        return None
    if reduction not in REDUCTIONS or not fit(*given):
        return None
    chosen = choose("gated_conv3d", x.device, x.dtype, backend, x.shape)
    found = chosen.live_layer(x, lambda: summed_over_outputs(scoring), score_divisor(x, scoring, reduction), *given[2:])
    if found is None:
        return None
    neuron, scores, gate, z = found
    return Routed(neuron, scores, gate, None), z


def fit(x: Tensor, scoring: Tensor, logits: Tensor, spatial: Tensor, temporal: Tensor) -> bool:
    """Whether the arguments go together, all in one dtype on the CPU; errors are for the single steps to raise."""
    if spatial.dim() != 6 or 0 in scoring.shape:
        return False
    (neurons, outputs), channels = spatial.shape[:2], x.shape[1]
    return (
        all(t.dtype == x.dtype and t.is_cpu for t in (scoring, logits, spatial, temporal))
        and scoring.shape[0] == neurons
        and scoring.shape[2:] in [(channels, *kernel) for kernel in SCORING_KERNELS]
        and logits.shape == (neurons, channels)
        and spatial.shape == (neurons, outputs, channels, 1, 3, 3)
        and temporal.shape == (neurons, outputs, channels, 3, 1, 1)
    )
