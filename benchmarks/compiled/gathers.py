"""What the gathers' compiled code touches: lines, sectors and passes of shared memory, warp by warp.

``python -m benchmarks.compiled.gathers`` compiles Triton's two gathers for chips that are not here, at the paper's
channels, and runs a CTA of each on the CPU (:mod:`.ptx`) with sorted random lists. The table goes to
docs/log/h100.md; tests/backends/triton/test_ahead_gathers.py asserts what must hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dsts_kernels.backends.base import FrozenWeights
from dsts_kernels.backends.gpu.lists import Lists, panel_width
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.roofline.gathers import WAYS, markdown

from .ahead import SHAPES, TARGETS
from .simulated import Chip, Touched, simulated

CHANNELS, NEURONS = 1024, 10
MEMORY = {"channels-last": torch.channels_last_3d, "channels-first": torch.contiguous_format}


class Mean(NamedTuple):
    """Of a warp's accesses to one tensor."""

    kernel: str
    tensor: str
    name: str
    count: int
    bytes: float  # useful, of an access
    lines: float
    sectors: float
    passes: float

    @property
    def waste(self) -> float:
        """Bytes of sectors over bytes that were wanted."""
        return self.sectors * 32 / self.bytes


def means(touched: Iterable[Touched]) -> list[Mean]:
    groups: dict[tuple[str, str, str], list[Touched]] = {}
    for one in touched:
        groups.setdefault((one.kernel, one.tensor, one.access.name), []).append(one)

    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    return [
        Mean(
            *key,
            len(group),
            mean([one.access.width * one.access.lanes for one in group]),
            mean([one.access.lines for one in group]),
            mean([one.access.sectors for one in group]),
            mean([one.access.passes for one in group]),
        )
        for key, group in groups.items()
    ]


def features(shape: str, layout: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(1, CHANNELS, *SHAPES[shape])
    return x.to(dtype).contiguous(memory_format=MEMORY[layout])


def gather_panel(chip: Chip, x: Tensor) -> Tensor:
    """Training's gather of hard gates, half of the channels spatial."""
    gate = torch.zeros(1, CHANNELS, dtype=x.dtype)
    half, blocks = CHANNELS // 2, CHANNELS // 2 // tile_channels(x.dtype)
    order = torch.cat([part.sort()[0] for part in torch.randperm(CHANNELS).split(half)])
    gate[0, order[:half]] = 1
    plans = torch.tensor([[0, blocks, blocks, half, half, 0]], dtype=torch.int32)
    lists = Lists(order.int()[None], plans, torch.empty(0, dtype=torch.int8))
    kernels, neuron = chip.backend.kernels, torch.zeros(1, dtype=torch.int64)
    return kernels.gather_panel(x, gate, neuron, NEURONS, None, lists, panel_width(CHANNELS, x.dtype, True))


def frozen_weights(dtype: torch.dtype, taps: int = 1) -> FrozenWeights:
    """Of a layer whose neurons each list a random half of the channels."""
    orders, starts = [], [0]
    for _ in range(NEURONS):
        shuffled = torch.randperm(CHANNELS)
        orders.append(torch.cat([part.sort()[0] for part in shuffled.split(CHANNELS // 2)]))
        starts.append(starts[-1] + CHANNELS // 2)
    return FrozenWeights(
        torch.randn(NEURONS, CHANNELS, taps), torch.stack(orders).int(), torch.tensor(starts),
        torch.empty(0, dtype=dtype), torch.empty(NEURONS, CHANNELS), None,
    )  # fmt: skip


def route_and_gather(chip: Chip, x: Tensor) -> Tensor:
    """A frozen layer's first launch."""
    neuron, scores = torch.empty(1, dtype=torch.int64), torch.empty(1, NEURONS)
    counters = torch.empty(300, dtype=torch.int32)
    return chip.backend.kernels.route_and_gather(
        x, torch.randn(1, 1, CHANNELS), frozen_weights(x.dtype), 1, neuron, scores, counters
    )[0]


GATHERS = {"gather_panel": gather_panel, "route_and_gather": route_and_gather}


def count(gather: str, architecture: str, shape: str, layout: str, dtype: torch.dtype, **changes: bool) -> list[Mean]:
    """Accesses of the first CTA, with switches changed."""
    with switched(**changes), simulated(architecture, 132, lambda grid: [(0, 0)]) as chip:
        GATHERS[gather](chip, features(shape, layout, dtype))
        return means(chip.accesses)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.gathers", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", action="append", choices=list(TARGETS))
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--predict", action="store_true", help="what they should take by these counts, and stop")
    options = parser.parse_args(arguments)
    if options.predict:
        print(markdown())
        return
    print("| kernel | chip | features | how | access | count | bytes | lines | sectors | passes |")
    print("| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for architecture in options.architecture or list(TARGETS):
        for shape in options.shape or ["tpn"]:
            for gather in GATHERS:
                for layout in MEMORY:
                    for title, way in WAYS.items():
                        if way.kernel != gather:
                            continue
                        torch.manual_seed(0)
                        for one in count(gather, architecture, shape, layout, torch.bfloat16, **way.changes):
                            print(
                                f"| {gather} | {architecture} | {shape}, {layout} | {title} | "
                                f"{one.tensor} {one.name} | {one.count} | {one.bytes:.0f} | {one.lines:.1f} | "
                                f"{one.sectors:.1f} | {one.passes:.1f} |"
                            )


if __name__ == "__main__":
    main()
