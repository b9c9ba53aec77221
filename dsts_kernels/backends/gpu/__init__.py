"""What GPU backends share: every op put together from launches of kernels, of which each backend has its own.

:mod:`.kernels` states the launchers, :mod:`.lists` the integers they hand on, :mod:`.grids` how work is cut into tiles;
:mod:`.gated_conv`, :mod:`.mixing_conv` and :mod:`.frozen_layer` say which launchers run in which order. No kernel
language is imported here.
"""

from __future__ import annotations

import functools
from abc import abstractmethod, update_abstractmethods
from collections.abc import Callable

import torch
from torch import Tensor

from ..base import ONE_LAUNCH, Backend
from . import switches
from .frozen_layer import FrozenLayer
from .gated_conv import GatedConv
from .kernels import Kernels
from .mixing_conv import MixingConv

__all__ = ["GpuBackend", "Kernels"]

# Most samples times neurons of a choice in one launch, whose backward kernel goes through the samples one after the
# other; and most neurons, of which that kernel has three tiles of 16 channels in registers: 96 a thread.
FUSED_CHOICES, FUSED_NEURONS = 4096, 256


class GpuBackend(GatedConv, MixingConv, FrozenLayer, Backend):
    """Every op by the launchers of :attr:`kernels`; those of ``ONE_LAUNCH`` are one launch each."""

    @property
    @abstractmethod
    def kernels(self) -> Kernels:
        """The launchers, loaded when first asked for."""

    def packing(self, device: torch.device, dtype: torch.dtype, algorithm: str) -> str:
        return "tiled"

    def fuses_routing(self, batch: int, neurons: int) -> bool:
        """Whether the choice and its gradients are a launch each: small ones are, where a backend has the kernels."""
        small = batch * neurons <= FUSED_CHOICES and neurons <= FUSED_NEURONS
        return small and switches.current().fuse_routing and hasattr(self.kernels, "route")

    def route(self, *args: object) -> tuple[Tensor | None, ...]:
        """The choice in one launch: see :class:`.kernels.FusedRouting`, where :meth:`fuses_routing`."""
        return self.kernels.route(*args)

    def route_backward(self, *args: object) -> tuple[Tensor | None, ...]:
        """All gradients of the choice, likewise."""
        return self.kernels.route_backward(*args)

    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        return self.kernels.partial_tap_sums(x, taps).sum(1)


def _one_launch(name: str) -> Callable:
    @functools.wraps(getattr(Backend, name))
    def op(self: GpuBackend, *args: object, **kwargs: object) -> object:
        return getattr(self.kernels, name)(*args, **kwargs)

    del op.__isabstractmethod__
    return op


for _name in ONE_LAUNCH:
    setattr(GpuBackend, _name, _one_launch(_name))
update_abstractmethods(GpuBackend)
