"""Time on a GPU: device events over rotated inputs, kernels by name, and the chip's own two rates.

A step is timed on inputs that take turns and together exceed twice the L2 cache, so none is found there. A time is
the median over at least :data:`LEAST_ROUNDS` steps, each between two events of its own. The time of a single kernel
is the profiler's, for between events a launch of a few microseconds counts too; a step's kernel time is the sum of
every launch. Beside it stands the host's: how long it takes to ask for a step of a device that has nothing else to do.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dsts_kernels.graphed import capturing

__all__ = [
    "NOT_RUN",
    "Timing",
    "captured",
    "copy_rate",
    "device_events",
    "host_us",
    "kernel_sum",
    "kernel_times",
    "matrix_rate",
    "peak_extra_mib",
    "require_gpu",
    "rotation_count",
    "slug",
    "time_steps",
]

NOT_RUN = 77  # exit code of a step that cannot run here, and said why
LEAST_ROUNDS, MOST_ROUNDS = 20, 200
HOST_ROUNDS = 20
WARM_UP = 3
L2_TIMES = 2
COPY_BYTES = 1 << 30
MATRIX = 8192
NAME_LENGTH = 80


def slug(device_name: str) -> str:
    """A file name for a device: ``"NVIDIA H100 80GB HBM3"`` is ``"h100"``."""
    short = re.search(r"\b(?:RTX \w*?)?[A-Z]{0,3}\d{2,4}[A-Z]{0,2}\b", device_name.replace("GeForce ", ""))
    words = short.group() if short else device_name
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "gpu"


def require_gpu() -> torch.device:
    """The current GPU, or an exit that says there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA GPU here (torch.cuda.is_available() is False); nothing was run")
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Timing:
    """Milliseconds a step."""

    median: float
    least: float
    rounds: int


def rotation_count(input_bytes: int, l2_bytes: int) -> int:
    """Copies of an input whose total exceeds :data:`L2_TIMES` times the L2 cache; at least two."""
    return max(2, L2_TIMES * l2_bytes // max(1, input_bytes) + 1)


def time_steps(
    steps: Sequence[Callable[[], object]], seconds: float, before: Callable[[], object] = lambda: None
) -> Timing:
    """Median of ``steps`` taken in turn, for about ``seconds`` after a warm-up.

    ``before`` runs untimed ahead of each step (gradients dropped, say).
    """
    for i in range(max(WARM_UP, len(steps))):  # every input once: a library may search algorithms for a new shape
        before()
        steps[i % len(steps)]()
    torch.cuda.synchronize()
    began = time.perf_counter()
    before()
    steps[0]()
    torch.cuda.synchronize()
    once = max(1e-6, time.perf_counter() - began)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for i, (start, end) in enumerate(events):
        before()
        start.record()
        steps[i % len(steps)]()
        end.record()
    torch.cuda.synchronize()
    ms = [start.elapsed_time(end) for start, end in events]
    return Timing(statistics.median(ms), min(ms), rounds)


def captured(
    step: Callable[[], Tensor], pool: object | None = None, before: Callable[[], object] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a CUDA graph that reads its tensors where they lie, and the output that a replay writes.

    pool: another graph's, to share memory with it; what is kept of an output is never shared.
    before: runs ahead of each step and is not captured: gradients dropped, so that the graph has them for its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            before()
            step()
        before()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with capturing(torch.device("cuda")), torch.cuda.graph(graph, pool=pool):
        y = step()
    return graph, y


def host_us(step: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Microseconds that the host takes to ask for a step, the median. A step that waits for the device counts that too.

    The device is idle when a step begins: else the host might wait for room in the queue of launches.
    """
    seconds = []
    for _ in range(WARM_UP + HOST_ROUNDS):
        before()
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(seconds[WARM_UP:])


def peak_extra_mib(step: Callable[[], object]) -> float:
    """Most memory that one step holds beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    del kept
    return extra / 2**20


def device_events(step: Callable[[], object], repeats: int = 1) -> list[tuple[str, float]]:
    """Everything that ``repeats`` steps ran on the GPU, in order: ``(name, microseconds)``, copies and fills too.

    The first profile of a process may miss events, so one is taken and thrown away.
    """
    for wanted in (1, repeats):
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(wanted):
                step()
            torch.cuda.synchronize()
    on_device = [e for e in record.events() if e.device_type == DeviceType.CUDA]
    events = [e for e in on_device if not getattr(e, "is_user_annotation", False)]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, float(e.time_range.elapsed_us())) for e in events]


def short_name(name: str) -> str:
    """A kernel's name without its template arguments, which fill a screen."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"[<(].*", "", name)[:NAME_LENGTH] or name[:NAME_LENGTH]


def kernel_times(step: Callable[[], object], repeats: int = 10) -> list[dict[str, Any]]:
    """Kernels of a step by name, in the order they first run.

    ``calls`` a step; ``launches``, the microseconds of each launch of a step, as the median over steps (``None`` where
    steps launch it differently often); ``us``, a call's mean, so that ``calls * us`` is the sum of every launch.
    A median over all launches of a name would leave out that they are of several sizes.
    """
    times: dict[str, list[float]] = {}
    for name, us in device_events(step, repeats):
        times.setdefault(short_name(name), []).append(us)
    return [kernel_entry(name, us, repeats) for name, us in times.items()]


def kernel_entry(name: str, us: Sequence[float], repeats: int) -> dict[str, Any]:
    """Of a kernel's launches in ``repeats`` steps, one after the other."""
    if len(us) % repeats:
        return {"name": name, "calls": len(us) / repeats, "us": statistics.fmean(us), "launches": None}
    calls = len(us) // repeats
    launches = [statistics.median(us[place::calls]) for place in range(calls)]
    return {"name": name, "calls": calls, "us": statistics.fmean(launches), "launches": launches}


def kernel_sum(kernels: Sequence[dict[str, Any]]) -> float:
    """Microseconds of every launch of a step."""
    return sum(kernel["calls"] * kernel["us"] for kernel in kernels)


def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and bytes written both counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = time_steps([lambda: target.copy_(source)], seconds=0.3)
    return 2 * COPY_BYTES / timing.median / 1e6


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """GFLOP/s of a large product of random matrices, in the form of :func:`benchmarks.report.machine.matrix_rate`."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    timing = time_steps([lambda: torch.mm(a, b)], seconds=0.5)
    name = f"torch.mm {MATRIX}^3 {str(dtype).removeprefix('torch.')}"
    return {name: 2 * MATRIX**3 / timing.median / 1e6, "best": name}
