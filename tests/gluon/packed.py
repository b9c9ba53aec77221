"""Problems for the packed convolution in Gluon, what must come out of it, and its launcher on the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels.backends import BACKENDS, packing
from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.gpu.kernels import ConvEpilogue
from dsts_kernels.backends.gpu.lists import Plan, panel_width
from dsts_kernels.backends.triton import gluon, load
from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveGrid, WaveTile
from dsts_kernels.testing import assert_close

from .hopper import Descriptor
from .language import launch
from .language import load as read
from .machine import Machine
from .values import Memory

FOLDER = Path(gluon.__file__).parent.resolve()
SMALL = WaveTile(16, 16, HALF_K, 3)


@dataclass(frozen=True)
class Case:
    """A problem, and how it is run. ``neurons`` are the samples', -1 for one that has none."""

    neurons: tuple[int, ...] = (1, 0, 2)
    splits: tuple[int, ...] = (70, 0, 96)  # spatial channels of each neuron
    channels: int = 96
    outputs: int = 24
    size: tuple[int, int, int] = (2, 5, 7)
    dtype: torch.dtype = torch.bfloat16
    tile: WaveTile = SMALL
    programs: int = 3
    bias: bool = True
    relu: bool = True
    skip: bool = True
    taps: int = 1
    channels_last: bool = True

    def grid(self) -> WaveGrid:
        box = grids.best_box(self.tile.m, *self.size)
        tiles = grids.box_tiles(box, self.size, self.outputs, self.tile.n)
        return WaveGrid(self.tile, box, tiles, len(self.neurons), self.programs)


@dataclass
class Problem:
    """Operands of :func:`..gluon.conv.conv_packed`, and the result in float64."""

    panel: Tensor
    filters: Tensor
    plan: Tensor
    bias: Tensor | None
    skip: Tensor | None
    wanted: Tensor  # (B, O, T, H, W) float64


