"""The launches of a frozen evaluation and of a training step, in order."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from ..backends.gpu.grids import cdiv
from ..backends.packing import tile_channels
from . import cuda, launches
from .cases import FLOAT, SPATIAL, TEMPORAL, Case, reduction
from .chips import Chip, Launch, backend_on
from .common import library, little

MODELS = {"triton": launches, "cuda": cuda}


def model_on(chip: Chip, backend: str | None) -> ModuleType:
    """The launches of ``backend``, where ``chip`` can run it."""
    return MODELS[backend_on(chip, backend)]


def frozen_step(case: Case, chip: Chip, backend: str | None = None) -> list[Launch]:
    """Two launches a layer and one before them."""
    run = model_on(chip, backend)
    sums, parts = run.tap_sums(case, chip)
    samples = [reduction(case, *case.split)] * case.batch
    width = case.channels + tile_channels(case.dtype)
    # All layers but the last write the next one's sums, box by box and then whole; the last reads the skip connection.
    extras = [2.0 * case.batch * case.channels * FLOAT] * (case.layers - 1) + [case.features]
    convs = {extra: run.conv(case, chip, "packed", samples, width, SPATIAL, extra) for extra in set(extras)}
    gathers = [run.route_and_gather(case, chip, parts), *[run.route_and_gather(case, chip, 1)] * (case.layers - 1)]
    return [sums, *(launch for gather, extra in zip(gathers, extras, strict=True) for launch in (gather, convs[extra]))]


def training_forward(case: Case, chip: Chip, run: ModuleType) -> list[Launch]:
    """One layer."""
    c, block = case.channels, tile_channels(case.dtype)
    lists, mixing = case.sample_lists(), (case.neurons * c * c, case.batch * case.positions * c)
    samples = [reduction(case, *pair) for pair in lists]
    return [
        library("scoring kernels summed", case.neurons * c * c * case.element),
        run.tap_sums(case, chip)[0],
        *run.choice(case, chip),
        little("group_samples", case, chip, case.batch, 0, 2),
        little("list_channels", case, chip, case.batch, 2 * case.batch, 4),
        run.gather("gather_panel", case, chip, lists, cdiv(c, block), 2.0 * case.batch * c * FLOAT),
        run.pack_filters(case, chip, SPATIAL),
        run.pack_filters(case, chip, TEMPORAL),
        *run.counters(),
        run.conv(case, chip, "listed", samples, c + block, SPATIAL + TEMPORAL),
        *run.padding(case, chip, *mixing),
        *run.counters(),
        run.plain_conv(case, chip, "stored"),
        library("BatchNorm, ReLU", 5.0 * case.features, 3),  # statistics 1, normalise 2, ReLU 2
    ]


def training_backward(case: Case, chip: Chip, run: ModuleType) -> list[Launch]:
    """One layer whose input, gates and filters all need gradients."""
    c, f, block = case.channels, case.features, tile_channels(case.dtype)
    x = case.batch * case.positions * c  # elements
    mixing = case.neurons * c * c, x
    matrices, wide = case.neurons * c * c * case.element, f * FLOAT // case.element
    union = [case.slot_lists()[b % case.neurons][:2] for b in range(case.batch)]
    inner, passes = 4 * f, 2  # the product of both factors, and its sum
    if case.dtype == torch.float16:  # which are copied to float32 first
        inner, passes = 2 * f + 6 * wide, 4
    return [
        library("ReLU, BatchNorm backward", 8.0 * f, 3),  # 3 passes, then 2 and 3
        library("<dz', z'>", inner, passes),
        *run.padding(case, chip, *mixing),
        *run.counters(),
        run.plain_conv(case, chip, "transposed"),
        little("group_samples", case, chip, case.batch, 0, 2),
        library("mixing gradient zeroed", matrices),
        *run.padding(case, chip, x, x),
        run.weight_gradient(case, chip, False),
        *run.padding(case, chip, x),
        run.data_gradient(case, chip),
        run.gate_sums(case, chip),
        little("list_channels union", case, chip, case.slots, case.batch + 2 * case.slots, 4),
        run.gather("gather_panel", case, chip, union, cdiv(c, block), 2.0 * case.batch * c * FLOAT),
        *run.padding(case, chip, x),
        run.weight_gradient(case, chip, True),
        run.unpack_filters(case, chip, SPATIAL),
        run.unpack_filters(case, chip, TEMPORAL),
        *run.choice_backward(case, chip),
        library("sum of input gradients", 2.0 * f),
    ]


def training_step(case: Case, chip: Chip, backend: str | None = None) -> list[Launch]:
    """Forward and backward of the module, with the gradient of its input; no optimizer."""
    skip = library("skip connection", 3.0 * case.features)
    run = model_on(chip, backend)
    forward, backward = training_forward(case, chip, run), training_backward(case, chip, run)
    return [*forward * case.layers, skip, *backward * case.layers, skip]


STEPS: dict[str, Callable[..., list[Launch]]] = {"frozen": frozen_step, "training": training_step}
