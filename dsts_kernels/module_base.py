"""What ``DSTSLayer``, ``FusedDSTS`` and ``FrozenDSTS`` have in common: what they take, and that none is scripted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from .ops import _checks
from .ops._library import autocast_on
from .routing import Draws, Routing

__all__ = ["NotScripted", "Routed", "check_input", "memory_format"]


class NotScripted(nn.Module):
    """Refuses ``torch.jit.script``, whose language has no way to choose kernels, with one clear error."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script: got {type(self).__name__}, which chooses its kernels as it runs; wanted "
            "torch.jit.trace, torch.export.export or torch.compile"
        )


class Routed(NotScripted):
    """What is called as the DSTS module is: for type checkers, as torch says "anything" of every module's call."""

    if TYPE_CHECKING:

        @overload
        def __call__(self, x: Tensor, draws: Draws | None = None, return_routing: Literal[False] = False) -> Tensor: ...
        @overload
        def __call__(
            self, x: Tensor, draws: Draws | None = None, *, return_routing: Literal[True]
        ) -> tuple[Tensor, Routing]: ...


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format a drop-in layer returns for ``x``."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def check_input(x: object, channels: int, like: Tensor | None) -> None:
    """Refuse what is not ``(B, channels, T, H, W)`` features in the dtype and on the device of ``like``, if given."""
    x = _checks.features("x", x, channels)
    if like is None:
        return
    if x.device != like.device:
        raise ValueError(f"x: got a tensor on {x.device}, wanted {like.device}, where the module is")
    if x.dtype != like.dtype and not autocast_on(x):
        raise TypeError(f"x: got {_checks.describe(x)}, wanted {like.dtype}, the module's dtype")
