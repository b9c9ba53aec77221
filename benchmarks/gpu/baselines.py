"""The baselines as a good engineer runs them on a GPU: autocast to half, channels-last, lists padded for tensor cores.

They are those of :mod:`benchmarks.baselines`, whose panels were laid out for a CPU. cuDNN's kernels in half
precision want channel counts that are multiples of 8 and few distinct shapes, so folded lists are padded with channels
of weight zero.
In training the choice is measured, not assumed: gathered lists a sample, or dense masked operators a neuron.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import HandwrittenEval, Unit
from dsts_kernels.reference import DSTS

__all__ = ["GROUPINGS", "AutocastDSTS", "padded", "training_grouping"]

MULTIPLE = 64
GROUPINGS = ("lists a sample", "dense a neuron")


class AutocastDSTS(DSTS):
    """The literal module on float32 parameters, its convolutions in half precision."""

    half = torch.bfloat16

    def forward(self, *args, **kwargs):
        with torch.autocast(args[0].device.type, self.half):
            return super().forward(*args, **kwargs)


def padded(module: HandwrittenEval) -> HandwrittenEval:
    """The same module with every channel list a multiple of :data:`MULTIPLE` long: channel 0 again, times zero."""
    for neuron in (neuron for layer in module.folded for neuron in layer.neurons):
        for side in ("spatial", "temporal"):
            channels, weight = getattr(neuron, f"{side}_channels"), getattr(neuron, side)
            extra = -channels.numel() % MULTIPLE
            if channels.numel() and extra:
                weight = F.pad(weight, (0, 0, 0, 0, 0, extra)).contiguous(memory_format=torch.channels_last)
                setattr(neuron, f"{side}_channels", F.pad(channels, (0, extra)))
                setattr(neuron, side, weight)
    return module


def dense_units(gate: Tensor, neuron: Tensor) -> list[Unit]:
    """One unit a neuron, on all channels."""
    by_neuron: dict[int, list[int]] = {}
    for b, i in enumerate(neuron.tolist()):
        by_neuron.setdefault(i, []).append(b)
    return [Unit(i, samples, None, None) for i, samples in by_neuron.items()]


@contextlib.contextmanager
def training_grouping(grouping: str) -> Iterator[None]:
    """How :class:`benchmarks.baselines.HandwrittenTrain` groups samples inside the block: one of :data:`GROUPINGS`."""
    if grouping == GROUPINGS[0]:
        yield
        return
    with mock.patch.object(baselines, "group_units", dense_units):
        yield
