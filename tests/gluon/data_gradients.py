"""Problems for the data gradient in Gluon, what must come out of it, and its launcher on the stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.gpu.lists import Lists, Plan
from dsts_kernels.backends.triton import load
from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveGrid, WaveTile

from .packed import OnCpu, kernels, memory_format

GATES = ("hard", "soft", "spatial", "temporal")  # a random half, anything, all ones, all zeros
FILE, KERNEL = "data_gradient.py", "data_gradient_gluon_kernel"

SMALL = WaveTile(16, 16, HALF_K, 3)


@dataclass(frozen=True)
class Case:
    """A problem, and how it is run. Samples choose ``neurons``, -1 for none, and have ``gates`` by turns."""

    neurons: tuple[int, ...] = (1, 0, 2)
    gates: tuple[str, ...] = GATES
    channels: int = 24
    outputs: int = 72
    size: tuple[int, int, int] = (2, 5, 7)
    dtype: torch.dtype = torch.bfloat16
    tile: WaveTile = SMALL
    programs: int = 3
    need_x: bool = True
    infinite: bool = False  # every filter of the temporal operator, which gates of ones close off
    channels_last: bool = True

    def grid(self) -> WaveGrid:
        box = grids.best_box(self.tile.m, *self.size)
        tiles = grids.box_tiles(box, self.size, self.channels, self.tile.n)
        return WaveGrid(self.tile, box, tiles, len(self.neurons), self.programs)


@dataclass
class Problem:
    """Operands of :func:`..gluon.data_gradient.data_gradient`, and the results in float64, NaN without a neuron."""

    grad: Tensor  # (B, T, H, W, O)
    x: Tensor
    gate: Tensor
    plans: Tensor
    filters: Tensor  # (S * 12, C, O)
    wanted_x: Tensor
    wanted_gate: Tensor


def gate_of(kind: str, channels: int, dtype: torch.dtype) -> Tensor:
    if kind == "soft":
        return (torch.rand(channels) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    share = {"hard": 0.5, "spatial": 1.0, "temporal": 0.0}[kind]
    return (torch.rand(channels) < share).to(dtype)


def problem(case: Case) -> Problem:
    half, b, (c, o) = case.dtype, len(case.neurons), (case.channels, case.outputs)
    slots = max(case.neurons) + 1
    filters = (torch.randn(max(slots, 1), 12, c, o) / (c * 6) ** 0.5).to(half)
    if case.infinite:
        filters[:, 9:] = float("inf")
    x = torch.randn(b, c, *case.size).to(half).contiguous(memory_format=memory_format(case))
    grad = torch.randn(b, *case.size, o).to(half)
    gate = torch.stack([gate_of(case.gates[i % len(case.gates)], c, half) for i in range(b)])
    plans = torch.tensor([Plan(n, 1, 1, c, 0, i) for i, n in enumerate(case.neurons)]).int()
    wanted_x = torch.full(x.shape, float("nan"), dtype=torch.float64)
    wanted_gate = torch.full((b, c), float("nan"), dtype=torch.float64)
    for i, neuron in enumerate(case.neurons):
        if neuron < 0:
            continue
        weight = filters[neuron].double().permute(2, 1, 0)  # (O, C, 12)
        spatial, temporal = weight[..., :9].reshape(o, c, 1, 3, 3), weight[..., 9:].reshape(o, c, 3, 1, 1)
        g = grad[i : i + 1].double().permute(0, 4, 1, 2, 3)
        dxs = F.conv_transpose3d(g, spatial, padding=(0, 1, 1))[0]
        dxt = F.conv_transpose3d(g, temporal, padding=(1, 0, 0))[0]
        share = gate[i].double().view(-1, 1, 1, 1)
        wanted_x[i] = torch.where(share == 0, 0, share * dxs) + torch.where(share == 1, 0, (1 - share) * dxt)
        wanted_gate[i] = (x[i].double() * (dxs - dxt)).sum((1, 2, 3))
    return Problem(grad, x, gate, plans, filters.view(-1, c, o), wanted_x, wanted_gate)


def run(monkeypatch: Any, case: Case, seed: int = 0, changed: dict[str, str] | None = None) -> tuple[Any, ...]:
    """``dx``, ``dgate`` by box, the problem and the stand-in, after a run in the order of ``seed``."""
    given, launcher, grid = problem(case), load("gluon.data_gradient"), case.grid()
    spy = OnCpu(kernels(changed, FILE)[KERNEL], seed)
    monkeypatch.setattr(launcher, KERNEL, spy)
    dx = torch.full_like(given.x, float("nan")) if case.need_x else None
    dgate = torch.full((len(case.neurons), grid.tiles.along, case.channels), float("nan"))
    lists = Lists(None, given.plans, None)
    launcher.data_gradient(given.grad, given.x, given.gate, lists, given.filters, dx, dgate, grid)
    return dx, dgate, given, spy


def check(dx: Tensor | None, dgate: Tensor, given: Problem) -> None:
    """Every element right, NaN exactly where a sample has no neuron. Products are added up in float32."""
    eps = torch.finfo(given.x.dtype).eps
    if dx is not None:
        torch.testing.assert_close(dx.double(), given.wanted_x, rtol=eps, atol=1e-4, equal_nan=True)
    norm = given.x.double().square().sum((1, 2, 3, 4)).sqrt().max()
    torch.testing.assert_close(
        dgate.sum(1).double(), given.wanted_gate, rtol=1e-5, atol=1e-5 * float(norm), equal_nan=True
    )
