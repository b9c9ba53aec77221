"""``FrozenDSTS``: a trained module folded, packed and made ready for inference (DESIGN 2.3).

At inference a layer is linear up to its activation and its gates are hard, so mixing and BatchNorm fold into the
operators, and each neuron keeps only the weights its gates let through: ``9*|b| + 3*(C - |b|)`` taps an output
instead of ``12*C + O``. Folding is done in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import ops
from .backends import choose
from .backends.base import FrozenOptions, FrozenWeights, accumulate_dtype
from .backends.packing import pack, pack_mixing, places, unpack_at, unpack_mixing
from .modules import DSTSLayer, NotScripted, check_input, memory_format
from .ops import _checks
from .routing import Draws, Routing, check_draws

if TYPE_CHECKING:
    from .modules import FusedDSTS

__all__ = ["FrozenDSTS", "FrozenLayer"]

ALGORITHMS = ("auto", "direct", "winograd")


class FrozenLayer(nn.Module):
    """The packed weights of one layer, as buffers: see :class:`~dsts_kernels.backends.base.FrozenWeights`."""

    def __init__(self, layer: DSTSLayer, dtype: torch.dtype, packing: str) -> None:
        super().__init__()
        self.packing = packing
        wide = accumulate_dtype(dtype)
        scale, shift = _norm_affine(layer)
        folds = layer.mixing_kernel == (1, 1, 1)
        hard = layer.gate > 0
        self.score_elements = layer.scoring.shape[1] if layer.score_reduction == "mean" else 0
        self.relu = layer.activation == "relu"
        self.mixing_kernel = list(layer.mixing_kernel)

        # A stable sort of "not spatial" lists the spatial channels first, each part in order.
        channels = (~hard).to(torch.int8).sort(dim=1, stable=True).indices
        packed = [
            pack(panel.to(dtype), packing)
            for n in range(len(hard))
            for panel in _panels(layer, n, channels[n], hard[n], scale if folds else None)
        ]
        self.register_buffer("scoring", ops.collapse_scoring(layer.scoring).to(wide))
        self.register_buffer("gate", hard)
        self.register_buffer("channels", channels.to(torch.int32))
        self.register_buffer("starts", torch.nn.functional.pad(hard.sum(1).cumsum(0), (1, 0)))
        self.register_buffer("filters", torch.cat(packed))
        self.register_buffer("bias", shift.to(wide).expand(len(hard), -1).clone())
        mixing = None
        if not folds:
            scaled = layer.mixing.double() * scale[None, :, None, None, None, None]
            panels = scaled.flatten(3).transpose(2, 3).to(dtype).contiguous()
            mixing = torch.stack([pack_mixing(panel, packing) for panel in panels])
        self.register_buffer("mixing", mixing)

    def _apply(self, fn, recurse: bool = True) -> FrozenLayer:
        """Moves to another device; scores and biases keep their dtype when a parent module is cast."""
        exact = {name: getattr(self, name) for name in ("scoring", "bias")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def repack(self, packing: str) -> None:
        """Lays filters out for another device's kernels, bit for bit the same."""
        if packing == self.packing:
            return
        outputs, channels = self.bias.shape[1], self.channels.shape[1]
        where = places(self.starts.tolist(), channels, outputs, self.packing, self.filters.dtype)
        panels = [
            unpack_at(self.filters, place, self.packing, outputs, taps)
            for pair in where
            for place, taps in zip(pair, (9, 3), strict=True)
        ]
        self.filters = torch.cat([pack(panel, packing) for panel in panels])
        if self.mixing is not None:
            taps = math.prod(self.mixing_kernel)
            panels = [unpack_mixing(mixing, self.packing, outputs, taps) for mixing in self.mixing]
            self.mixing = torch.stack([pack_mixing(panel, packing) for panel in panels])
        self.packing = packing

    def weights(self) -> FrozenWeights:
        return FrozenWeights(*map(self._buffers.get, FrozenWeights._fields))

    def options(self, x: Tensor, next_taps: int) -> FrozenOptions:
        positions = x.shape[2] * x.shape[3] * x.shape[4]
        return FrozenOptions(
            self.score_elements * positions or 1, self.mixing_kernel, self.relu, self.packing, next_taps
        )


def _norm_affine(layer: DSTSLayer) -> tuple[Tensor, Tensor]:
    """BatchNorm at inference as ``scale*z + shift``: two ``(O,)`` in float64."""
    norm = layer.norm
    if norm is None:
        ones = torch.ones(layer.out_channels, dtype=torch.float64, device=layer.gate.device)
        return ones, torch.zeros_like(ones)
    if norm.running_mean is None:
        raise ValueError("norm: got a BatchNorm without running statistics, wanted one that tracks them")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _panels(layer: DSTSLayer, n: int, channels: Tensor, hard: Tensor, scale: Tensor | None) -> Iterator[Tensor]:
    """Neuron ``n``'s two panels ``(O, taps, c)`` in float64; folded with mixing and norm where ``scale`` is given."""
    split = int(hard.sum())
    fold = None if scale is None else layer.mixing[n].flatten(1).double() * scale[:, None]
    for weight, own in ((layer.spatial, channels[:split]), (layer.temporal, channels[split:])):
        panel = weight[n].index_select(1, own).flatten(2).transpose(1, 2).double()  # (O, taps, c)
        yield panel if fold is None else (fold @ panel.flatten(1)).view(panel.shape)


