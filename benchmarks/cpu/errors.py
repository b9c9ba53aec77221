"""Errors of both ways in half types against float64: ``python -m benchmarks.cpu.errors``, on any machine.

Where nothing multiplies a half type, the direct way is made to, by what torch has there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cpu.half import HALVES, WAYS
from benchmarks.shapes import NAMED_SHAPES
from dsts_kernels.backends import processor, use_algorithm
from dsts_kernels.functional import gated_conv3d
from dsts_kernels.testing import relative_error


def inputs(channels: int, outputs: int, grid: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """``x, gate, neuron, spatial, temporal``: after a ReLU, a hard gate, outputs of size one."""
    weights = (torch.randn(1, outputs, channels, *kernel) for kernel in ((1, 3, 3), (3, 1, 1)))
    spatial, temporal = ((w * (6 * channels) ** -0.5).to(dtype) for w in weights)
    gate = (torch.rand(1, channels) < 0.5).to(dtype)
    return [
        torch.randn(1, channels, *grid).relu().to(dtype),
        gate,
        torch.zeros(1, dtype=torch.int64),
        spatial,
        temporal,
    ]


def errors(channels: int, outputs: int, grid: tuple[int, int, int]) -> Iterator[tuple[str, str, float, float]]:
    """Dtype, way, and the errors of the output and of the data gradient, in norm."""
    for dtype in HALVES:
        given = inputs(channels, outputs, grid, dtype)
        grad = torch.randn(1, outputs, *grid).to(dtype)
        wide = [t.double() if t.is_floating_point() else t for t in given]
        wide[0].requires_grad_()
        wanted = gated_conv3d(*wide)
        wanted_grad = torch.autograd.grad(wanted, wide[0], grad.double())[0]
        unit = processor.UNITS[dtype][0]
        for way in WAYS:
            leaf = [given[0].detach().requires_grad_(), *given[1:]]
            with use_algorithm(way), patch.object(processor, "unit_of", lambda kind, unit=unit: unit):
                found = gated_conv3d(*leaf)
                found_grad = torch.autograd.grad(found, leaf[0], grad)[0]
            name = str(dtype).removeprefix("torch.")
            yield name, way, relative_error(found, wanted), relative_error(found_grad, wanted_grad)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.errors", description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    for name, grid in NAMED_SHAPES.items():
        for dtype, way, output, gradient in errors(given.channels, given.outputs, grid):
            print(f"{name}, {dtype}, {way}: output {output:.2e}, data gradient {gradient:.2e}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
