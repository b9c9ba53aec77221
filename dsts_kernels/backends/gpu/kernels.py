"""What a GPU backend offers to those who say which kernels run in which order: its launchers.

A launcher takes tensors and returns tensors, on the current stream of their device, without a host synchronisation.
The first three guard the device and take empty tensors, as they are ops by themselves; around the others that is done
by who calls them. A *panel* is ``(B, T, H, W, width)``, columns of gathered channels in K blocks; filters come by slot
and tap. :mod:`.lists` says what a list, a plan and a slot are.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..base import FrozenWeights
from .features import SPATIAL
from .lists import Groups, Lists


class Epilogue(NamedTuple):
    """What a convolution does besides. ``arrival_counters`` are zeros from an earlier launch, else made here."""

    bias: Tensor | None = None
    relu: bool = False
    skip: Tensor | None = None
    sums: Tensor | None = None
    arrival_counters: Tensor | None = None


PLAIN = Epilogue()


class ConvGrid(Protocol):
    """A convolution's tile and grid, known before its operands are: a backend's own."""

    @property
    def arrival_counters(self) -> int:
        """Integers that the convolution wants zeroed."""


class Kernels(Protocol):
    """The launchers of a backend: a module will do."""

    def semhash_gate(self, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
        """Gates ``(B, C)``."""

    def semhash_gate_backward(
        self, grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Gradient of the logits ``(N, C)``."""

    def partial_tap_sums(self, x: Tensor, taps: int) -> Tensor:
        """``(B, parts, C, taps)`` float32: enough parts that a small batch fills the chip."""

    def group_samples(self, neuron: Tensor, neurons: int) -> Groups:
        """Samples by neuron."""

    def list_channels(self, gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
        """Lists of every sample, or with ``union`` of every slot: what any of its samples reads."""

    def gather_panel(
        self, x: Tensor, gate: Tensor, neuron: Tensor, neurons: int, slots: Tensor | None, lists: Lists, width: int
    ) -> Tensor:
        """A panel: gated features gathered by each sample's own list row, or by that of its slot."""

    def route_and_gather(
        self,
        x: Tensor,
        sums: Tensor,
        w: FrozenWeights,
        divisor: int,
        neuron: Tensor,
        scores: Tensor,
        arrival_counters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A frozen layer's panel and plan; fills ``neuron`` and ``scores``, zeroes ``arrival_counters``."""

    def pack_filters(self, weights: list[Tensor], neuron_of: Tensor, dtype: torch.dtype, by_channel: bool) -> Tensor:
        """Filters of the chosen neurons, ``(slots * taps, C, O)`` or ``(slots * taps, O, C)``, every kernel's taps."""

    def unpack_filters(
        self,
        filters: Tensor,
        like: Tensor,
        groups: Groups,
        listed: Tensor | None,
        bit: int,
        first: int,
        taps: int,
        by_channel: bool,
    ) -> Tensor:
        """Gradients ``filters`` of the chosen neurons, as a gradient of ``like (N, O, C, *kernel)``."""

    def conv_grid(self, x: Tensor, outputs: int, width: int, taps: int, sum_taps: int) -> ConvGrid:
        """``x`` gives batch, size, dtype and device; ``width`` is the most columns a reduction has, by ``taps``."""

    def conv(
        self,
        panel: Tensor,
        filters: Tensor,
        form: str,
        plan: Tensor,
        out: Tensor,
        grid: ConvGrid,
        *,
        kernel: tuple[int, int, int] = SPATIAL,
        with_temporal: bool = True,
        sign: int = 1,
        order: Tensor | None = None,
        k_channels: int = 0,
        slots: int = 0,
        epilogue: Epilogue = PLAIN,
    ) -> None:
        """A panel's convolution into ``out (B, O, T, H, W)``; ``form`` is packed, listed, stored or transposed."""

    def data_gradient(
        self,
        grad_ndhwc: Tensor,
        x: Tensor,
        gate: Tensor,
        groups: Groups,
        spatial: Tensor,
        temporal: Tensor,
        need_x: bool,
        need_gate: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``x`` and ``gate`` from that of the output, ``grad_ndhwc (B, T, H, W, O)``."""

    def weight_gradient(
        self,
        left: Tensor,
        right: Tensor,
        lists: Lists | None,
        groups: Groups,
        rows: int,
        kernel: tuple[int, int, int],
        with_temporal: bool,
        sign: int,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradients of filters, ``shape`` by slot and tap, or into ``out`` by neuron."""