class FrozenDSTS(NotScripted):
    """A DSTS module for inference: same call as :class:`FusedDSTS`, no autograd, packed weights only.

    Made by :meth:`FusedDSTS.freeze`; independent of its source afterwards. It can be pickled, deep-copied,
    moved to another device and exported with ``torch.export``. It behaves as the source does in evaluation.

    Args:
        source: the module to freeze.
        dtype: of features and packed weights; ``None`` keeps the source's. Scores and biases stay float32.
        algorithm: ``"winograd"`` packs for fast convolution, ``"direct"`` for the library's; ``"auto"`` takes
            fast convolution where the backend has it (a CPU, float32 and half types). On a GPU both are direct, ours.
        backend: the name of a backend; ``None`` keeps the source's choice.

    Raises:
        TypeError: ``dtype`` is not a floating dtype we run in.
        ValueError: a BatchNorm of the source has no running statistics, or ``algorithm`` is unknown or cannot run.
    """

    def __init__(
        self,
        source: FusedDSTS,
        *,
        dtype: torch.dtype | None = None,
        algorithm: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        first = source.layers[0]
        dtype = first.gate.dtype if dtype is None else dtype
        if dtype not in _checks.FLOATS:
            raise TypeError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, _checks.FLOATS))}")
        self.in_channels, self.num_neurons = first.in_channels, first.num_neurons
        self.dtype, self.skip = dtype, source.skip
        self.backend = first.backend if backend is None else backend
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: got {algorithm!r}, wanted {' or '.join(map(repr, ALGORITHMS))}")
        device = first.gate.device
        chosen = choose("frozen_layer", device, dtype, self.backend)
        reason = chosen.why_not_fast(device, dtype)
        if algorithm == "winograd" and reason is not None:
            raise ValueError(f"algorithm: got 'winograd', wanted 'auto' or 'direct' for {dtype} on {device}: {reason}")
        self.algorithm = algorithm
        packing = chosen.packing(device, dtype, algorithm)
        with torch.no_grad():
            self.layers = nn.ModuleList(FrozenLayer(layer, dtype, packing) for layer in source.layers)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenDSTS:
        """Refused for ``mode=True``: a frozen module has nothing to train."""
        if mode:
            raise RuntimeError("train(mode): got True, wanted False: a frozen module only infers; train its source")
        return super().train(False)

    def _apply(self, fn, recurse: bool = True) -> FrozenDSTS:
        probe = fn(self.layers[0].filters[:0])
        got = probe.dtype
        if got != self.dtype:
            raise TypeError(
                f"dtype: got a conversion from {self.dtype} to {got}, wanted none: freeze the source with "
                f"freeze(dtype={got}), which rounds once"
            )
        if probe.is_meta:
            return super()._apply(fn, recurse)
        chosen = choose("frozen_layer", probe.device, got, self.backend)  # an error here spoils nothing
        super()._apply(fn, recurse)
        for layer in self.layers:
            layer.repack(chosen.packing(probe.device, got, self.algorithm))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_channels}, num_neurons={self.num_neurons}, skip={self.skip}, dtype={self.dtype}"

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to the same shape, in the memory format of ``x``; see :meth:`FusedDSTS.forward`."""
        check_input(x, self.in_channels, self.layers[0].filters)
        if torch.is_grad_enabled():  # asking costs less than entering
            with torch.no_grad():
                return self._run(x if x.dtype == self.dtype else x.to(self.dtype), draws, return_routing)
        return self._run(x if x.dtype == self.dtype else x.to(self.dtype), draws, return_routing)

    def _run(self, x: Tensor, draws: Draws | None, return_routing: bool) -> Tensor | tuple[Tensor, Routing]:
        layers = list(self.layers)
        first, last = layers[0], len(layers) - 1
        if draws is not None:
            size = (len(layers), x.shape[0])
            check_draws(draws, size, self.in_channels, self.num_neurons, first.filters)
        h, sums, routings = x, None, []
        for index, layer in enumerate(layers):
            next_taps = 0 if index == last else layers[index + 1].scoring.shape[2]
            h, sums, neuron, scores = ops.frozen_layer(
                h,
                sums,
                x if self.skip and index == last else None,
                layer.weights(),
                layer.options(x, next_taps),
                backend=self.backend,
            )
            if return_routing:
                routings.append(Routing(neuron, scores, layer.gate[neuron].to(self.dtype)))
        if not self.skip:
            h = h.contiguous(memory_format=memory_format(x))
        if not return_routing:
            return h
        return h, Routing(*(torch.stack(field) for field in zip(*routings, strict=True)))
