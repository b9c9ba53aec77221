"""Passes over memory: what convolutions on the host side are put together from, stated once for two backends.

A backend supplies the passes (:class:`Passes`); :mod:`.direct`, :mod:`.winograd` and :mod:`.grouped` call them. Panels
are dense and channels-last, ``(b, T, H, W, c)``, unless their name ends in ``_first``. The records here are read by
name in ``csrc/cpu/bindings.cpp``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from . import convolution
from .base import accumulate_dtype
from .convolution import Kernel, Prepared, on_units
from .kept import kept


class Epilogue(NamedTuple):
    """What happens to a result ``z`` on its way to memory: ``out[samples] = relu(z + bias) + skip[samples]``."""

    out: Tensor  # (B, O, T, H, W), any strides
    samples: Tensor | None = None  # (b,) int64, where the results go; None: the whole batch in order
    bias: Tensor | None = None  # (O,) in accumulate_dtype
    relu: bool = False
    skip: Tensor | None = None  # (B, O, T, H, W) in the dtype of out
    sums: Tensor | None = None  # (B, O, taps), takes the tap sums of what was written

    def of_outputs(self, block: slice) -> Epilogue:
        """The same for some of the output channels."""
        parts = (None if t is None else t[:, block] for t in (self.skip, self.sums))
        bias = None if self.bias is None else self.bias[block]
        return Epilogue(self.out[:, block], self.samples, bias, self.relu, *parts)


class GradientPanel(NamedTuple):
    """One operator's data gradient, for the channels that it has."""

    panel: Tensor | None  # (b, T, H, W, c); None: zero
    channels: Tensor | None  # (c,) int32; None: all of them, in order


class Passes(ABC):
    """Each one pass over memory."""

    @abstractmethod
    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        """``(B, C, taps)`` in :func:`.base.accumulate_dtype`."""

    @abstractmethod
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
        """``src[samples][:, channels]`` times ``scale[samples][:, channels]``, or times 1 minus it.

        ``src (B, C, T, H, W)`` in any strides, ``scale (B, C)``, ``samples`` int64, ``channels`` int32. Returns
        a dense channels-last panel, or a channels-first one ``(b, c, T, H, W)``; of ``width`` channels where that is
        given, those behind the listed ones being zero.
        """

    def product_dtype(self, tensor: Tensor) -> torch.dtype:
        """What panels of such features are gathered to and multiplied in."""
        return compute_dtype(tensor)

    @abstractmethod
    def epilogue(self, spatial: Tensor | None, temporal: Tensor | None, epilogue: Epilogue) -> None:
        """The sum of two panels ``(b, T, H, W, O)`` as ``z`` of an epilogue."""

    @abstractmethod
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
        """``dx = gate*spatial + (1-gate)*temporal`` and ``dgate = <x, spatial - temporal>``, for some samples.

        ``gate`` and ``dgate`` are ``(B, C)``, ``x`` and ``dx`` ``(B, C, T, H, W)`` in any strides.
        """


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """On a CPU without matrix units a half type is a storage format: panels and products are float32."""
    return accumulate_dtype(tensor.dtype) if tensor.device.type == "cpu" else tensor.dtype


def empty_ndhwc(x: Tensor, channels: int, *, batch: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Memory ``(B, T, H, W, channels)`` for a result of the size of ``x (B, C, T, H, W)``, or of another batch."""
    b, _, t, h, w = x.shape
    return torch.empty((b if batch is None else batch, t, h, w, channels), dtype=dtype or x.dtype, device=x.device)


def as_features(ndhwc: Tensor) -> Tensor:
    """``(B, T, H, W, C)`` memory seen as channels-last features ``(B, C, T, H, W)``."""
    return ndhwc.permute(0, 4, 1, 2, 3)


def positions_of(x: Tensor) -> int:
    """Positions ``T*H*W`` of features."""
    return x.shape[2] * x.shape[3] * x.shape[4]


def feature_panel(passes: Passes, features: Tensor, samples: Tensor | None) -> Tensor:
    """Samples of ``(B, C, T, H, W)`` as a channels-last panel, without a copy where they are one."""
    whole = features.permute(0, 2, 3, 4, 1)
    dtype = passes.product_dtype(features)
    if samples is None and whole.is_contiguous() and features.dtype == dtype:
        return whole
    return passes.gather_panel(features, samples, dtype=dtype)


def gradient_panel(passes: Passes, features: Tensor, samples: Tensor | None) -> Tensor:
    """Samples as a weight gradient takes them: see :func:`.convolution.weight_gradient`."""
    dtype = passes.product_dtype(features)
    if on_units(dtype, features.device):
        return feature_panel(passes, features, samples)
    return passes.gather_panel(features, samples, channels_first=True, dtype=dtype)


def weight_panel(passes: Passes, weight: Tensor, channels: Tensor | None, like: Tensor) -> Tensor:
    """One neuron's filter ``(O, C, *kernel)`` as ``(O, taps, c)`` of its listed channels, in the dtype of ``like``."""
    if channels is None and weight.shape[2:].numel() == 1 and weight.dtype == like.dtype:
        return weight.reshape(weight.shape[0], 1, -1)
    return as_filters(passes.gather_panel(weight, None, channels, dtype=gathered_dtype(weight, like)), like)


def listed_filters(passes: Passes, weight: Tensor, channels: Tensor | None, panel: Tensor) -> Tensor:
    """A filter ``(O, C, *kernel)`` that trains as ``(O, taps, c)``, as wide as the panel it meets."""
    if channels is None:
        return weight_panel(passes, weight, None, panel)
    narrow, width = gathered_dtype(weight, panel), panel.shape[4]
    return as_filters(passes.gather_panel(weight, None, channels, dtype=narrow, width=width), panel)


def kept_filters(
    passes: Passes, weight: Tensor, channels: Tensor | None, panel: Tensor, kernel: Kernel
) -> Prepared | None:
    """:func:`listed_filters` reordered for the library and kept, for units of half types; else ``None``.

    In evaluation gates and weights stay from call to call: what was used once before is kept (:mod:`.kept`).
    """
    if not on_units(panel.dtype, panel.device):
        return None

    def prepare() -> Prepared:
        return convolution.prepare(listed_filters(passes, weight, channels, panel), panel, kernel)

    listed = None if channels is None else channels.numpy().tobytes()
    return kept(weight, (kernel, panel.dtype, listed), prepare, again=True)


def gathered_dtype(weight: Tensor, like: Tensor) -> torch.dtype:
    """What a pass makes of a filter on its way to the dtype of ``like``: that one, or as it is, or float32."""
    return weight.dtype if weight.dtype == like.dtype else compute_dtype(weight)


def as_filters(gathered: Tensor, like: Tensor) -> Tensor:
    """A gathered filter ``(O, *kernel, c)`` as ``(O, taps, c)``, in the dtype of ``like``."""
    return gathered.to(like.dtype).view(gathered.shape[0], -1, gathered.shape[-1])
