"""The whole module, evaluation and training step: every variant is checked against the literal reference,
then timed.

A variant is built once and runs all shapes before the next is built (pytest groups the tests by the ``built``
fixture), so that no more than one set of packed weights is alive at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from benchmarks.conftest import Recorder, Settings, Workbench
from benchmarks.cpu import half
from benchmarks.cpu.memory import peak_extra_mib
from benchmarks.parity import assert_parity, relative_error, training_errors
from benchmarks.report.machine import synchronise
from benchmarks.shapes import Problem
from benchmarks.variants import (
    COMPILE_LIMIT_S,
    FORCED,
    VARIANTS,
    build,
    restore_statistics,
    time_limit,
    training_step,
)

ROUNDS = (3, 10)
SECONDS_A_ROW = 4.0


@dataclass
class Built:
    """A row's module, or why there is none."""

    mode: str
    variant: str
    module: nn.Module | None
    note: str = ""


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, workbench: Workbench, settings: Settings) -> Iterator[Built]:
    mode, variant = request.param
    if " " in variant and not half.is_half(settings.device, settings.dtype):
        pytest.skip("a way is forced in half types on a CPU alone")
    if variant == "compiled" and not settings.compile:
        yield Built(mode, variant, None, "not timed (--no-compile)")
        return
    yield Built(mode, variant, build(variant, mode, settings.problems[0], workbench.reference))
    torch.compiler.reset()


def each(mode: str) -> pytest.MarkDecorator:
    variants = (*VARIANTS[mode], *FORCED[mode])
    params = [(mode, variant) for variant in variants]
    ids = [variant.replace(" ", "-") for variant in variants]
    return pytest.mark.parametrize("built", params, ids=ids, indirect=True, scope="module")


def check(
    built: Built,
    problem: Problem,
    recorder: Recorder,
    settings: Settings,
    errors: Callable[[], dict[str, float]],
) -> float:
    """Parity of a row; a row without a number says why in the table, and a wrong one fails besides."""
    if built.module is None:
        recorder.add(built.mode, problem, built.variant, note=built.note)
        pytest.skip(built.note)
    try:
        with time_limit(COMPILE_LIMIT_S if built.variant == "compiled" else 0), half.block(built.variant):
            return assert_parity(errors(), settings.dtype)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        recorder.add(built.mode, problem, built.variant, note=f"not timed: {first_line}")
        if built.variant == "compiled" and not isinstance(error, AssertionError):
            pytest.skip(f"torch.compile: {first_line}")
        raise


def timed(
    built: Built,
    problem: Problem,
    benchmark: Callable,
    recorder: Recorder,
    settings: Settings,
    error: float,
    step: Callable[[], object],
    setup: Callable[[], None],
) -> None:
    """Times ``step``, which ends when the device is done; measures its memory; records the row."""

    way = built.variant.partition(" ")[2]

    def call() -> None:
        with half.block(built.variant):
            step()
        synchronise(settings.device)

    setup()
    start = time.perf_counter()
    call()  # the warm-up round
    least, most = ROUNDS
    rounds = max(least, min(most, int(SECONDS_A_ROW / (time.perf_counter() - start))))
    benchmark.pedantic(call, setup=setup, rounds=rounds)
    setup()
    peak = None
    # What is compiled would have to be compiled once more; a way that is forced is not what anybody runs.
    if settings.memory and built.variant != "compiled" and not way:
        threads = torch.get_num_threads()
        measured = peak_extra_mib(built.variant, built.mode, problem, settings.dtype, settings.device, threads)
        peak = measured["peak_mib"]
    measured = {"peak_mib": peak, "error": error, "rounds": rounds, "note": "timing disabled"}
    if benchmark.stats:
        stats = benchmark.stats.stats
        measured |= {"ms": stats.median * 1e3, "ms_min": stats.min * 1e3, "note": ""}
    recorder.add(built.mode, problem, built.variant, **measured)


@each("evaluation")
def test_evaluation(
    built: Built,
    problem: Problem,
    workbench: Workbench,
    settings: Settings,
    recorder: Recorder,
    benchmark: Callable,
) -> None:
    x = workbench.features(problem)

    @torch.inference_mode()
    def step() -> torch.Tensor:
        return built.module(x)

    def errors() -> dict[str, float]:
        return {"output": relative_error(step(), workbench.oracle("evaluation", problem).output)}

    error = check(built, problem, recorder, settings, errors)
    timed(built, problem, benchmark, recorder, settings, error, step, lambda: None)


@each("training")
def test_training_step(
    built: Built,
    problem: Problem,
    workbench: Workbench,
    settings: Settings,
    recorder: Recorder,
    benchmark: Callable,
) -> None:
    draws, grad = workbench.draws(problem), workbench.output_gradient(problem)
    x = workbench.features(problem).detach().requires_grad_()
    oracle = workbench.oracle("training", problem)

    def errors() -> dict[str, float]:
        restore_statistics(built.module, workbench.reference)
        return training_errors(built.module, x, draws, grad, oracle)

    def drop_gradients() -> None:
        built.module.zero_grad(set_to_none=True)
        x.grad = None

    error = check(built, problem, recorder, settings, errors)
    timed(
        built,
        problem,
        benchmark,
        recorder,
        settings,
        error,
        lambda: training_step(built.module, x, draws, grad),
        drop_gradients,
    )
