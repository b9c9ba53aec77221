"""The CPU backend: thin launchers over the native module ``dsts_kernels._C``.

Each launcher hands tensors, and records of them, to one kernel, on torch's own thread count, and allocates what it
returns. Convolutions are fast ones where :mod:`.winograd` has them, else the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import processor
from .algorithm import wanted_algorithm
from .base import FLOATS, FrozenOptions, FrozenSource, FrozenWeights, accumulate_dtype
from .build import _C, warn_if_missing, why_no_module
from .direct import DirectConvolution
from .gated import GatedConvolution
from .grouped import GroupedBackend
from .groups import MATRIX_COSTS, check_neurons, matrix_is_cheaper
from .packing import BLOCKED
from .passes import Epilogue, GradientPanel, as_features, compute_dtype, empty_ndhwc, positions_of
from .routing import HostRouting
from .winograd import Operator, WinogradConvolution, tile_sizes

__all__ = ["CpuBackend"]

CONVOLUTIONS = ("gated_conv3d", "mixing_conv3d", "frozen_layer")


class CpuBackend(HostRouting, GroupedBackend):
    """Native kernels on CPU tensors; the library's convolutions where there is no fast one."""

    name = "cpu"
    stage_seconds: Tensor | None = None  # (4,) float64: fast convolution adds the time of its stages, where set
    one_call = True  # layers are one native call where they can be; a profile by stage looks into them
    remark = "native kernels: fast convolution in float32; half types so too, or on matrix units; float64 around oneDNN"

    def __init__(self) -> None:
        super().__init__()
        self.fast = WinogradConvolution(self)
        self.matrix = DirectConvolution(self, MATRIX_COSTS)

    def fuses_routing(self, batch: int, neurons: int) -> bool:
        return self.one_call

    def trains_in_one_step(self) -> bool:
        return self.one_call

    def missing(self) -> str | None:
        why = why_no_module()
        return None if why is None else f"{why}; plain PyTorch runs instead, with more passes over memory"

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPU tensors, not on {device.type}"
        if dtype not in FLOATS:
            return f"{dtype} is not one of {', '.join(map(str, FLOATS))}"
        return self.missing()

    def why_not_fast(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.fast.why_not(dtype)

    def product_dtype(self, tensor: Tensor) -> torch.dtype:
        """A half type's own where a unit of this processor multiplies it faster than float32."""
        return tensor.dtype if processor.unit_of(tensor.dtype) is not None else compute_dtype(tensor)

    def convolution(self, x: Tensor, outputs: int, step: str = "forward") -> GatedConvolution:
        """What :class:`.algorithm.use_algorithm` asks for; else direct convolution in float64, and on a matrix unit
        where it costs less than fast convolution: the same for the same size on every such machine.
        """
        reason, wanted = self.fast.why_not(x.dtype), wanted_algorithm()
        if wanted == "winograd" and reason is not None:
            raise RuntimeError(f"use_algorithm='winograd' cannot run in {x.dtype}: {reason}")
        if wanted == "direct" or reason is not None:
            return self.direct if processor.unit_of(x.dtype) is None else self.matrix
        if wanted == "winograd" or not processor.offers(x.dtype):
            return self.fast
        cheaper = matrix_is_cheaper(positions_of(x), x.shape[1], outputs)
        return self.matrix if cheaper and processor.beats_fast_convolution(x.dtype, step) else self.fast

    def frozen_convolution(self, x: Tensor, outputs: int, packing: str) -> GatedConvolution:
        """``freeze(algorithm=...)`` packed for it; what packed for either is decided here."""
        return self.fast if packing == "winograd" else super().frozen_convolution(x, outputs, packing)

    def note(self, op: str, device: torch.device, dtype: torch.dtype) -> str:
        """What convolves: as :class:`.algorithm.use_algorithm` asks, or by what the processor has for half types."""
        wanted, reason = wanted_algorithm(), self.fast.why_not(dtype)
        if op not in CONVOLUTIONS or (wanted == "auto" and dtype not in processor.UNITS):
            return self.remark
        if wanted == "winograd" and reason is not None:
            return f"native kernels, but use_algorithm='winograd' is an error: {reason}"
        if wanted != "auto":
            half = wanted == "direct" and processor.unit_of(dtype) is not None
            products = processor.name_of(dtype if half else accumulate_dtype(dtype))
            return f"native kernels: {wanted} convolution, computed in {products}, as use_algorithm asks"
        unit = processor.unit_of(dtype)
        way = (
            "fast convolution, computed in float32"
            if unit is None or not unit.matrix
            else f"direct convolution in {processor.name_of(dtype)} where it costs less than fast convolution"
        )
        return f"native kernels: {way}; {processor.describe(dtype)}"

    def semhash_gate(self, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
        if neuron is not None:
            check_neurons(neuron, logits.shape[0])
        logits, neuron, noise, hard = map(_dense, (logits, neuron, noise, hard))
        gate = logits.new_empty((logits if neuron is None else neuron).shape[0], logits.shape[1])
        _C.semhash_forward(logits, neuron, noise, hard, gate, torch.get_num_threads())
        return gate

    def semhash_gate_backward(
        self, grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        grad, logits, neuron, noise = map(_dense, (grad, logits, neuron, noise))
        dlogits = torch.empty_like(logits)
        _C.semhash_backward(grad, logits, neuron, noise, dlogits, torch.get_num_threads())
        return dlogits

    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        out = torch.empty((*x.shape[:2], taps), dtype=accumulate_dtype(x.dtype), device=x.device)
        _C.tap_sums(x, out, torch.get_num_threads())
        return out

    def gather_panel(
        self,
        src: Tensor,
        samples: Tensor | None = None,
        channels: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        complement: bool = False,
        channels_first: bool = False,
        dtype: torch.dtype | None = None,
        width: int | None = None,
    ) -> Tensor:
        b, c, *grid = src.shape
        b = b if samples is None else samples.numel()
        c = width if width is not None else c if channels is None else channels.numel()
        panel = torch.empty((b, c, *grid) if channels_first else (b, *grid, c), dtype=dtype or src.dtype, device="cpu")
        out = panel if channels_first else panel.permute(0, 4, 1, 2, 3)
        _C.gather_panel(src, samples, channels, _dense(scale), complement, out, torch.get_num_threads())
        return panel

    def epilogue(self, spatial: Tensor | None, temporal: Tensor | None, epilogue: Epilogue) -> None:
        _C.epilogue(spatial, temporal, epilogue, torch.get_num_threads())

    def gate_merge(
        self,
        spatial: GradientPanel,
        temporal: GradientPanel,
        samples: Tensor | None,
        gate: Tensor,
        x: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        gate = gate.to(x.dtype)
        gate = gate if gate.stride(1) == 1 else gate.contiguous()
        written = None if dgate is None else torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
        _C.gate_merge(spatial, temporal, samples, gate, x, dx, written, torch.get_num_threads())
        if dgate is not None:  # which may be of another dtype, or a block of channels
            where = slice(None) if samples is None else samples
            dgate[where] = written[where].to(dgate.dtype)

    def winograd(
        self,
        x: Tensor,
        spatial: Operator | None,
        temporal: Operator | None,
        epilogue: Epilogue,
        x_samples: Tensor | None = None,
    ) -> None:
        """Both convolutions of ``x[x_samples]``, summed, as ``z`` of an epilogue."""
        b, _, t, h, w = x.shape
        tiles = tile_sizes(b if x_samples is None else x_samples.numel(), t, h, w)
        threads = torch.get_num_threads()
        _C.winograd(x, x_samples, spatial, temporal, epilogue, tiles, threads, self.stage_seconds)

    def winograd_weight_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        samples: Tensor | None,
        spatial: Operator | None,
        temporal: Operator | None,
        add: bool = False,
    ) -> None:
        """The gradients of both filters, written (or added) where an operator's ``weight`` is."""
        b, _, t, h, w = x.shape
        tiles = tile_sizes(b if samples is None else samples.numel(), t, h, w)
        threads = torch.get_num_threads()
        _C.winograd_weight_gradient(x, grad, samples, spatial, temporal, add, tiles, threads, self.stage_seconds)

    def frozen_layer(
        self, x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In one native call where fast convolution is the way of it."""
        if not self._in_one_call(x, w.bias.shape[1], options.packing):
            return super().frozen_layer(x, sums, skip, w, options)
        batch, (num_neurons, outputs) = x.shape[0], w.bias.shape
        y = torch.empty_like(skip) if skip is not None else as_features(empty_ndhwc(x, outputs))
        next_sums = w.bias.new_empty((batch, outputs, options.next_taps))
        neuron = torch.empty(batch, dtype=torch.int64, device="cpu")
        scores = w.bias.new_empty((batch, num_neurons))
        self._run_frozen([prepare(w, options)], x, sums, skip, y, next_sums, neuron[None], scores[None])
        return y, next_sums, neuron, scores

    def frozen_layers(
        self, x: Tensor, skip: Tensor | None, y: Tensor, layers: Sequence[FrozenSource], routing: bool
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """All layers of a module in one native call, written to ``y``, where each of them is one alone."""
        if not all(self._in_one_call(x, y.shape[1], packing) for packing in {layer.packing for layer in layers}):
            return None
        prepared = []
        for layer in layers:
            stamp = layer.settled()
            if layer.prepared is None or layer.prepared[0] is not stamp:
                weights, options = layer.weights(), layer.options(0)
                if not all(map(_plain, weights)):
                    return None
                layer.prepared = stamp, prepare(weights, options)
            prepared.append(layer.prepared[1])
        neuron = scores = None
        if routing:
            neuron = torch.empty((len(layers), x.shape[0]), dtype=torch.int64, device="cpu")
            scores = torch.empty((len(layers), x.shape[0], layers[0].num_neurons), dtype=torch.float32, device="cpu")
        self._run_frozen(prepared, x, None, skip, y, None, neuron, scores)
        return neuron, scores

    def live_layer(
        self,
        x: Tensor,
        collapsed: Callable[[], Tensor],
        divisor: int,
        logits: Tensor,
        spatial: Tensor,
        temporal: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """In one native call where fast convolution is the way of it."""
        batch, (num_neurons, outputs) = x.shape[0], spatial.shape[:2]
        if not self.one_call or self.convolution(x, outputs) is not self.fast:
            return None
        scoring, logits, spatial, temporal = map(_dense, (collapsed(), logits, spatial, temporal))
        neuron = torch.empty(batch, dtype=torch.int64, device="cpu")
        scores = scoring.new_empty((batch, num_neurons))
        gate = logits.new_empty((batch, x.shape[1]))
        z = as_features(empty_ndhwc(x, outputs))
        threads, seconds = torch.get_num_threads(), self.stage_seconds
        _C.live_layer(x, scoring, divisor, logits, spatial, temporal, z, neuron, scores, gate, threads, seconds)
        return neuron, scores, gate, z

    def _in_one_call(self, x: Tensor, outputs: int, packing: str) -> bool:
        """Whether a frozen layer is fast convolution, as it was packed for, or is cheapest, or was asked for."""
        return self.one_call and packing in BLOCKED and self.frozen_convolution(x, outputs, packing) is self.fast

    def _run_frozen(self, *arguments: object) -> None:
        _C.frozen_layers(*arguments, torch.get_num_threads(), self.stage_seconds)


def prepare(w: FrozenWeights, options: FrozenOptions) -> object:
    """A frozen layer's weights as native code reads them."""
    return _C.FrozenLayer(*w, options.score_elements, options.mixing_kernel, options.relu)


def _plain(tensor: Tensor | None) -> bool:
    """Whether memory holds the values, and nobody sees what is done to them."""
    return tensor is None or (type(tensor) is Tensor and not (tensor.is_neg() or tensor._is_zerotensor()))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


warn_if_missing()
