"""What a GPU backend offers to those who say which kernels run in which order: its launchers.

A launcher takes tensors and returns tensors, on the current stream of their device, without a host synchronisation.
Those of ``base.ONE_LAUNCH`` are ops by themselves, with the signature that :class:`..base.Backend` gives them: they
guard the device and take empty tensors, and so does ``partial_tap_sums``; around the others that is done by who calls
them. A *panel* is ``(B, T, H, W, width)``, columns of gathered channels in K blocks; filters come by slot
and tap. :mod:`.lists` says what a list, a plan and a slot are; ``S`` slots, ``N`` neurons.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..base import ONE_LAUNCH, FrozenWeights
from .features import SPATIAL
from .lists import Groups, Lists


class ConvEpilogue(NamedTuple):
    """What a convolution does besides."""

    bias: Tensor | None = None  # (rows of plans, O) float32
    relu: bool = False
    skip: Tensor | None = None  # (B, O, T, H, W) with the strides of the output
    sums: Tensor | None = None  # (B, O, taps) float32, filled with the output's tap sums
    arrival_counters: Tensor | None = None  # int32, zeros from an earlier launch; else made here


PLAIN = ConvEpilogue()


class ConvGrid(Protocol):
    """A convolution's tile and grid, known before its operands are: a backend's own."""

    @property
    def arrival_counters(self) -> int:
        """Integers that the convolution wants zeroed."""


class Kernels(Protocol):
    """The launchers of a backend, and those of ``ONE_LAUNCH``: a module will do."""

    def partial_tap_sums(self, x: Tensor, taps: int) -> Tensor:
        """``(B, parts, C, taps)`` float32 of ``x (B, C, T, H, W)``: enough parts that a small batch fills the chip."""

    def group_samples(self, neuron: Tensor, neurons: int) -> Groups:
        """Samples by ``neuron (B,)``."""

    def list_channels(self, gate: Tensor, groups: Groups, union: bool, block_k: int) -> Lists:
        """Lists of every sample of ``gate (B, C)``, or with ``union`` of every slot: what any of its samples reads."""

    def gather_panel(
        self,
        x: Tensor,  # (B, C, T, H, W)
        gate: Tensor,  # (B, C)
        neuron: Tensor,  # (B,) int64
        neurons: int,
        slots: Tensor | None,  # (B,) int32
        lists: Lists,
        width: int,
    ) -> Tensor:
        """A panel: gated features gathered by each sample's own list, or by that of its slot."""

    def route_and_gather(
        self,
        x: Tensor,  # (B, C, T, H, W)
        sums: Tensor,  # (B, parts, C * taps) float32, tap sums of x
        w: FrozenWeights,
        divisor: int,
        neuron: Tensor,  # (B,) int64
        scores: Tensor,  # (B, N) float32
        arrival_counters: Tensor,  # int32
    ) -> tuple[Tensor, Tensor]:
        """A frozen layer's panel and plan; fills ``neuron`` and ``scores``, zeroes ``arrival_counters``."""

    def pack_filters(
        self,
        weights: list[Tensor],  # (N, O, C, *kernel) each
        neuron_of: Tensor,  # (S,) int32
        dtype: torch.dtype,
        by_channel: bool,
        read: tuple[Tensor, Groups] | None = None,
    ) -> Tensor:
        """Filters of the chosen neurons, ``(S * taps, C, O)`` or ``(S * taps, O, C)``, every kernel's taps.

        ``read``, gates ``(B, C)`` and their samples' groups, says that of a spatial and a temporal operator only
        channels will be read that a sample of the neuron lists: others need not be written.
        """

    def unpack_filters(
        self,
        filters: Tensor,  # (S * taps, C, O) or (S * taps, O, C)
        like: Tensor,  # (N, O, C, *kernel)
        groups: Groups,
        listed: Tensor | None,  # (S, C) int8
        reader: int,
        first_tap: int,
        all_taps: int,
        by_channel: bool,
    ) -> Tensor:
        """Gradients ``filters`` of the chosen neurons, as a gradient of ``like``.

        Its taps begin at ``first_tap`` of ``all_taps``. Zero where ``listed`` does not name ``reader``
        (``READ_BY_SPATIAL`` or ``READ_BY_TEMPORAL``) of a channel.
        """

    def conv_grid(
        self, x: Tensor, outputs: int, width: int, taps: int, sum_taps: int, packed: bool = False
    ) -> ConvGrid:
        """``x`` gives batch, size, dtype and device; ``width`` is the most columns a reduction has, by ``taps``.

        ``packed`` says that filters will come in that form.
        """

    def conv(
        self,
        panel: Tensor,  # (B, T, H, W, width)
        filters: Tensor,  # as form says
        form: str,
        plan: Tensor,  # (B, PLAN) int32; of stored and transposed filters (B,): whose each sample has
        out: Tensor,  # (B, O, T, H, W)
        grid: ConvGrid,
        *,
        kernel: tuple[int, int, int] = SPATIAL,
        with_temporal: bool = True,
        sign: int = 1,
        order: Tensor | None = None,  # (rows of plans, k_channels) int32
        k_channels: int = 0,
        slots: int = 0,
        epilogue: ConvEpilogue = PLAIN,
    ) -> None:
        """A panel's convolution into ``out``.

        Args:
            form: of filters: ``packed`` K blocks of a frozen layer, ``listed`` ``(S * taps, C, O)`` whose rows
                ``order`` picks, ``stored`` ``(S * taps, O, C)``, or ``transposed`` ``(S * taps, C, O)`` in order.
            kernel: of the spatial operator; the temporal one is 3x1x1, where there is one.
            sign: -1 turns the kernel round.
            k_channels: length of the reduction's channels.
            slots: sets of taps in filters that are stored or transposed.
        """

    def data_gradient(
        self,
        grad_ndhwc: Tensor,  # (B, T, H, W, O)
        x: Tensor,  # (B, C, T, H, W)
        gate: Tensor,  # (B, C)
        lists: Lists,  # of samples
        filters: Tensor,  # (S * 12, C, O), rows perhaps padded
        need_x: bool,
        need_gate: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``x`` and ``gate`` from that of the output."""

    def weight_gradient(
        self,
        left: Tensor,  # (B, T, H, W, left_width): rows of the result, shifted by a tap
        right: Tensor,  # (B, T, H, W, right_width): its columns
        lists: Lists | None,
        groups: Groups,
        k_channels: int,
        kernel: tuple[int, int, int],
        with_temporal: bool,
        sign: int,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradients of filters: ``shape (S * taps, k_channels, columns)`` by slot, or into ``out`` by neuron."""


class FusedRouting(Protocol):
    """Launchers that a backend may have besides: the whole choice, and all its gradients, in one launch each."""

    def route(
        self,
        x: Tensor,  # (B, C, T, H, W)
        scoring: Tensor,  # (N, C, taps) float32, summed over outputs
        logits: Tensor,  # (N, C)
        noise: Tensor | None,  # (B, C)
        hard: Tensor | None,  # (B,) bool
        gumbel: Tensor | None,  # (B, N)
        divisor: int,
        tau: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Neurons, scores, gates; and with ``keep`` the choice's shares ``(B,)`` and tap sums ``(B, C * taps)``."""

    def route_backward(
        self,
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None],  # of scores (B, N), gates (B, C), shares (B,)
        scores: Tensor,  # (B, N) float32
        gumbel: Tensor | None,  # (B, N)
        neuron: Tensor,  # (B,) int64
        sums: Tensor,  # (B, C * taps) float32
        scoring: Tensor,  # (N, C, taps) float32
        logits: Tensor,  # (N, C)
        noise: Tensor | None,  # (B, C)
        divisor: int,
        tau: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of tap sums ``(B, C, taps)``, ``scoring`` and ``logits``, each ``None`` where not needed.

        ``logits`` need a gradient of gates.
        """


def _names(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


def launchers(package: str, helpers: tuple[str, ...] = ()) -> dict[str, Callable]:
    """The launchers in the files of ``package``, but for its ``helpers``: what a backend's :class:`Kernels` is made of.

    Raises:
        ImportError: one is missing, or two files have it.
    """
    wanted = _names(Kernels) | set(ONE_LAUNCH)
    offered = wanted | _names(FusedRouting)
    found: dict[str, Callable] = {}
    for module in map(importlib.import_module, files(package, helpers)):
        for name, value in vars(module).items():
            if name in offered and inspect.isfunction(value) and value.__module__ == module.__name__:
                if name in found:
                    raise ImportError(f"{package}: {name} is in {found[name].__module__} and in {module.__name__}")
                found[name] = value
    if missing := sorted(wanted - set(found)):
        raise ImportError(f"{package}: no file has the launchers {', '.join(missing)}")
    return found


def files(package: str, helpers: tuple[str, ...] = ()) -> list[str]:
    """Modules of ``package`` that may hold launchers: all but ``kernels``, which gathers them, and ``helpers``."""
    path = importlib.import_module(package).__path__
    names = [module.name for module in pkgutil.iter_modules(path) if module.name not in ("kernels", *helpers)]
    return [f"{package}.{name}" for name in names]
