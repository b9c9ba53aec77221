"""What GPU backends share: every op put together from launches of kernels, of which each backend has its own.

:mod:`.kernels` states the launchers, :mod:`.lists` the integers they hand on; :mod:`.gated_conv`, :mod:`.mixing_conv`
and :mod:`.frozen_layer` say which run in which order. No kernel language is imported here.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..base import Backend, FrozenOptions, FrozenWeights
from .frozen_layer import frozen_layer
from .gated_conv import gated_conv3d, gated_conv3d_backward
from .kernels import Kernels
from .mixing_conv import mixing_conv3d, mixing_conv3d_backward

__all__ = ["GpuBackend", "Kernels"]


class GpuBackend(Backend):
    """Every op by the launchers of :attr:`kernels`."""

    @property
    @abstractmethod
    def kernels(self) -> Kernels:
        """The launchers, loaded when first asked for."""

    def packing(self, device: torch.device, dtype: torch.dtype, algorithm: str) -> str:
        return "tiled"

    def semhash_gate(self, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
        return self.kernels.semhash_gate(logits, neuron, noise, hard)

    def semhash_gate_backward(
        self, grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        return self.kernels.semhash_gate_backward(grad, logits, neuron, noise)

    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        return self.kernels.partial_tap_sums(x, taps).sum(1)

    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        return gated_conv3d(self.kernels, x, gate, neuron, spatial, temporal)

    def gated_conv3d_backward(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        neuron: Tensor,
        spatial: Tensor,
        temporal: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return gated_conv3d_backward(self.kernels, grad, x, gate, neuron, spatial, temporal, needs)

    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
        return mixing_conv3d(self.kernels, z, neuron, mixing)

    def mixing_conv3d_backward(
        self, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return mixing_conv3d_backward(self.kernels, grad, z, neuron, mixing, needs)

    def frozen_layer(
        self, x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if options.packing != "tiled":
            raise RuntimeError(
                f"backend: got a module packed {options.packing!r} for another backend, wanted one frozen for "
                f"{self.name!r}: freeze(backend={self.name!r}), or move it to the GPU"
            )
        return frozen_layer(self.kernels, x, sums, skip, w, options)
