"""The launches of a frozen evaluation and of a training step, in order."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends.packing import tile_channels
from ..backends.triton.boxes import cdiv
from .chips import Chip, Launch
from .launches import (
    FLOAT,
    SPATIAL,
    TEMPORAL,
    Case,
    conv,
    data_gradient,
    gather,
    library,
    little,
    pack_filters,
    plain_conv,
    reduction,
    route_and_pack,
    tap_sums,
    unpack_filters,
    weight_gradient,
)


def frozen_step(case: Case, chip: Chip) -> list[Launch]:
    """Two launches a layer and one before them."""
    sums, parts = tap_sums(case, chip)
    samples = [reduction(case, *case.split)] * case.batch
    width = case.channels + tile_channels(case.dtype)
    # All layers but the last write the next one's sums, box by box and then whole; the last reads the skip connection.
    more = [2.0 * case.batch * case.channels * FLOAT] * (case.layers - 1) + [case.features]
    convs = {extra: conv(case, chip, "packed", samples, width, SPATIAL, extra) for extra in set(more)}
    packs = [route_and_pack(case, chip, parts), *[route_and_pack(case, chip, 1)] * (case.layers - 1)]
    return [sums, *(launch for pack, extra in zip(packs, more, strict=True) for launch in (pack, convs[extra]))]


def training_forward(case: Case, chip: Chip) -> list[Launch]:
    """One layer."""
    c, block = case.channels, tile_channels(case.dtype)
    lists = case.sample_lists()
    samples = [reduction(case, *pair) for pair in lists]
    return [
        library("scoring kernels summed", case.neurons * c * c * case.element),
        tap_sums(case, chip)[0],
        library("scores, choice", 0, 4),
        little("semhash", case, chip, cdiv(c, 1024) * case.batch, 3 * case.batch, 2),
        little("group", case, chip, case.batch, 0, 2),
        little("list", case, chip, case.batch, 2 * case.batch, 4),
        gather("pack", case, chip, lists, cdiv(c, block), 2.0 * case.batch * c * FLOAT),
        pack_filters(case, chip, SPATIAL),
        pack_filters(case, chip, TEMPORAL),
        library("flags", 0),
        conv(case, chip, "listed", samples, c + block, SPATIAL + TEMPORAL),
        library("flags", 0),
        plain_conv(case, chip, "rows"),
        library("softmax", 0, 2),
        library("BatchNorm, ReLU", 5.0 * case.features, 3),  # statistics 1, normalise 2, ReLU 2
    ]


def training_backward(case: Case, chip: Chip) -> list[Launch]:
    """One layer whose input, gates and filters all need gradients."""
    c, f, block = case.channels, case.features, tile_channels(case.dtype)
    matrices, wide = case.neurons * c * c * case.element, f * FLOAT // case.element
    union = [case.slot_lists()[b % case.neurons][:2] for b in range(case.batch)]
    inner, passes = 4 * f, 2  # the product of both factors, and its sum
    if case.dtype == torch.float16:  # which are copied to float32 first
        inner, passes = 2 * f + 6 * wide, 4
    return [
        library("ReLU, BatchNorm backward", 8.0 * f, 3),  # 3 passes, then 2 and 3
        library("<dz', z'>", inner, passes),
        library("flags", 0),
        plain_conv(case, chip, "columns"),
        little("group", case, chip, case.batch, 0, 2),
        library("mixing gradient zeroed", matrices),
        weight_gradient(case, chip, False),
        little("group", case, chip, case.batch, 0, 2),
        little("list", case, chip, case.batch, 2 * case.batch, 4),
        pack_filters(case, chip, SPATIAL),
        pack_filters(case, chip, TEMPORAL),
        data_gradient(case, chip),
        library("gate gradient summed", 0, 2),
        little("list union", case, chip, case.slots, case.batch + 2 * case.slots, 4),
        gather("pack", case, chip, union, cdiv(c, block), 2.0 * case.batch * c * FLOAT),
        weight_gradient(case, chip, True),
        unpack_filters(case, chip, SPATIAL),
        unpack_filters(case, chip, TEMPORAL),
        little("semhash_backward", case, chip, cdiv(c, 256) * case.neurons, 3 * case.batch + case.neurons, 2),
        library("softmax, scores backward", 2.0 * matrices, 6),  # the scoring gradient is zeroed, then written
        library("sum of input gradients", 2.0 * f),
    ]


def training_step(case: Case, chip: Chip) -> list[Launch]:
    """Forward and backward of the module, with the gradient of its input; no optimizer."""
    skip = library("skip connection", 3.0 * case.features)
    forward, backward = training_forward(case, chip), training_backward(case, chip)
    return [*forward * case.layers, skip, *backward * case.layers, skip]


STEPS: dict[str, Callable[[Case, Chip], list[Launch]]] = {"frozen": frozen_step, "training": training_step}
