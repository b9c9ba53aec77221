"""The CPU backend: thin launchers over the native module ``dsts_kernels._C``.

Each launcher hands tensors, and records of them, to one kernel, on torch's own thread count, and allocates what it
returns. Convolutions are fast ones where :mod:`.winograd` has them, else the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import FLOATS, FrozenOptions, FrozenSource, FrozenWeights, accumulate_dtype
from .build import _C, warn_if_missing, why_no_module
from .gated import GatedConvolution
from .grouped import GroupedBackend
from .groups import check_neurons
from .passes import Epilogue, GradientPanel, as_features, empty_ndhwc
from .routing import HostRouting
from .winograd import Operator, WinogradConvolution, tile_sizes

__all__ = ["CpuBackend"]


class CpuBackend(GroupedBackend):
    """Native kernels on CPU tensors; the library's convolutions where there is no fast one."""

    name = "cpu"
    stage_seconds: Tensor | None = None  # (4,) float64: fast convolution adds the time of its stages, where set
    one_call = True  # frozen layers are one native call where they can be; a profile by stage looks into them
    remark = "native kernels: fast convolution in float32, half types computed so; float64 around oneDNN"

    def __init__(self) -> None:
        super().__init__()
        self.fast = WinogradConvolution(self)
        self.kernels = HostRouting(self)

    def fuses_routing(self, batch: int, neurons: int) -> bool:
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

    def convolution(self, dtype: torch.dtype) -> GatedConvolution:
        return self.fast if self.fast.why_not(dtype) is None else self.direct

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
    ) -> Tensor:
        b, c, *grid = src.shape
        b = b if samples is None else samples.numel()
        c = c if channels is None else channels.numel()
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
        """In one native call where filters are packed for fast convolution."""
        if options.packing != "blocked" or not self.one_call:
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
        """All layers of a module in one native call, written to ``y``."""
        if not self.one_call:
            return None
        prepared = []
        for layer in layers:
            stamp = layer.settled()
            if layer.prepared is None or layer.prepared[0] is not stamp:
                weights, options = layer.weights(), layer.options(0)
                if options.packing != "blocked" or not all(map(_plain, weights)):
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
        """In one native call, for dtypes that have a fast convolution."""
        if not self.one_call or self.fast.why_not(x.dtype) is not None:
            return None
        batch, (num_neurons, outputs) = x.shape[0], spatial.shape[:2]
        scoring, logits, spatial, temporal = map(_dense, (collapsed(), logits, spatial, temporal))
        neuron = torch.empty(batch, dtype=torch.int64, device="cpu")
        scores = scoring.new_empty((batch, num_neurons))
        gate = logits.new_empty((batch, x.shape[1]))
        z = as_features(empty_ndhwc(x, outputs))
        threads, seconds = torch.get_num_threads(), self.stage_seconds
        _C.live_layer(x, scoring, divisor, logits, spatial, temporal, z, neuron, scores, gate, threads, seconds)
        return neuron, scores, gate, z

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
