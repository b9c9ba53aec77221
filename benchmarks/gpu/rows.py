"""Rows of the GPU benchmark: a module's evaluation or training step, as it runs or as a CUDA graph; its kernels.

Each is compared with the oracle before it is timed, a graph by what its replay writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Bench, timed
from benchmarks.gpu.timing import captured, host_us, kernel_sum, kernel_times, peak_extra_mib, time_steps
from benchmarks.gpu.workload import TRAINING_BATCH
from benchmarks.parity import assert_parity, relative_error, training_errors
from benchmarks.variants import restore_statistics, time_limit, training_step
from dsts_kernels.reference import Draws

__all__ = ["CASES", "COMPILE_SECONDS", "ROW_NEEDS", "TRAINING_SHAPES"]

ROW_SECONDS = 0.6
ROW_NEEDS = 4.0  # seconds that a row takes with its parity check, roughly
COMPILE_SECONDS = 100
CASES = [(shape, batch) for batch in (8, 1) for shape in ("tpn", "swin")]
TRAINING_SHAPES = ("tpn", "swin")


def evaluation_rows(
    bench: Bench, variant: str, module: nn.Module, cases: Sequence[tuple[str, int]], compiled: bool = False
) -> None:
    """One row a case; every input of a case is the next samples of the pool."""
    work = bench.work

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return module(x)

    for shape, batch in cases:

        def measure(shape: str = shape, batch: int = batch) -> dict[str, Any]:
            inputs = work.inputs(shape, batch)
            wanted = work.evaluation_output(shape, batch)
            with time_limit(int(min(COMPILE_SECONDS, bench.left())) if compiled else 0):
                error = assert_parity({"output": relative_error(run(inputs[0]), wanted)}, work.dtype)
                steps = [lambda x=x: run(x) for x in inputs]
                timing = time_steps(steps, ROW_SECONDS)
            return timed(timing, error, None if compiled else peak_extra_mib(steps[0]))

        bench.row("evaluation", variant, work.problem(shape, batch), measure, ROW_NEEDS)


def graph_rows(bench: Bench, variant: str, module: nn.Module, cases: Sequence[tuple[str, int]] = CASES) -> None:
    """A module's evaluation replayed: a graph an input, for a static input that is written first would be in the
    cache."""
    work = bench.work

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return module(x)

    for shape, batch in cases:

        def measure(shape: str = shape, batch: int = batch) -> dict[str, Any]:
            inputs, graphs, outputs = work.inputs(shape, batch), [], []
            for x in inputs:
                graph, y = captured(lambda x=x: run(x), graphs[0].pool() if graphs else None)
                graphs.append(graph)
                outputs.append(y)
            for graph in graphs:
                graph.replay()
            first = relative_error(outputs[0], work.evaluation_output(shape, batch))
            last = relative_error(outputs[-1], run(inputs[-1]))
            error = assert_parity({"output": max(first, last)}, work.dtype)
            return timed(time_steps([graph.replay for graph in graphs], ROW_SECONDS), error, None)

        bench.row("evaluation", variant, work.problem(shape, batch), measure, ROW_NEEDS)


def training_row(bench: Bench, variant: str, shape: str, module: nn.Module, source: nn.Module, note: str = "") -> None:
    """A training step with every gradient, none left from the step before."""
    work = bench.work

    def measure() -> dict[str, Any]:
        draws, grad = work.draws(shape), work.output_gradient(shape)
        inputs = [x.detach().requires_grad_() for x in work.inputs(shape, TRAINING_BATCH)]
        with time_limit(int(min(COMPILE_SECONDS, bench.left())) if variant == "compiled" else 0):
            restore_statistics(module, source)
            errors = training_errors(module, inputs[0], draws, grad, work.training_oracle(shape))
            error = assert_parity(errors, work.dtype)

            def drop() -> None:
                module.zero_grad(set_to_none=True)
                for x in inputs:
                    x.grad = None

            steps = [lambda x=x: training_step(module, x, draws, grad) for x in inputs]
            drop()
            peak = None if variant == "compiled" else peak_extra_mib(steps[0])
            timing = time_steps(steps, ROW_SECONDS, before=drop)
            drop()
        return timed(timing, error, peak, note)

    bench.row("training", variant, work.problem(shape, TRAINING_BATCH), measure, 2 * ROW_NEEDS)
    work.drop(module)


def captured_training_row(
    bench: Bench, variant: str, shape: str, module: nn.Module, source: nn.Module, note: str = ""
) -> None:
    """A training step as one CUDA graph, forward and backward, with gradients of the graph's own.

    One input suffices: a step's filters and their gradients alone exceed the cache.
    """
    work = bench.work

    def capture(module: nn.Module, x: Tensor, draws: Draws, grad: Tensor) -> tuple[Any, Tensor]:
        def drop() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None

        return captured(lambda: training_step(module, x, draws, grad), before=drop)

    def measure() -> dict[str, Any]:
        draws, grad, graphs = work.draws(shape), work.output_gradient(shape), []
        x = work.inputs(shape, TRAINING_BATCH)[0].detach().requires_grad_()

        def replayed(*arguments: Any) -> Tensor:
            graph, y = capture(*arguments)
            graphs.append(graph)  # its memory is read until the comparison is over
            graph.replay()
            return y

        restore_statistics(module, source)
        errors = training_errors(module, x, draws, grad, work.training_oracle(shape), replayed)
        error = assert_parity(errors, work.dtype)
        graphs.clear()
        graph, _ = capture(module, x, draws, grad)
        return timed(time_steps([graph.replay], ROW_SECONDS), error, None, note)

    bench.row("training", variant, work.problem(shape, TRAINING_BATCH), measure, 2 * ROW_NEEDS)
    work.drop(module)


def training_cycle(bench: Bench, shape: str, module: nn.Module) -> Callable[[], object]:
    """A training step that drops the gradients of the one before and takes the next input."""
    work = bench.work
    draws, grad = work.draws(shape), work.output_gradient(shape)
    inputs = itertools.cycle([x.detach().requires_grad_() for x in work.inputs(shape, TRAINING_BATCH)])

    def step() -> None:
        module.zero_grad(set_to_none=True)
        training_step(module, next(inputs), draws, grad)

    return step


def kernel_rows(bench: Bench, name: str, step_of: Callable[[str], Callable[[], object]]) -> None:
    """Device time of every launch of a step, by the profiler, and the host's time beside it."""
    for shape in TRAINING_SHAPES:
        label = f"{name} {bench.work.problem(shape, TRAINING_BATCH).label}"
        if bench.left() < ROW_NEEDS:
            continue
        try:
            step = step_of(shape)
            for _ in range(3):
                step()
            kernels, host = kernel_times(step), host_us(step)
            bench.results["kernels"][label], bench.results["host_us"][label] = kernels, host
            print(f"{label}: kernels {kernel_sum(kernels):.0f} us, host {host:.0f} us", flush=True)
        except Exception as error:
            bench.failures.append(f"kernels of {label}: {str(error).strip()[:100]}")
    bench.save()
