"""Parameter groups of an optimizer of the upstream side: gates may want another learning rate than scoring kernels.

A gate's logit has to travel from its start near 0 to where the noise on it no longer turns it round, and its gradient
is small: at the rate of the scoring kernels it hardly moves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..options import number
from ..sides import gate_parameters, upstream_parameters

__all__ = ["upstream_groups"]


def upstream_groups(
    module: nn.Module, rate: float, gate_rate: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Scoring kernels and gates as two groups for ``torch.optim``; **ours**: the paper has one rate for all.

    Args:
        module: with a FusedDSTS; parameters that require no gradient are left out.
        rate: learning rate of scoring kernels, and of whatever else is upstream.
        gate_rate: of gates; ``None`` means ``rate``.
        options: of both groups, such as ``weight_decay=0.0``: decay draws every gate to its threshold.

    Returns:
        Groups that are not empty, scoring kernels first: what :class:`UpstreamDownstream` wants of its
        ``upstream_optimizer``.

    >>> gates = torch.optim.AdamW(upstream_groups(model, 1e-3, 1e-2, weight_decay=0.0))
    """
    rate = number("rate", rate, 0.0)
    gate_rate = rate if gate_rate is None else number("gate_rate", gate_rate, 0.0)
    gates = [p for p in gate_parameters(module) if p.requires_grad]
    known = set(map(id, gates))
    scores = [p for p in upstream_parameters(module) if p.requires_grad and id(p) not in known]
    groups = [{"params": scores, "lr": rate, **options}, {"params": gates, "lr": gate_rate, **options}]
    return [group for group in groups if group["params"]]
