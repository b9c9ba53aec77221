"""Every op that is timed by itself: what it takes, how it is called, and the bytes that it must move.

Ops are called by their schema, ``torch.ops.dsts_kernels``, and a frozen layer as a module of one layer: both outlive
changes inside the package, so one copy of this file times this commit and others. :mod:`benchmarks.op` times one op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import SPATIAL_TAPS, TEMPORAL_TAPS, Problem
from dsts_kernels import FusedDSTS

__all__ = ["FACTOR", "OPS", "Inputs", "Op", "op_flop"]

FACTOR = 5  # on the tolerance of a dtype, where two results are compared, each with an error of its own


class Inputs:
    """What any op takes at one shape, made on first use: features channels-last, as between two layers of a module.

    Every second sample is hard, beginning with the first; the others have a soft gate.

    copies: how many features take turns, so that a GPU finds none in its cache.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device, copies: int = 1) -> None:
        torch.manual_seed(0)
        self.problem, self.dtype, self.device = problem, dtype, device
        self.xs = [self.features() for _ in range(copies)]
        self.neuron = torch.arange(problem.batch, device=device) % problem.neurons  # (B,)
        self.hard = torch.arange(problem.batch, device=device) % 2 == 0  # (B,)
        self.packed: dict[str, nn.Module] = {}

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device).to(self.dtype)

    def features(self) -> Tensor:
        """``(B, C, T, H, W)``."""
        batch, channels, *grid = self.problem.feature_shape
        return self.randn(batch, *grid, channels).permute(0, 4, 1, 2, 3)

    def filters(self, *kernel: int) -> Tensor:
        """``(N, C, C, *kernel)``, whose convolutions keep the size of features."""
        n, c = self.problem.neurons, self.problem.channels
        return self.randn(n, c, c, *kernel) * (6 * c) ** -0.5

    @cached_property
    def grad(self) -> Tensor:
        return self.features()

    @cached_property
    def logits(self) -> Tensor:
        return self.randn(self.problem.neurons, self.problem.channels)

    @cached_property
    def noise(self) -> Tensor:
        return self.randn(self.problem.batch, self.problem.channels)

    @cached_property
    def grad_gate(self) -> Tensor:
        return self.randn(self.problem.batch, self.problem.channels)

    @cached_property
    def gate(self) -> Tensor:
        """``(B, C)``: half the channels of a hard sample are spatial."""
        soft = torch.sigmoid(self.randn(self.problem.batch, self.problem.channels))
        return torch.where(self.hard[:, None], (soft > 0.5).to(self.dtype), soft)

    @cached_property
    def spatial(self) -> Tensor:
        return self.filters(1, 3, 3)

    @cached_property
    def temporal(self) -> Tensor:
        return self.filters(3, 1, 1)

    @cached_property
    def mixing(self) -> Tensor:
        return self.filters(1, 1, 1)

    @cached_property
    def live(self) -> nn.Module:
        """The module of one layer that frozen ones are made of; half of each neuron's channels are spatial."""
        options = {"num_layers": 1, "num_neurons": self.problem.neurons, "skip": False}
        module = FusedDSTS(self.problem.channels, **options, dtype=self.dtype, device=self.device).eval()
        with torch.no_grad():
            for gate in module.layers[0].gate:
                gate.fill_(-1.0)[torch.randperm(gate.numel(), device=gate.device)[::2]] = 1.0
        return module

    def frozen(self, backend: str) -> nn.Module:
        """The layer as this backend packs it."""
        if backend not in self.packed:
            self.packed[backend] = self.live.freeze(backend=backend)
        return self.packed[backend]


class Op(NamedTuple):
    """How an op is called, and what it must read and write."""

    run: Callable[[Inputs, Tensor, str], Sequence[Tensor]]  # with one of the features, on a backend
    moved: Callable[[Inputs], int]  # bytes, each read or written once


def schema(name: str) -> Callable:
    """The op of that name; raises ``AttributeError`` where this commit has none."""
    return getattr(torch.ops.dsts_kernels, name)


def gated(inputs: Inputs, x: Tensor) -> tuple[Tensor, ...]:
    return x, inputs.gate, inputs.neuron, inputs.spatial, inputs.temporal


