"""Problems for the weight gradient in Gluon, what must come out of it, and its launcher on the stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsts_kernels.backends.gpu.lists import Groups, Lists, Plan, panel_width
from dsts_kernels.backends.triton import load
from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveTile

from .data_gradients import GATES, gate_of
from .packed import OnCpu, kernels

FILE, KERNEL = "weight_gradient.py", "weight_gradient_gluon_kernel"

SMALL = WaveTile(64, 64, 16, 3)


@dataclass(frozen=True)
class Case:
    """A problem, and how it is run. ``neurons`` are the samples', -1 for one that has none; ``gates`` theirs, by turns.

    ``mixing`` is a mixing kernel's size: its gradient has no lists, and of 1x1x1 goes to neurons instead of slots.
    """

    neurons: tuple[int, ...] = (1, 0, 1)
    all_neurons: int = 3
    gates: tuple[str, ...] = GATES
    channels: int = 72
    outputs: int = 24
    size: tuple[int, int, int] = (2, 5, 3)
    dtype: torch.dtype = torch.bfloat16
    tile: WaveTile = SMALL
    programs: int = 3
    out: torch.dtype = torch.float32
    mixing: tuple[int, int, int] | None = None

    @property
    def by_neuron(self) -> bool:
        return self.mixing == (1, 1, 1)


@dataclass
class Problem:
    """Operands of :func:`..gluon.weight_gradient.weight_gradient`, and the result in float64: NaN where nothing is
    written."""

    left: Tensor
    right: Tensor
    lists: Lists | None
    groups: Groups
    k_channels: int
    kernel: tuple[int, int, int]
    sign: int
    wanted: Tensor  # (slots or neurons, taps, k_channels, columns)


def groups_of(neurons: tuple[int, ...], count: int) -> Groups:
    """As the kernel that groups samples leaves them; nonsense where it writes nothing."""
    chosen = sorted({n for n in neurons if n >= 0})
    slots, sorted_by = min(len(neurons), count), sorted(range(len(neurons)), key=lambda i: neurons[i])
    groups = torch.full((slots, 2), -12345, dtype=torch.int32)
    for slot, neuron in enumerate(chosen):
        mine = [place for place, sample in enumerate(sorted_by) if neurons[sample] == neuron]
        groups[slot] = torch.tensor([mine[0], len(mine)])
    neuron_of = torch.tensor(chosen + [-1] * (slots - len(chosen))).int()
    slot_of = torch.tensor([chosen.index(n) if n in chosen else -1 for n in range(count)]).int()
    members = torch.tensor(sorted_by).int()
    slots_of = torch.tensor([chosen.index(n) if n >= 0 else -1 for n in neurons]).int()
    return Groups(slots_of, neuron_of, slot_of, groups, members)


def conv_gradient(x: Tensor, grad: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Of a filter ``(O, C, *kernel)``, by ``x (C, T, H, W)`` and ``grad (O, T, H, W)``, as ``(taps, C, O)``."""
    shape, padding = (len(grad), len(x), *kernel), [k // 2 for k in kernel]
    found = torch.nn.grad.conv3d_weight(x[None].double(), shape, grad[None].double(), padding=padding)
    return found.flatten(2).permute(2, 1, 0)


def problem(case: Case) -> Problem:
    half, b, (c, o) = case.dtype, len(case.neurons), (case.channels, case.outputs)
    groups = groups_of(case.neurons, case.all_neurons)
    x, grad = (torch.randn(b, n, *case.size).to(half) for n in (c, o))
    right = grad.permute(0, 2, 3, 4, 1).contiguous()
    if case.mixing is not None:  # left and right change places, and with them the direction of a tap
        taps, rows = torch.Size(case.mixing).numel(), case.all_neurons if case.by_neuron else len(groups.neuron_of)
        wanted = torch.full((rows, taps, o, c), float("nan"), dtype=torch.float64)
        for i, neuron in enumerate(case.neurons):
            if neuron >= 0:
                index = neuron if case.by_neuron else groups.slots[i]
                found = conv_gradient(x[i], grad[i], case.mixing).transpose(1, 2)
                wanted[index] = found + wanted[index].nan_to_num(0)
        left = x.permute(0, 2, 3, 4, 1).contiguous()
        return Problem(right, left, None, groups, o, case.mixing, -1, wanted)
    gate = torch.stack([gate_of(case.gates[i % len(case.gates)], c, half) for i in range(b)])
    slots = len(groups.neuron_of)
    order, plans = torch.full((slots, c), 2**30, dtype=torch.int32), torch.zeros(slots, len(Plan._fields)).int()
    panel = torch.full((b, *case.size, panel_width(c, half, True)), float("nan"), dtype=half)
    wanted = torch.full((slots, 12, c, o), float("nan"), dtype=torch.float64)
    for slot, neuron in enumerate(groups.neuron_of.tolist()):
        samples = [i for i, n in enumerate(case.neurons) if n == neuron >= 0]
        if not samples:
            continue
        ones, zeros = (gate[samples] == 1).all(0), (gate[samples] == 0).all(0)
        parts = [torch.nonzero(mask).flatten() for mask in (ones, ~ones & ~zeros, zeros)]
        order[slot] = torch.cat(parts)
        spatial, temporal = torch.cat(parts[:2]), torch.cat(parts[1:])
        blocks = [-(-len(part) // HALF_K) for part in (spatial, temporal)]
        plans[slot] = torch.tensor(Plan(slot, *blocks, len(spatial), c - len(temporal), slot))
        for i in samples:
            for listed, share, first, kernel, taps in (
                (spatial, gate[i], 0, (1, 3, 3), slice(0, 9)),
                (temporal, 1 - gate[i], blocks[0] * HALF_K, (3, 1, 1), slice(9, 12)),
            ):
                if not len(listed):
                    continue
                values = x[i, listed] * share[listed].view(-1, 1, 1, 1)
                panel[i, ..., first : first + len(listed)] = values.permute(1, 2, 3, 0)
                found, place = conv_gradient(values, grad[i], kernel), wanted[slot, taps]
                place[:, listed] = found + place[:, listed].nan_to_num(0)
    return Problem(panel, right, Lists(order, plans, None), groups, c, (1, 3, 3), 1, wanted)


def run(monkeypatch: Any, case: Case, seed: int = 0, changed: dict[str, str] | None = None) -> tuple[Any, ...]:
    """Filter gradients, the problem and the stand-in, after a run in the order of ``seed``."""
    given, launcher = problem(case), load("gluon.weight_gradient")
    spy = OnCpu(kernels(changed, FILE)[KERNEL], seed)
    monkeypatch.setattr(launcher, KERNEL, spy)
    monkeypatch.setattr(load("launch"), "chip", lambda device: ("sm_90", case.programs))
    launcher.gradient_launch.cache_clear()
    out = torch.full(given.wanted.shape, float("nan"), dtype=case.out)
    launcher.weight_gradient(
        given.left, given.right, given.lists, given.groups, given.k_channels, given.kernel, case.mixing is None,
        given.sign, out, case.by_neuron, case.tile,
    )  # fmt: skip
    return out, given, spy


def check(out: Tensor, given: Problem) -> None:
    """Listed rows right, all others as they were. Products are added up in float32."""
    assert torch.equal(out.isnan(), given.wanted.isnan()), "other rows than the listed ones were written"
    rtol = 1e-5 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), given.wanted, rtol=rtol, atol=2e-4, equal_nan=True)