def problem(case: Case) -> Problem:
    """A layer with random filters, and samples whose panels are gathered already."""
    half, (c, o) = case.dtype, (case.channels, case.outputs)
    flat, first, blocks = [], [], 0
    operators = []
    for split in case.splits:
        pair = [torch.randn(o, taps, n).to(half) / c**0.5 for taps, n in ((9, split), (3, c - split))]
        flat += [packing.pack(operator, "tiled") for operator in pair]
        first.append(blocks)
        blocks += sum(len(packed) for packed in flat[-2:]) // (HALF_K * o)
        operators.append(pair)
    bias = torch.randn(len(case.splits), o)
    panel = torch.zeros(len(case.neurons), *case.size, panel_width(c, half, False), dtype=half)
    plans, wanted = [], torch.full((len(case.neurons), o, *case.size), float("nan"), dtype=torch.float64)
    for sample, neuron in enumerate(case.neurons):
        if neuron < 0:
            plans.append(Plan(-1, 1, 1, 64, 64, 0))
            panel[sample] = float("nan")
            continue
        split = case.splits[neuron]
        one, other = -(-split // HALF_K), -(-(c - split) // HALF_K)
        plans.append(Plan(first[neuron], one, other, split, split, neuron))
        x = torch.randn(c, *case.size).to(half)
        panel[sample, ..., :split] = x[:split].permute(1, 2, 3, 0)
        panel[sample, ..., one * HALF_K : one * HALF_K + c - split] = x[split:].permute(1, 2, 3, 0)
        wanted[sample] = bias[neuron].double().view(-1, 1, 1, 1) if case.bias else 0
        for operator, part, kernel, padding in (
            (operators[neuron][0], x[:split], (1, 3, 3), (0, 1, 1)),
            (operators[neuron][1], x[split:], (3, 1, 1), (1, 0, 0)),
        ):
            if len(part):
                filters = operator.double().transpose(1, 2).reshape(o, len(part), *kernel)
                wanted[sample] += F.conv3d(part[None].double(), filters, padding=padding)[0]
    if case.relu:
        wanted = torch.where(wanted < 0, 0.0, wanted)
    skip = torch.randn(wanted.shape).to(half).contiguous(memory_format=memory_format(case)) if case.skip else None
    wanted = wanted + skip.double() if case.skip else wanted
    packed = torch.cat(flat).view(-1, HALF_K)
    return Problem(panel, packed, torch.tensor(plans).int(), bias if case.bias else None, skip, wanted)


def memory_format(case: Case) -> torch.memory_format:
    return torch.channels_last_3d if case.channels_last else torch.contiguous_format


class OnCpu:
    """Stands in for a kernel: launched like it, it runs its source on CPU tensors."""

    def __init__(self, kernel: Callable, seed: int) -> None:
        self.kernel, self.seed = kernel, seed
        self.machine: Machine | None = None
        self.stores: dict[int, np.ndarray] = {}  # how often each element was stored, by the tensor's address

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, num_warps, **constants: self.run(grid[0], arguments, constants)

    def run(self, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        memories = [(one, memory_of(one)) for one in arguments if isinstance(one, Tensor)]
        by_tensor = {id(one): memory for one, memory in memories}
        given = [
            Descriptor(memory_of(one.base), one.block_shape)
            if hasattr(one, "block_shape")
            else by_tensor.get(id(one), one)
            for one in arguments
        ]
        self.machine = launch(self.kernel, programs, *given, seed=self.seed, **constants)
        for tensor, memory in memories:
            if memory.stores.any() or tensor.dtype == torch.int32:
                flat = torch.from_numpy(memory.flat).to(tensor.dtype)
                tensor.as_strided((tensor.numel(),), (1,)).copy_(flat)
            self.stores[tensor.data_ptr()] = memory.stores


def memory_of(tensor: Tensor) -> Memory:
    """A dense tensor in any order, as it lies."""
    lying = tensor.as_strided((tensor.numel(),), (1,)) if not tensor.is_contiguous() else tensor
    values = lying.float() if tensor.dtype.is_floating_point else lying
    return Memory(values.numpy(), str(tensor.dtype).removeprefix("torch."))


def kernels(changed: dict[str, str] | None = None, file: str = "conv.py") -> dict[str, Callable]:
    """The functions of a file of kernels, of ``changed`` sources by file name where there are any."""
    return read(FOLDER / file, {FOLDER / name: source for name, source in (changed or {}).items()})


def run(monkeypatch: Any, case: Case, seed: int = 0, changed: dict[str, str] | None = None) -> tuple[Any, ...]:
    """Output, tap sums, the problem and the stand-in, after a run in the order of ``seed``."""
    given, launcher = problem(case), conv_module()
    spy = OnCpu(kernels(changed)["conv_gluon_kernel"], seed)
    out = torch.full(given.wanted.shape, float("nan"), dtype=case.dtype)
    out = out.contiguous(memory_format=memory_format(case))
    sums = torch.full((*out.shape[:2], case.taps), float("nan")) if case.taps else None
    monkeypatch.setattr(launcher, "conv_gluon_kernel", spy)
    epilogue = ConvEpilogue(given.bias, case.relu, given.skip, sums)
    launcher.conv_packed(given.panel, given.filters, given.plan, out, case.grid(), epilogue)
    return out, sums, given, spy


def conv_module() -> ModuleType:
    return load("gluon.conv")


def check(out: Tensor, sums: Tensor | None, given: Problem) -> None:
    """Every element right, NaN exactly where a sample has no filters, tap sums those of what was stored.

    Products are added up in float32, so a result differs from float64 by its last rounding and little more.
    """
    step = torch.finfo(out.dtype).eps
    for sample, wanted in enumerate(given.wanted):
        if given.plan[sample, 0] < 0:
            assert out[sample].isnan().all(), f"sample {sample} has no filters, and is not NaN"
            if sums is not None:  # of taps that meet a position
                met = BACKENDS["eager"].tap_sums(torch.ones_like(given.wanted[:1]), sums.shape[2])[0] > 0
                assert torch.equal(sums[sample].isnan(), met)
            continue
        torch.testing.assert_close(out[sample].double(), wanted, rtol=step, atol=1e-4)
        if sums is not None:
            y = out[sample : sample + 1].double()
            literal = BACKENDS["eager"].tap_sums(y, sums.shape[2])[0]
            assert_close(sums[sample], literal, dtype=torch.float32, name=f"tap sums of sample {sample}")