def run_semhash(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    args = inputs.logits, inputs.neuron, inputs.noise, inputs.hard
    return (schema("semhash_gate")(*args, backend),)


def run_semhash_backward(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    args = inputs.grad_gate, inputs.logits, inputs.neuron, inputs.noise
    return (schema("semhash_gate_backward")(*args, backend),)


def run_tap_sums(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    return (schema("tap_sums")(x, 1, backend),)


def run_gated(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    return (schema("gated_conv3d")(*gated(inputs, x), backend),)


def run_gated_backward(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    return schema("gated_conv3d_backward")(inputs.grad, *gated(inputs, x), [True] * 4, backend)


def run_mixing(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    return (schema("mixing_conv3d")(x, inputs.neuron, inputs.mixing, backend),)


def run_mixing_backward(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    args = inputs.grad, x, inputs.neuron, inputs.mixing
    return schema("mixing_conv3d_backward")(*args, [True] * 2, backend)


def run_frozen(inputs: Inputs, x: Tensor, backend: str) -> Sequence[Tensor]:
    return (inputs.frozen(backend)(x),)


def feature_bytes(inputs: Inputs, times: int) -> int:
    """Features that are read or written so many times."""
    return times * inputs.xs[0].numel() * inputs.dtype.itemsize


def filter_bytes(inputs: Inputs, spatial: int, temporal: int) -> int:
    """Filters of so many input channels of either operator."""
    taps = SPATIAL_TAPS * spatial + TEMPORAL_TAPS * temporal
    return taps * inputs.problem.channels * inputs.dtype.itemsize


def chosen(inputs: Inputs) -> int:
    """Neurons that some sample has."""
    return min(inputs.problem.batch, inputs.problem.neurons)


def listed_bytes(inputs: Inputs) -> int:
    """Filters of the channels that a chosen neuron's samples list, each once."""
    gates = [inputs.gate[inputs.neuron == n] for n in range(chosen(inputs))]
    spatial, temporal = (sum(int((gate != side).any(0).sum()) for gate in gates) for side in (0, 1))
    return filter_bytes(inputs, spatial, temporal)


def gate_bytes(inputs: Inputs, samples: int, neurons: int) -> int:
    """Vectors of one number a channel."""
    return (samples * inputs.problem.batch + neurons) * inputs.problem.channels * inputs.dtype.itemsize


def moved_gated_backward(inputs: Inputs) -> int:
    """Gates train, so the data gradient takes both operators of every channel; weight gradients the listed ones."""
    every = chosen(inputs) * inputs.problem.channels
    filters = filter_bytes(inputs, every, every) + listed_bytes(inputs)
    return feature_bytes(inputs, 3) + gate_bytes(inputs, 2, 0) + filters


def mixing_bytes(inputs: Inputs, times: int) -> int:
    return times * chosen(inputs) * inputs.problem.channels**2 * inputs.dtype.itemsize


@torch.no_grad()
def moved_frozen(inputs: Inputs) -> int:
    """Features in and out, and the filters of the neurons that these features choose."""
    neurons = inputs.live(inputs.xs[0], return_routing=True)[1].neuron.unique()
    spatial = int((inputs.live.layers[0].gate[neurons] > 0).sum())
    every = neurons.numel() * inputs.problem.channels
    return feature_bytes(inputs, 2) + filter_bytes(inputs, spatial, every - spatial)


OPS: dict[str, Op] = {
    "semhash_gate": Op(run_semhash, lambda i: gate_bytes(i, 2, chosen(i))),
    "semhash_gate_backward": Op(run_semhash_backward, lambda i: gate_bytes(i, 2, chosen(i) + i.problem.neurons)),
    "tap_sums": Op(run_tap_sums, lambda i: feature_bytes(i, 1)),
    "gated_conv3d": Op(run_gated, lambda i: feature_bytes(i, 2) + gate_bytes(i, 1, 0) + listed_bytes(i)),
    "gated_conv3d_backward": Op(run_gated_backward, moved_gated_backward),
    "mixing_conv3d": Op(run_mixing, lambda i: feature_bytes(i, 2) + mixing_bytes(i, 1)),
    "mixing_conv3d_backward": Op(run_mixing_backward, lambda i: feature_bytes(i, 3) + mixing_bytes(i, 2)),
    "frozen_layer": Op(run_frozen, moved_frozen),
}


def op_flop(name: str, inputs: Inputs, backend: str) -> int:
    """Operations of direct convolutions of the listed channels: what the op says of itself to torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        OPS[name].run(inputs, inputs.xs[0], backend)
    return counter.get_total_flops()
