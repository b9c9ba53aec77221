"""``FusedDSTS``: the module, layers and a skip connection."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from . import ops
from .backends import BACKENDS
from .frozen import FrozenDSTS
from .graphed import Graphed, weights_of
from .layer import DSTSLayer
from .module_base import Routed, check_input, memory_format
from .ops import _checks
from .options import LayerOptions, OptionKeywords, count, one_of, takes_options
from .routing import Draws, Routing, check_draws, sample_draws
from .sides import TwoSided

__all__ = ["DSTSLayer", "FusedDSTS"]


@takes_options
class FusedDSTS(TwoSided, Routed):
    """The DSTS module: ``num_layers`` layers and a skip connection, same shape in and out.

    Args:
        in_channels: ``C``, 1024 for the features of TPN and Video Swin-B.
        num_layers: ``L``.
        skip: add the input to the last layer's output (Table 1 of the paper).
        {options}
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument out of range; input that is not a dense floating 5-d tensor of the
            module's channels, dtype and device; draws of another shape or dtype. Before any kernel runs.

    Source: ``docs/design.md``; Algorithm 1 and Tables 1 to 3 of the paper for what is studied.

    >>> dsts = FusedDSTS(16, num_neurons=4)
    >>> features = torch.randn(2, 16, 8, 7, 7)
    >>> y, routing = dsts(features, return_routing=True)
    >>> y.shape, routing.neuron.shape
    (torch.Size([2, 16, 8, 7, 7]), torch.Size([3, 2]))
    >>> fast = dsts.eval().freeze()  # folded and packed, inference only
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_layers: int = 3,
        skip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        super().__init__()
        if not isinstance(skip, bool):
            raise TypeError(f"skip: got {_checks.describe(skip)}, wanted a bool")
        LayerOptions.read(type(self), options)
        self.skip = skip
        self.layers = nn.ModuleList(
            DSTSLayer(in_channels, device=device, dtype=dtype, **options)
            for _ in range(count("num_layers", num_layers))
        )

    def extra_repr(self) -> str:
        return f"skip={self.skip}"

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to the same shape, in the memory format of ``x``.

        Args:
            x: features in the module's dtype, any stride order.
            draws: see :class:`Draws`; sampled in training when left out, checked and unused in evaluation.
            return_routing: also return :class:`Routing`.
        """
        first = self.layers[0]
        gate = first._parameters.get("gate")
        # Parameters may be sharded or made up until a layer runs; then it is the layer that checks dtype and device.
        check_input(x, first.in_channels, gate if type(gate) is nn.Parameter else None)
        size = (len(self.layers), x.shape[0])
        if draws is not None:
            draws = check_draws(draws, size, first.in_channels, first.num_neurons, x)
        elif self.training:
            draws = self._sample_draws(x)
        h, routings = x, []
        for index, layer in enumerate(self.layers):
            mine = None if draws is None else Draws(*(field[index] for field in draws))
            h, routing = layer(h, mine, return_routing=True)
            routings.append(routing)
        h = ops.to_memory_format(h, memory_format(x))
        h = x + h if self.skip else h
        if not return_routing:
            return h
        return h, Routing(*(torch.stack(field) for field in zip(*routings, strict=True)))

    def set_noise(self, *, noise_std: float | None = None, gumbel_scale: float | None = None) -> None:
        """Change the noise of later passes, of every layer: see :meth:`DSTSLayer.set_noise`.

        :class:`dsts_kernels.learning.NoiseSchedule` does so from step to step.
        """
        for layer in self.layers:
            layer.set_noise(noise_std=noise_std, gumbel_scale=gumbel_scale)

    def _sample_draws(self, x: Tensor, scales: tuple[float | Tensor, float | Tensor] | None = None) -> Draws:
        """Fresh draws for features ``x``; ``scales`` are used for ``noise_std`` and ``gumbel_scale``."""
        first = self.layers[0]
        noise_std, gumbel_scale = scales or (first.noise_std, first.gumbel_scale)
        return sample_draws(
            x.shape[0],
            first.in_channels,
            first.num_neurons,
            len(self.layers),
            noise_std=noise_std,
            hard_fraction=first.hard_fraction,
            gumbel_scale=gumbel_scale,
            device=x.device,
            dtype=x.dtype,
        )

    def graphed(
        self,
        sample: Tensor,
        *,
        draws: Draws | None = None,
        return_routing: bool = False,
        static_output: bool = False,
    ) -> Graphed:
        """CUDA graphs of forward and backward passes, called like the module: see :class:`Graphed`.

        Args:
            sample: features of the shape, dtype, strides and ``requires_grad`` of those to come; the phase that the
                module is in now is captured at once, others when they are first met.
            draws: an example, where draws are to be inputs of the graphs; else they are drawn in the graphs.
            return_routing: capture the routing too; then each call may ask for it or not.
            static_output: return the graphs' own memory, which the next call overwrites, and save a copy of it.

        >>> graphed = dsts.graphed(features)  # on a CUDA device  # doctest: +SKIP
        >>> y = graphed(features)  # doctest: +SKIP
        """
        return Graphed(self, sample, draws, return_routing, static_output, weights_of(self), self._drawn)

    def _drawn(self, x: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> Draws | None:
        return self._sample_draws(x, scales) if self.training else None

    def freeze(
        self, *, dtype: torch.dtype | None = None, algorithm: str = "auto", backend: str | None = None
    ) -> FrozenDSTS:
        """A folded and packed copy for inference: see :class:`FrozenDSTS`.

        Args:
            dtype: of its features and packed weights; ``None`` keeps the module's.
            algorithm: of its convolutions: ``"auto"``, ``"direct"`` or ``"winograd"``.
            backend: the name of a backend; ``None`` keeps the module's choice.
        """
        one_of("backend", backend, (None, *BACKENDS))
        return FrozenDSTS(self, dtype=dtype, algorithm=algorithm, backend=backend)
