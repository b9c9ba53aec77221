"""Where the time goes: every stage of a frozen evaluation or a training step beside its floor.

``python -m benchmarks.cpu.stages`` wraps the backend's passes over memory, the stages of its fast convolution and the
library's convolutions with a clock and runs the module of the benchmark. The floor of a product is its operations
over the machine's matrix-product rate, that of a pass its bytes (read and written once) over the machine's copy
rate, both measured in the same run. What no stage covers (autograd, BatchNorm, routing, Python) is the last line.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.features import make_features
from benchmarks.report.machine import copy_rate, describe, matrix_rate
from benchmarks.shapes import NAMED_SHAPES, Problem, parse_shape
from benchmarks.variants import build, make_draws, make_reference, training_step
from dsts_kernels import backends
from dsts_kernels.backends import convolution
from dsts_kernels.backends.winograd import SPATIAL_TILES, TEMPORAL_TILES, tile_sizes

PASSES = ("gather_panel", "epilogue", "gate_merge", "tap_sums", "semhash_gate", "semhash_gate_backward")
FAST = {
    "winograd": ("input", "filter", "product", "output"),
    "winograd_weight_gradient": ("input", "gradient", "product", "weight"),
}
CONVOLUTIONS = ("forward", "data_gradient", "weight_gradient")
ROUNDS = 7


def tensor_bytes(*values: object) -> int:
    """Bytes of all tensors, those in tuples too."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, tuple):
            total += tensor_bytes(*value)
    return total


