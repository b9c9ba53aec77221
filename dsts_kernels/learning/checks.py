"""What a learner can work with: optimizers that own a side each, and compiled code that sees which side is frozen."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._checks import describe
from .sharded import is_sharded

__all__ = ["OLD_COMPILER", "combination", "is_compiled", "trained"]

# Compiled code of these versions does not see that a parameter has become frozen, or no longer is, and gives gradients
# as it was traced. So nothing is frozen there: all gradients are computed, and those of the other side dropped.
OLD_COMPILER = torch.__version__ < (2, 13)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs ``module`` or a part of it."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def combination(sides: tuple[list[nn.Parameter], ...], *, compiled: bool, scaled: bool) -> None:
    """Refuse what does not go together with parameters of ``fully_shard``."""
    if compiled and OLD_COMPILER and any(is_sharded(p) for side in sides for p in side):
        raise ValueError(
            f"module: got torch.compile with fully_shard in torch {torch.__version__}, whose compiled code does not "
            "see which side is frozen; wanted torch 2.13 or later, or one of them"
        )
    if scaled and any(len(set(map(is_sharded, side))) > 1 for side in sides):
        raise ValueError(
            "scaler: got one with parameters in groups of fully_shard and others in none, which it cannot unscale "
            "together; wanted fully_shard(module) as well, or no scaler"
        )


def trained(
    module: nn.Module, side: list[nn.Parameter], optimizer: torch.optim.Optimizer, argument: str
) -> list[nn.Parameter]:
    """Those of a side that require gradients, when ``optimizer`` owns exactly them."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{argument}: got {describe(optimizer)}, wanted a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"{argument}: got LBFGS, wanted an optimizer whose step needs no closure")
    names = {id(p): name for name, p in module.named_parameters()}
    wanted = {id(p) for p in side if p.requires_grad}
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for found, problem in ((owned - wanted, "owns"), (wanted - owned, "lacks")):
        if found:
            listed = sorted(names.get(i, "a parameter of another module") for i in found)
            shown = ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
            kind = argument.removesuffix("_optimizer")
            hint = f"wanted exactly the {kind} parameters that require gradients ({kind}_parameters(module))"
            raise ValueError(f"{argument}: {problem} {shown}; {hint}")
    if not wanted:
        raise ValueError(f"{argument}: none of its side's parameters requires a gradient, wanted some")
    return [p for p in side if id(p) in wanted]
