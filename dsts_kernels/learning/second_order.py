"""Line 6 of Algorithm 1 differentiated through line 4, as DARTS does (Liu et al., ICLR 2019, equations 7 and 8).

With ``d^ = d - a grad_d loss(u, d)`` the gradient of the validation loss has a second term,

    grad_u loss_v(u, d^) - grad_u <grad_d loss(u, d), w>,    w = a grad_d^ loss_v(u, d^),

``a`` being each parameter's learning rate: what plain SGD does, and the usual approximation for other optimizers.
The product is exact where every op of the model can be differentiated twice; ours cannot, and then it is the central
difference ``(grad_u loss(u, d + e w) - grad_u loss(u, d - e w)) / 2e`` with ``e = 0.01 / |w|``. Gate and Gumbel noise
are those of line 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops._library import NO_DERIVATIVE
from .distributed import norm
from .sharded import local
from .state import Frozen, Tensors

__all__ = ["central_difference", "exact_product", "learning_rates"]

STEP = 0.01  # of the central difference, relative to the direction's length


def learning_rates(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[float]:
    """The learning rate of each parameter."""
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return [rates[id(p)] for p in parameters]


def exact_product(
    loss: Tensor, upstream: Sequence[Tensor], downstream: Sequence[Tensor], direction: Sequence[Tensor]
) -> list[Tensor] | None:
    """``grad_u <grad_d loss, direction>``; ``None`` where an op has no second derivative."""
    first = torch.autograd.grad(loss, list(downstream), create_graph=True, allow_unused=True)
    product = sum((g * w).sum() for g, w in zip(first, direction, strict=True) if g is not None)
    if not isinstance(product, Tensor) or not product.requires_grad:
        return [torch.zeros_like(p) for p in upstream]
    if refuses(product):
        return None
    found = torch.autograd.grad(product, list(upstream), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(upstream, found, strict=True)]


def refuses(value: Tensor) -> bool:
    """Whether an op below ``value`` has no further derivative. Asked of autograd, it says so only where it must run."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith(NO_DERIVATIVE) or node.name().endswith("autograd::Error"):
            return True
        seen.add(node)
        waiting += [follower for follower, _ in node.next_functions]
    return False


def central_difference(
    gradient: Callable[[], list[Tensor]], downstream: Sequence[nn.Parameter], direction: Sequence[Tensor]
) -> list[Tensor]:
    """The same product from ``gradient()``, which is ``grad_u loss`` at the parameters' present values."""
    length = norm(direction)
    kept = Tensors()
    kept.save(downstream)
    sides = []
    try:
        for sign in (1.0, -1.0):
            step = sign * STEP / length if length else 0.0
            with torch.no_grad(), Frozen(downstream):
                torch._foreach_add_([local(p.detach()) for p in downstream], [local(w) for w in direction], alpha=step)
            sides.append(gradient())
            kept.restore()
    finally:
        kept.restore()
    scale = length / (2 * STEP)
    return [(above - below) * scale for above, below in zip(*sides, strict=True)]
