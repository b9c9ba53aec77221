"""Ways to run a gated convolution for the samples of one neuron: what each has to do. :mod:`.direct` is one for every
dtype, :mod:`.winograd` a faster one for some; a backend says which runs (:meth:`.grouped.GroupedBackend.convolution`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .base import FrozenOptions, FrozenWeights
from .convolution import Kernel
from .groups import Costs, Group
from .packing import Place
from .passes import Epilogue


class GatedConvolution(ABC):
    """One neuron's operators are ``spatial (O, C, 1, 3, 3)`` and ``temporal (O, C, 3, 1, 1)``.

    ``x``, ``grad``, ``gate``, ``out``, ``dx`` and ``dgate`` are of the whole batch; a group says which samples count.
    """

    costs: Costs  # what groups are made by

    @abstractmethod
    def gated_conv(self, x: Tensor, gate: Tensor, group: Group, spatial: Tensor, temporal: Tensor, out: Tensor) -> None:
        """``out[samples] = conv(spatial, gate*x) + conv(temporal, (1-gate)*x)``."""

    @abstractmethod
    def data_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        group: Group,
        spatial: Tensor,
        temporal: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        """Both operators' data gradients, merged into ``dx`` and ``dgate``.

        Gates that train need them for every channel; frozen gates need the listed channels only.
        """

    @abstractmethod
    def weight_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        group: Group,
        dspatial: Tensor | None,
        dtemporal: Tensor | None,
        add: bool,
    ) -> None:
        """Gradients of a neuron's operators over its listed channels, written or added to what is there."""

    @abstractmethod
    def frozen_neuron(
        self,
        x: Tensor,
        neuron: int,
        places: tuple[Place, Place],
        weights: FrozenWeights,
        options: FrozenOptions,
        epilogue: Epilogue,
    ) -> None:
        """A neuron's packed operators on the samples of the epilogue, then mixing where it does not fold."""

    @abstractmethod
    def mix(self, z: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, out: Tensor) -> Tensor:
        """``out[samples] = conv(weight (O, O, *kernel), z[samples])``; returns ``out``, or what takes its place."""

    @abstractmethod
    def mix_data_gradient(
        self, grad: Tensor, samples: Tensor | None, weight: Tensor, kernel: Kernel, dz: Tensor
    ) -> Tensor:
        """Likewise ``dz[samples]``, from ``grad[samples]``."""

    @abstractmethod
    def mix_weight_gradient(
        self, grad: Tensor, z: Tensor, samples: Tensor | None, kernel: Kernel, total: Tensor
    ) -> None:
        """The gradient of a neuron's mixing kernel, written to ``total``."""