def fast_work(
    x: Tensor, operators: Sequence, grid: torch.Size, outputs: int, samples: Tensor | None
) -> dict[str, float]:
    """FLOP of the products, and bytes of the matrices that stages of a fast convolution read and write."""
    batch = x.shape[0] if samples is None else samples.numel()
    t, h, w = grid
    tile_t, tile_h, tile_w = tile_sizes(batch, t, h, w)
    spatial = (SPATIAL_TILES[tile_h] * SPATIAL_TILES[tile_w], batch * t * -(-h // tile_h) * -(-w // tile_w), 9)
    temporal = (TEMPORAL_TILES[tile_t], batch * -(-t // tile_t) * h * w, 3)
    work: dict[str, float] = defaultdict(float)
    for operator, (count, rows, taps) in zip(operators, (spatial, temporal), strict=True):
        if operator is not None:
            filters = operator.k_channels * outputs
            work["flop"] += 2 * count * rows * filters
            work["features"] += 4 * operator.k_channels * (batch * t * h * w + count * rows)
            work["filters"] += filters * (taps * operator.weight.element_size() + count * 4)
            work["outputs"] += 4 * count * rows * outputs
    return work


class Clock:
    """Seconds, operations and bytes by stage, summed over the rounds of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flop: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, stage: str, call: Callable, *args, **kwargs):
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[stage] += time.perf_counter() - start
        self.calls[stage] += 1
        return result

    def convolution(self, name: str, call: Callable) -> Callable:
        def run(a: Tensor, b: Tensor, kernel: tuple[int, int, int]) -> Tensor:
            stage = f"{name.replace('_', ' ')} {'x'.join(map(str, kernel))}"
            if name == "weight_gradient":
                self.flop[stage] += 2 * a.numel() * b.shape[1] * kernel[0] * kernel[1] * kernel[2]
            else:
                self.flop[stage] += 2 * a[..., 0].numel() * b.numel()
            return self.timed(stage, call, a, b, kernel)

        return run

    def memory_pass(self, name: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            result = self.timed(name, call, *args, **kwargs)
            if name == "gather_panel":  # reads what it writes, not all of its source
                self.bytes[name] += 2 * tensor_bytes(result)
            else:
                self.bytes[name] += tensor_bytes(result, *args, *kwargs.values())
            return result

        return run

    def fast(self, name: str, call: Callable, backend: backends.Backend) -> Callable:
        def run(x: Tensor, *args, **kwargs) -> None:
            seconds = torch.zeros(4, dtype=torch.float64)
            backend.stage_seconds = seconds
            start = time.perf_counter()
            call(x, *args, **kwargs)
            whole = time.perf_counter() - start
            backend.stage_seconds = None
            forward = name == "winograd"
            if forward:
                *operators, epilogue = args[:3]
                dense, samples = epilogue.out, args[3] if len(args) > 3 else None
            else:
                dense, samples, *operators = args[:4]
            work = fast_work(x, operators, dense.shape[2:], dense.shape[1], samples)
            stages = [f"{'fast convolution' if forward else 'weight gradient'}: {stage}" for stage in FAST[name]]
            passes = [work["features"], work["filters"], 0, work["outputs"] + tensor_bytes(dense)]
            if not forward:
                passes = [work["features"], work["outputs"] + tensor_bytes(dense), 0, work["filters"]]
            self.flop[stages[2]] += work["flop"]
            for stage, spent, moved in zip(stages, seconds.tolist(), passes, strict=True):
                self.seconds[stage] += spent
                self.bytes[stage] += moved
                self.calls[stage] += 1
            self.seconds[stages[0].split(":")[0] + ": waiting, memory"] += whole - float(seconds.sum())

        return run

    def attach(self, backend: backends.Backend) -> Callable[[], None]:
        """Starts timing; returns what ends it."""
        before = {name: getattr(convolution, name) for name in CONVOLUTIONS}
        for name, call in before.items():
            setattr(convolution, name, self.convolution(name, call))
        for name in PASSES:
            setattr(backend, name, self.memory_pass(name, getattr(backend, name)))
        if hasattr(backend, "one_call"):
            backend.one_call = False  # whole layers in one call show no stages; pieces are the same kernels
        fast = [name for name in FAST if hasattr(backend, name)]
        for name in fast:
            setattr(backend, name, self.fast(name, getattr(backend, name), backend))

        def detach() -> None:
            for name, call in before.items():
                setattr(convolution, name, call)
            for name in (*PASSES, *fast, *(("one_call",) if "one_call" in vars(backend) else ())):
                delattr(backend, name)

        return detach


def measure(mode: str, problem: Problem) -> tuple[Clock, float]:
    """A clock over :data:`ROUNDS` steps, and the seconds of all of them."""
    cpu = torch.device("cpu")
    reference = make_reference(problem, torch.float32, cpu)
    x, _ = make_features(problem.feature_shape)
    if mode == "evaluation":
        module = build("frozen", mode, problem, reference)

        def step() -> None:
            with torch.inference_mode():
                module(x)
    else:
        module = build("fused", mode, problem, reference)
        draws, grad = make_draws(problem, cpu, torch.float32), torch.randn_like(x)

        def step() -> None:
            module.zero_grad(set_to_none=True)
            training_step(module, x.detach().requires_grad_(), draws, grad)

    for _ in range(2):
        step()
    clock = Clock()
    detach = clock.attach(backends.choose("gated_conv3d", cpu, torch.float32))
    start = time.perf_counter()
    for _ in range(ROUNDS):
        step()
    total = time.perf_counter() - start
    detach()
    return clock, total


def table(clock: Clock, total: float, flops: float, copy: float) -> list[str]:
    """Markdown rows, the longest stage first, milliseconds a step."""
    rows = ["| stage | calls | ms | share | floor ms | of the floor |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for stage in sorted(clock.seconds, key=lambda s: -clock.seconds[s]):
        ms = clock.seconds[stage] / ROUNDS * 1e3
        floor = (clock.flop[stage] / flops + clock.bytes[stage] / copy) / 1e9 / ROUNDS * 1e3
        share = clock.seconds[stage] / total
        calls = clock.calls[stage] // ROUNDS
        reached = f"{floor:.1f} | {floor / ms:.0%}" if floor else " | "
        rows.append(f"| {stage} | {calls or ''} | {ms:.1f} | {share:.1%} | {reached} |")
    rest = (total - sum(clock.seconds.values())) / ROUNDS * 1e3
    rows.append(f"| everything else | | {rest:.1f} | {rest / total * ROUNDS / 1e3:.1%} | | |")
    products = sum(clock.seconds[stage] for stage in clock.seconds if clock.flop[stage])
    rows.append(f"| *all but products* | | {(total - products) / ROUNDS * 1e3:.1f} | {1 - products / total:.1%} | | |")
    rows.append(f"| **total** | | **{total / ROUNDS * 1e3:.1f}** | | | |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.stages",
        description="Time of every stage of the fused module beside its floor (CPU).",
    )
    parser.add_argument("--shape", action="append", help="tpn, swin or TxHxW (default: tpn and swin)")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    facts, rates = describe(torch.device("cpu")), matrix_rate(torch.device("cpu"), torch.float32)
    flops, copy = float(rates[rates["best"]]), copy_rate()
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value))
    print(f"matrix rate {flops:.0f} GFLOP/s ({rates['best']}), copy rate {copy:.1f} GB/s")
    for text in options.shape or NAMED_SHAPES:
        name, grid = parse_shape(text)
        problem = Problem(name, grid, batch=options.batch, channels=options.channels)
        for mode in ("evaluation", "training"):
            clock, total = measure(mode, problem)
            print(f"\n{problem.label}, {'frozen evaluation' if mode == 'evaluation' else 'FusedDSTS training step'}\n")
            print("\n".join(table(clock, total, flops, copy)))


if __name__ == "__main__":
    main()
