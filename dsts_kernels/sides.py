"""Which parameters are upstream: told by their names, so that what a user wraps around a weight leaves it on its side.

``scoring`` and ``gate`` of a DSTS layer are upstream. A parametrization, pruning and the norms of ``torch.nn.utils``
put other parameters in their place, whose names still say whose they are; what they compute is no parameter.
"""

from __future__ import annotations

import re

from torch import nn

from . import reference
from .layer import DSTSLayer

__all__ = ["LAYERS", "TwoSided", "downstream_parameters", "gate_parameters", "upstream_parameters"]

LAYERS = (DSTSLayer, reference.DSTSLayer)
_OWN = re.compile(r"(scoring|gate)(_orig|_g|_v)?|parametrizations\.(scoring|gate)\..+")


def gate_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Gates of every DSTS layer in ``module``: leaves of its ``parameters()``, each once, in their order."""
    return _named(module, ("gate",))


def _named(module: nn.Module, wanted: tuple[str, ...]) -> list[nn.Parameter]:
    """Parameters that belong to a weight of one of these names in a DSTS layer."""
    found: set[int] = set()
    for part in module.modules():
        if isinstance(part, LAYERS):
            for name, p in part.named_parameters(remove_duplicate=False):
                match = _OWN.fullmatch(name)
                if match is not None and (match[1] or match[3]) in wanted:
                    found.add(id(p))
    return [p for p in module.parameters() if id(p) in found]


def upstream_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Scoring kernels and gates of every DSTS layer in ``module``: what Algorithm 1 trains on the validation part.

    Under a parametrization these are the parameters that it is made of. A parameter that is tied to one of another side
    is upstream. A module of another kind may offer an ``upstream_parameters()`` of its own.

    Returns:
        Leaves of ``module.parameters()``, each once, in their order.
    """
    found = set(map(id, _named(module, ("scoring", "gate"))))
    for part in module.modules():
        own = getattr(part, "upstream_parameters", None)
        if callable(own) and not isinstance(part, (*LAYERS, TwoSided, reference.DSTS)):
            found.update(map(id, own()))
    return [p for p in module.parameters() if id(p) in found]


def downstream_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Every other parameter of ``module``: with :func:`upstream_parameters` a partition of ``module.parameters()``."""
    upstream = {id(p) for p in upstream_parameters(module)}
    return [p for p in module.parameters() if id(p) not in upstream]


class TwoSided(nn.Module):
    """A module whose own parameters have an upstream and a downstream side."""

    def upstream_parameters(self) -> list[nn.Parameter]:
        """What Upstream-Downstream Learning trains on the validation split: scoring kernels and gates.

        As :func:`dsts_kernels.learning.upstream_parameters`: leaves, each once, those of a parametrization too.
        """
        return upstream_parameters(self)

    def downstream_parameters(self) -> list[nn.Parameter]:
        """Everything else: operators, mixing and norms."""
        return downstream_parameters(self)
