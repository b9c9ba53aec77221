"""One layer at inference, folded and packed: route, gated convolution, bias, activation and skip (docs/design.md).

What is left of a layer is one gated convolution. Its epilogue writes the activation once and takes the tap sums
the next layer routes by while it does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import choose
from ..backends.base import FrozenOptions, FrozenWeights
from ._library import PLAIN, define


def _frozen_layer(
    x: Tensor,
    sums: Tensor | None,
    skip: Tensor | None,
    scoring: Tensor,
    channels: Tensor,
    starts: Tensor,
    filters: Tensor,
    bias: Tensor,
    mixing: Tensor | None,
    score_elements: int,
    mixing_kernel: list[int],
    relu: bool,
    packing: str,
    next_taps: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = FrozenWeights(scoring, channels, starts, filters, bias, mixing)
    options = FrozenOptions(score_elements, mixing_kernel, relu, packing, next_taps)
    return choose("frozen_layer", x.device, x.dtype, backend, x.shape).frozen_layer(x, sums, skip, weights, options)


def _frozen_layer_fake(
    x,
    sums,
    skip,
    scoring,
    channels,
    starts,
    filters,
    bias,
    mixing,
    score_elements,
    mixing_kernel,
    relu,
    packing,
    next_taps,
    backend=None,
):
    b, _, t, h, w = x.shape
    num_neurons, outputs = bias.shape
    y = torch.empty_like(skip) if skip is not None else x.new_empty(b, t, h, w, outputs).permute(0, 4, 1, 2, 3)
    return (
        y,
        scoring.new_empty(b, outputs, next_taps),
        x.new_empty(b, dtype=torch.int64),
        scoring.new_empty(b, num_neurons),
    )


def _flops(x, sums, skip, scoring, channels, starts, filters, bias, mixing, *options, out_val, **named) -> int:
    """Scores, and direct convolutions of the channels that each sample's neuron lists: two for every multiply-add."""
    (b, c), positions = x.shape[:2], x.shape[2:].numel()
    num_neurons, outputs = bias.shape
    spatial = b * c  # all of them where neurons are not known: fake tensors
    if type(starts) in PLAIN and not starts.is_meta:
        spatial = int(starts.diff()[out_val[2]].sum())
    taps = 9 * spatial + 3 * (b * c - spatial)
    if mixing is not None:
        taps += b * outputs * math.prod(options[1])
    return 2 * (b * num_neurons * scoring.shape[1:].numel() + taps * outputs * positions)


frozen_layer_op = define(
    "frozen_layer(Tensor x, Tensor? sums, Tensor? skip, Tensor scoring, Tensor channels, Tensor starts, "
    "Tensor filters, Tensor bias, Tensor? mixing, int score_elements, int[] mixing_kernel, "
    "bool relu, str packing, int next_taps, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _frozen_layer,
    _frozen_layer_fake,
    strided=("x", "skip"),
    differentiable=False,
    flops=_flops,
)


def frozen_layer(
    x: Tensor,
    sums: Tensor | None,
    skip: Tensor | None,
    weights: FrozenWeights,
    options: FrozenOptions,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One frozen layer.

    Args:
        x: ``(B, C, T, H, W)``.
        sums: tap sums of ``x (B, C, taps)`` where the layer before took them, else ``None``.
        skip: added to the activation, ``(B, O, T, H, W)``.
        weights, options: see :class:`dsts_kernels.backends.base.FrozenWeights` and ``FrozenOptions``.

    Returns:
        ``y (B, O, T, H, W)`` (channels-last, or as ``skip`` lies), the next layer's tap sums ``(B, O,
        next_taps)``, ``neuron (B,)`` int64 and ``scores (B, N)``.
    """
    return frozen_layer_op(x, sums, skip, *weights, *options, backend)
