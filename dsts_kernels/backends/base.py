"""What a backend is: a name, predicates, and one method for every op.

Methods get checked arguments and return fresh tensors. Features come in any stride order; what they return is
channels-last (``torch.channels_last_3d``) unless said otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OPS = ("semhash_gate", "tap_sums", "gated_conv3d", "mixing_conv3d", "frozen_layer")
# Methods of a backend that are one launch of one kernel each on a GPU: their launchers have their names.
ONE_LAUNCH = ("semhash_gate", "semhash_gate_backward")
# The dtypes that ops run in, and their codes in the native module: csrc/dtypes.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FLOATS = tuple(DTYPE_CODES)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, scores and biases: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class FrozenWeights(NamedTuple):
    """One frozen layer, packed as :mod:`.packing` says; ``FrozenOptions.packing`` says which way.

    Neuron ``n`` sends ``channels[n, :split]`` to its spatial panel ``(O, 9, split)`` and the rest of ``channels[n]``
    to its temporal panel ``(O, 3, C - split)``, where ``split = starts[n + 1] - starts[n]``.

    A centre of scores is one more tap, which holds what is added to the score of neuron ``n`` in ``scoring[n, 0, -1]``
    and zeros elsewhere: the tap of a channel whose mean over positions is always 1. So kernels need to know nothing of
    it. :func:`taps_of` tells.
    """

    scoring: Tensor  # (N, C, taps), collapsed, float32 or float64; (N, C, taps + 1) with a centre
    channels: Tensor  # (N, C) int32
    starts: Tensor  # (N + 1,) int64, spatial channels of the neurons before, summed
    filters: Tensor  # flat
    bias: Tensor  # (N, O), float32 or float64
    mixing: Tensor | None  # (N, packed), only for a kernel that does not fold


def taps_of(scoring: Tensor) -> int:
    """Taps of the kernels that ``scoring (N, C, taps)`` was collapsed from: 1 or 9, without that of a centre."""
    return 9 if scoring.shape[2] > 2 else 1


def with_center(scoring: Tensor, center: Tensor) -> Tensor:
    """``scoring (N, C, taps)`` with one more tap, which subtracts ``center (N,)`` from scores."""
    tap = torch.zeros_like(scoring[:, :, :1])
    tap[:, 0, 0] = -center
    return torch.cat((scoring, tap), 2)


class FrozenOptions(NamedTuple):
    """What a frozen layer does besides: means of scores, mixing kernel, activation, packing, what comes next."""

    score_elements: int  # of a position that a mean is taken over: outputs of a scoring kernel; 0 for a sum
    mixing_kernel: list[int]
    relu: bool
    packing: str  # one of packing.PACKINGS
    next_taps: int  # taps of the next layer's scoring kernel: 0 when no layer follows

    def score_divisor(self, x: Tensor) -> int:
        """What turns sums into scores of ``x (B, C, T, H, W)``; of this clip, not of one that was traced."""
        return self.score_elements * x.shape[2:].numel() or 1


class FrozenSource(Protocol):
    """A frozen layer as its module holds it."""

    packing: str
    prepared: tuple[object, object] | None  # what a backend made of them, and the stamp that they had
    num_neurons: int

    def settled(self) -> object:
        """A stamp: another object whenever anything of its weights may have changed."""

    def weights(self) -> FrozenWeights: ...

    def options(self, next_taps: int) -> FrozenOptions: ...


class Backend(ABC):
    """One way to run every op."""

    name: str
    remark: str

    @abstractmethod
    def missing(self) -> str | None:
        """Why this backend cannot run anything on this machine; ``None`` when it can."""

    @abstractmethod
    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run ``op`` on such tensors; ``None`` when it can."""

    def note(self, op: str, device: torch.device, dtype: torch.dtype) -> str:
        """What there is to say of how it runs ``op`` on such tensors, where it can."""
        return self.remark

    def why_not_fast(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why frozen layers have no fast convolution here; ``None`` when they have."""
        return f"the {self.name!r} backend has none"

    def packing(self, device: torch.device, dtype: torch.dtype, algorithm: str) -> str:
        """How frozen layers are best packed for ``algorithm`` ("auto", "direct" or "winograd")."""
        if algorithm == "direct" or self.why_not_fast(device, dtype) is not None:
            return "plain"
        return "winograd" if algorithm == "winograd" else "blocked"

    def fuses_routing(self, batch: int, neurons: int) -> bool:
        """Whether ``route`` and ``route_backward`` do a layer's routing at once: see ``gpu.kernels.FusedRouting``."""
        return False

    def trains_in_one_step(self) -> bool:
        """Whether a layer in training is one step of autograd: see :mod:`dsts_kernels.ops.training_layer`."""
        return False

    @abstractmethod
    def semhash_gate(self, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
        """Gates ``(B, C)``: see :func:`dsts_kernels.ops.semhash.semhash_gate`."""

    @abstractmethod
    def semhash_gate_backward(
        self, grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Gradient of the logits ``(N, C)``."""

    @abstractmethod
    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        """``(B, C, taps)`` in :func:`accumulate_dtype`."""

    @abstractmethod
    def gated_conv3d(self, x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
        """``(B, O, T, H, W)``."""

    @abstractmethod
    def gated_conv3d_backward(
        self,
        grad: Tensor,
        x: Tensor,
        gate: Tensor,
        neuron: Tensor,
        spatial: Tensor,
        temporal: Tensor,
        needs: list[bool],
        kept: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of ``x, gate, spatial, temporal``, each ``None`` where ``needs`` says so.

        ``kept`` is what the forward pass handed on, of this or of another backend, or nothing: a backend that has a
        method ``gated_conv3d_keeping`` returns it beside the output.
        """

    @abstractmethod
    def mixing_conv3d(self, z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
        """``(B, O, T, H, W)``."""

    @abstractmethod
    def mixing_conv3d_backward(
        self, grad: Tensor, z: Tensor, neuron: Tensor, mixing: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``z, mixing``."""

    @abstractmethod
    def frozen_layer(
        self, x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``y``, the next layer's tap sums, ``neuron (B,)`` and ``scores (B, N)``.

        ``y`` is channels-last, or in the memory format of ``skip`` where one is added.
        """

    def frozen_layers(
        self, x: Tensor, skip: Tensor | None, y: Tensor, layers: Sequence[FrozenSource], routing: bool
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """All layers of a frozen module at once, where that is faster than one by one; ``None`` where it is not.

        ``y (B, O, T, H, W)``, in any strides, takes the result, with ``skip`` added. Returns ``neuron (L, B)`` and
        ``scores (L, B, N)``, with ``routing``.
        """
        return None

    def live_layer(
        self,
        x: Tensor,
        collapsed: Callable[[], Tensor],
        divisor: int,
        logits: Tensor,
        spatial: Tensor,
        temporal: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """A layer in evaluation up to mixing, at once, where there is such a call: ``neuron, scores, gate, z``.

        ``collapsed()`` gives the scoring kernels summed over outputs, ``(N, C, taps)``. See
        :func:`dsts_kernels.ops.live_layer.live_layer`.
        """
        return None
