"""One layer at inference, folded and packed: route, gated convolution, bias, activation and skip (docs/design.md).

What is left of a layer is one gated convolution. Its epilogue writes the activation once and takes the tap sums
the next layer routes by while it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import choose
from ..backends.base import FrozenOptions, FrozenSource, FrozenWeights
from ..backends.packing import BLOCKED
from ._library import PLAIN, define, listened


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


def frozen_layers(
    x: Tensor,
    layers: Sequence[FrozenSource],
    *,
    skip: bool,
    memory_format: torch.memory_format = torch.contiguous_format,
    routing: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """All layers of a frozen module, one after the other, and its skip connection.

    One call of a backend that has all of it in one, where nothing listens; else :func:`frozen_layer` for each.

    Args:
        x: ``(B, C, T, H, W)``, on the device and in the dtype of the weights.
        skip: add ``x`` to the last layer's activation.
        memory_format: of the result, where ``x`` is not added, which has its own.
        routing: whether anybody asks for neurons and scores.

    Returns:
        ``y (B, C, T, H, W)``, and of every layer ``neuron (B,)`` and ``scores (B, N)``; ``None`` where nobody asks.
    """
    if layers[0].packing in BLOCKED and not listened((x,)):
        chosen = choose("frozen_layer", x.device, x.dtype, backend, x.shape)
        y = torch.empty_like(x) if skip else torch.empty_like(x, memory_format=memory_format)
        found = chosen.frozen_layers(x, x if skip else None, y, layers, routing)
        if found is not None:
            return y, *found
    last = len(layers) - 1
    h, sums, neurons, scores = x, None, [], []
    for index, layer in enumerate(layers):
        next_taps = 0 if index == last else layers[index + 1].taps
        added = x if skip and index == last else None
        h, sums, *found = frozen_layer(h, sums, added, layer.weights(), layer.options(next_taps), backend=backend)
        neurons.append(found[0])
        scores.append(found[1])
    return h if skip else h.contiguous(memory_format=memory_format), neurons, scores
