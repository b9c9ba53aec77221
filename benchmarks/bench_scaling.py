"""What should cost next to nothing: ninety more neurons, samples in one batch, importing the package.

Runs with ``--scaling`` or when this file is named. Each benchmark adds a line under the table. The module has
256 channels on the first shape given (TPN's plane by default), in evaluation; parity with the literal
reference comes first.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.conftest import Recorder, Settings, Workbench
from benchmarks.parity import TOLERANCES, relative_error
from benchmarks.report.machine import synchronise
from benchmarks.shapes import Problem
from benchmarks.variants import build, make_reference

CHANNELS = 256
MANY_NEURONS, LARGE_BATCH = 100, 8
ROUNDS = 15
IMPORT_ROUNDS = 5


@pytest.fixture(autouse=True)
def wanted(pytestconfig: pytest.Config) -> None:
    named = any("bench_scaling" in argument for argument in pytestconfig.args)
    if not (named or pytestconfig.getoption("--scaling")):
        pytest.skip("needs --scaling")
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing but timings here")


@pytest.fixture
def small(settings: Settings) -> Problem:
    return dataclasses.replace(settings.problems[0], channels=CHANNELS, batch=1)


def evaluate(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = module(x)
    synchronise(x.device)
    return y


def checked(variant: str, problem: Problem, settings: Settings, x: Tensor) -> nn.Module:
    """A variant that agrees with the literal module of the same weights on ``x``."""
    reference = make_reference(problem, settings.dtype, settings.device)
    module = build(variant, "evaluation", problem, reference)
    wanted = evaluate(build("literal", "evaluation", problem, reference), x)
    assert relative_error(evaluate(module, x), wanted) <= TOLERANCES[settings.dtype][0]
    return module


def median_ms(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


@pytest.mark.parametrize("variant", ["fused", "frozen"])
def test_many_neurons(
    variant: str,
    small: Problem,
    settings: Settings,
    workbench: Workbench,
    recorder: Recorder,
    benchmark: Callable,
) -> None:
    x = workbench.features(small)
    few = checked(variant, small, settings, x)
    baseline = median_ms(lambda: evaluate(few, x))
    many = checked(variant, dataclasses.replace(small, neurons=MANY_NEURONS), settings, x)
    benchmark.pedantic(evaluate, args=(many, x), rounds=ROUNDS, warmup_rounds=1)
    ms = benchmark.stats.stats.median * 1e3
    few_text = f"{baseline:.1f} ms with {small.neurons}"
    text = f"{ms:.1f} ms with {MANY_NEURONS} neurons, {few_text} ({ms / baseline:.2f}x)"
    recorder.add_scaling(f"{variant}, {small.label}", text, ms=ms, baseline_ms=baseline)


@pytest.mark.parametrize("variant", ["fused", "frozen"])
def test_batch(
    variant: str,
    small: Problem,
    settings: Settings,
    workbench: Workbench,
    recorder: Recorder,
    benchmark: Callable,
) -> None:
    x = workbench.features(dataclasses.replace(small, batch=LARGE_BATCH))
    module = checked(variant, small, settings, x)
    samples = [sample[None] for sample in x]
    baseline = median_ms(lambda: [evaluate(module, sample) for sample in samples])
    benchmark.pedantic(evaluate, args=(module, x), rounds=ROUNDS, warmup_rounds=1)
    ms = benchmark.stats.stats.median * 1e3
    text = f"{ms:.1f} ms for a batch of {LARGE_BATCH}, {baseline:.1f} ms one by one ({ms / baseline:.2f}x)"
    recorder.add_scaling(f"{variant}, {small.label}", text, ms=ms, baseline_ms=baseline)


def test_import(recorder: Recorder, benchmark: Callable) -> None:
    """Time that ``import dsts_kernels`` takes once torch is imported, in fresh processes."""
    clock = "time.perf_counter()"
    code = f"import time, torch; start = {clock}; import dsts_kernels; print({clock} - start)"
    seconds = []

    def fresh_process() -> None:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))

    benchmark.pedantic(fresh_process, rounds=IMPORT_ROUNDS)
    ms = statistics.median(seconds) * 1e3
    recorder.add_scaling("import dsts_kernels", f"{ms:.0f} ms over import torch", ms=ms, baseline_ms=None)
