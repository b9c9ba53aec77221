"""A frozen layer on a GPU: tap sums for the first layer, then two launches a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import FrozenOptions, FrozenWeights, taps_of
from ..packing import tile_channels
from . import features
from .gated_conv import SPATIAL_TAPS
from .kernels import ConvEpilogue, Kernels


class FrozenLayer:
    """The op, for a backend with launchers."""

    name: str
    kernels: Kernels

    def frozen_layer(
        self, x: Tensor, sums: Tensor | None, skip: Tensor | None, w: FrozenWeights, options: FrozenOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_packing(options.packing, self.name)
        kernels, b, (neurons, outputs) = self.kernels, x.shape[0], w.bias.shape
        y = features.empty_features(x, outputs) if skip is None else torch.empty_like(skip)
        next_sums = x.new_empty((b, outputs, options.next_taps), dtype=torch.float32)
        neuron = torch.empty(b, dtype=torch.int64, device=x.device)
        scores = x.new_empty((b, neurons), dtype=torch.float32)
        if not b:
            return y, next_sums, neuron, scores
        if skip is not None and skip.stride() != y.stride():
            skip = torch.empty_like(y).copy_(skip)
        block_k, folds = tile_channels(x.dtype), w.mixing is None
        last = ConvEpilogue(w.bias, options.relu, skip, next_sums if options.next_taps else None)
        with features.on_device(x):
            taps, divisor = taps_of(w.scoring), options.score_divisor(x)
            parts = kernels.partial_tap_sums(x, taps) if sums is None else sums.flatten(1)[:, None]
            if w.scoring.shape[2] != taps:
                parts = with_center_tap(parts, taps, divisor)
            sum_taps = options.next_taps if folds else 0
            grid = kernels.conv_grid(x, outputs, x.shape[1] + block_k, SPATIAL_TAPS, sum_taps, packed=True)
            counters = torch.empty(grid.arrival_counters, dtype=torch.int32, device=x.device)
            panel, plan = kernels.route_and_gather(x, parts, w, divisor, neuron, scores, counters)
            filters = w.filters.view(-1, block_k)
            if folds:
                kernels.conv(panel, filters, "packed", plan, y, grid, epilogue=last._replace(arrival_counters=counters))
            else:
                z = features.empty_features(x, outputs)
                kernels.conv(panel, filters, "packed", plan, z, grid, epilogue=ConvEpilogue(arrival_counters=counters))
                mix_frozen(kernels, z, neuron, y, w.mixing, tuple(options.mixing_kernel), last)
        return y, next_sums, neuron, scores


def with_center_tap(parts: Tensor, taps: int, divisor: int) -> Tensor:
    """``parts (B, parts, C * taps)`` of tap sums with one more tap, whose sums make scores of 1."""
    given = parts.view(*parts.shape[:2], -1, taps)
    wide = given.new_full((*given.shape[:3], taps + 1), divisor / given.shape[1])
    wide[..., :taps] = given
    return wide.flatten(2)


def check_packing(packing: str, backend: str) -> None:
    """Refuse weights that were packed for a CPU."""
    if packing != "tiled":
        raise RuntimeError(
            f"backend: got a module packed {packing!r} for another backend, wanted one frozen for {backend!r}: "
            f"freeze(backend={backend!r}), or move it to the GPU"
        )


def mix_frozen(
    kernels: Kernels,
    z: Tensor,  # (B, O, T, H, W)
    neuron: Tensor,  # (B,)
    y: Tensor,  # (B, O, T, H, W)
    mixing: Tensor,  # (N, taps, O, O)
    kernel: tuple[int, int, int],
    last: ConvEpilogue,
) -> None:
    """A mixing kernel that does not fold: a second convolution, with the epilogue of the layer."""
    outputs, sum_taps = z.shape[1], 0 if last.sums is None else last.sums.shape[2]
    grid = kernels.conv_grid(z, outputs, outputs, math.prod(kernel), sum_taps)
    kernels.conv(
        features.as_ndhwc(z),
        mixing.view(-1, outputs, outputs),
        "stored",
        neuron,
        y,
        grid,
        kernel=kernel,
        with_temporal=False,
        k_channels=outputs,
        slots=mixing.shape[0],
        epilogue=last,
    )
