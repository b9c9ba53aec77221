"""Single memory-bound kernels of a GPU backend: device time beside the bytes that they must read and write.

Ops are called as modules call them; lists, gather and filters are launchers of their own
(:class:`dsts_kernels.backends.gpu.Kernels`), called as the gated convolution calls them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.timing import device_events
from benchmarks.gpu.workload import TRAINING_BATCH, Workload
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu.lists import panel_width
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.functional import semhash_gate
from dsts_kernels.ops import tap_sums

if TYPE_CHECKING:
    from benchmarks.gpu.record import Bench

__all__ = ["OPS", "OP_NEEDS", "cycling", "op_rows", "route_rows"]

OP_NEEDS = 1.0  # seconds that a kernel takes to profile, roughly
REPEATS = 20
ROUTE_KERNEL = "route_and_gather"


class Call(NamedTuple):
    """One step to time, its shape in words, and the bytes that it must move."""

    shape: str
    step: Callable[[], object]
    moved: int


def cycling(call: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """A step that takes the next input each time."""
    turn = itertools.cycle(inputs)

    @torch.inference_mode()
    def step() -> object:
        return call(next(turn))

    return step


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def routed(work: Workload) -> tuple[Tensor, Tensor]:
    """Hard gates and neurons of a batch, every sample on a neuron of its own as far as they go."""
    logits = work.half.layers[0].gate.detach()
    neuron = torch.arange(TRAINING_BATCH, device=work.device) % logits.shape[0]
    return (logits[neuron] > 0).to(work.dtype), neuron


def sums_calls(work: Workload, backend: str) -> Iterator[Call]:
    for shape in work.grids:
        inputs = work.inputs(shape, TRAINING_BATCH)
        step = cycling(lambda x: tap_sums(x, 1, backend=backend), inputs)
        yield Call(work.problem(shape, TRAINING_BATCH).label, step, size_of(inputs[0]))


def gate_calls(work: Workload, backend: str, backward: bool) -> Iterator[Call]:
    logits = work.half.layers[0].gate.detach().clone().requires_grad_()
    neuron = routed(work)[1]
    size = (TRAINING_BATCH, logits.shape[1])
    noise, grad = (torch.randn(size, device=work.device).to(work.dtype) for _ in range(2))
    hard = torch.arange(TRAINING_BATCH, device=work.device) % 2 == 0
    text, moved = f"{size[0]}x{size[1]}", 3 * size_of(noise)
    if not backward:
        step = lambda: semhash_gate(logits.detach(), noise, hard, neuron=neuron, backend=backend)  # noqa: E731
        yield Call(text, step, moved)
        return
    gate = semhash_gate(logits, noise, hard, neuron=neuron, backend=backend)
    step = lambda: torch.autograd.grad(gate, logits, grad, retain_graph=True)  # noqa: E731
    yield Call(text, step, moved + size_of(logits))


def list_calls(work: Workload, backend: str) -> Iterator[Call]:
    """Samples by neuron and every gate's list, one after the other."""
    kernels, (gate, neuron) = BACKENDS[backend].kernels, routed(work)
    neurons = work.half.layers[0].gate.shape[0]

    def step() -> object:
        groups = kernels.group_samples(neuron, neurons)
        return kernels.list_channels(gate, groups, False, tile_channels(work.dtype))

    yield Call(f"{gate.shape[0]}x{gate.shape[1]}", step, size_of(neuron, gate) + 4 * gate.numel())


def gather_calls(work: Workload, backend: str) -> Iterator[Call]:
    kernels, (gate, neuron) = BACKENDS[backend].kernels, routed(work)
    neurons, width = work.half.layers[0].gate.shape[0], panel_width(work.channels, work.dtype, True)
    lists = kernels.list_channels(gate, kernels.group_samples(neuron, neurons), False, tile_channels(work.dtype))
    for shape in work.grids:
        inputs = work.inputs(shape, TRAINING_BATCH)
        step = cycling(lambda x: kernels.gather_panel(x, gate, neuron, neurons, None, lists, width), inputs)
        yield Call(work.problem(shape, TRAINING_BATCH).label, step, 2 * size_of(inputs[0]))


@torch.no_grad()
def filter_calls(work: Workload, backend: str, back: bool) -> Iterator[Call]:
    """The chosen neurons' operators laid out; or gradients in that order, as those of the whole stack."""
    kernels, neuron = BACKENDS[backend].kernels, routed(work)[1]
    layer = work.half.layers[0]
    weights = [layer.spatial.detach(), layer.temporal.detach()]
    groups = kernels.group_samples(neuron, layer.gate.shape[0])
    filters = kernels.pack_filters(weights, groups.neuron_of, work.dtype, True)
    chosen = size_of(*weights) // layer.gate.shape[0] * groups.neuron_of.shape[0]
    text = f"{groups.neuron_of.shape[0]} neurons of {work.channels}"
    if not back:
        yield Call(text, lambda: kernels.pack_filters(weights, groups.neuron_of, work.dtype, True), 2 * chosen)
        return

    def step() -> object:
        firsts = zip(weights, (0, 9), strict=True)
        return [kernels.unpack_filters(filters, like, groups, None, 3, first, 12, True) for like, first in firsts]

    yield Call(text, step, chosen + size_of(*weights))


OPS: dict[str, Callable[[Workload, str], Iterator[Call]]] = {
    "channel sums": sums_calls,
    "SemHash forward": lambda work, backend: gate_calls(work, backend, False),
    "SemHash backward": lambda work, backend: gate_calls(work, backend, True),
    "lists": list_calls,
    "gather": gather_calls,
    "filters": lambda work, backend: filter_calls(work, backend, False),
    "filters back": lambda work, backend: filter_calls(work, backend, True),
}


def add_op(bench: Bench, backend: str, op: str, shape: str, us: float | None, moved: int) -> None:
    bench.results["ops"].append({"op": op, "backend": backend, "shape": shape, "us": us, "bytes": moved})
    text = f"{us:.1f} us, {moved / us / 1e3:.0f} GB/s" if us else "not measured"
    print(f"{op}, {backend}, {shape}: {text}", flush=True)
    bench.save()


def device_us(step: Callable[[], object]) -> float:
    """Device time of a step's kernels, all together."""
    for _ in range(3):
        step()
    return sum(us for _, us in device_events(step, REPEATS)) / REPEATS


def op_rows(bench: Bench) -> None:
    """Every op on every backend; one that fails is a failure of its own."""
    for (op, calls), backend in itertools.product(OPS.items(), bench.backends):
        try:
            for call in calls(bench.work, backend):
                us = device_us(call.step) if bench.left() > 2 * OP_NEEDS else None
                add_op(bench, backend, op, call.shape, us or None, call.moved)
        except Exception as error:
            bench.failures.append(f"{op}, {backend}: {type(error).__name__}: {str(error).strip()[:100]}")
        bench.work.drop()


def route_rows(bench: Bench, backend: str) -> None:
    """Route-and-gather, the first of a frozen layer's two kernels: reads features, writes as much in panels."""
    for shape in bench.work.grids:
        label = bench.work.problem(shape, TRAINING_BATCH).label
        kernels = bench.results["kernels"].get(f"frozen {backend} {label}", [])
        times = [kernel["us"] for kernel in kernels if ROUTE_KERNEL in kernel["name"]]
        x = bench.work.inputs(shape, TRAINING_BATCH)[0]
        add_op(bench, backend, "route and gather", label, max(times, default=None), 2 * size_of(x))
