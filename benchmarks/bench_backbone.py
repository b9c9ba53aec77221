"""What DSTS costs a whole backbone: TPN and Video Swin-B alone, with the literal module, FusedDSTS and FrozenDSTS.

Runs with ``--backbone`` or when this file is named. Each variant is checked at the place of DSTS against the literal
module, then all take turns in one run; the overhead is the median over rounds with an interval. Evaluation, and a
training step: forward, loss and backward, without the optimizer. The ``benchmark`` line times a round, in which every
variant runs once; the table at the end tells them apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from benchmarks.backbones.memory import peak_extra_mib
from benchmarks.backbones.models import GRAPH, KINDS, VARIANTS, Case
from benchmarks.backbones.turns import CLOCKS, Turns
from benchmarks.backbones.workload import Workload
from benchmarks.conftest import Recorder, Settings

SECONDS = 60.0  # about so long do the turns of a case and mode take


def asked(config: pytest.Config) -> bool:
    """Whether somebody wants whole backbones: they take minutes."""
    return bool(config.getoption("--backbone")) or any("bench_backbone" in argument for argument in config.args)


@pytest.fixture(autouse=True, scope="module")
def wanted(pytestconfig: pytest.Config) -> None:
    if not asked(pytestconfig):
        pytest.skip("needs --backbone")


@pytest.fixture(scope="module")
def workload(case: Case, settings: Settings, recorder: Recorder, wanted: None) -> Iterator[Workload]:
    try:
        made = Workload(case, settings.clip)
    except ImportError as error:
        recorder.backbones.append({"case": case.label, "note": f"not timed: {error}"})
        pytest.skip(str(error))
    recorder.clips = made.source
    yield made


def held(model: nn.Module) -> dict[str, float]:
    """Numbers that a variant keeps, in millions, and what they take."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}.values()
    count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    return {"parameters_m": count / 1e6, "weights_mib": size / 2**20}


def rows_of(case: Case, mode: str, turns: Turns, models: dict[str, nn.Module], errors: dict[str, float]) -> list[dict]:
    """One row a variant, its memory not measured yet."""
    rows = []
    for name, seconds in turns.seconds.items():
        variant = name.removesuffix(GRAPH)
        base = "backbone" + (GRAPH if name.endswith(GRAPH) else "")
        row = {
            "case": case.label,
            "mode": mode,
            "variant": name,
            "dtype": case.dtype,
            "memory_format": case.memory_format,
            "gflop": turns.gflop[variant],
            "error": errors.get(variant),
            "peak_mib": None,
            "ms": statistics.median(turns.means(name)) * 1e3,
            "rounds": len(seconds),
            "clock": next(name for name, clock in CLOCKS.items() if clock is turns.clock),
            "share": turns.share,
            "seconds": seconds,
            "note": "",
            **held(models[variant]),
        }
        if name != base:
            overhead = turns.overhead(name, base)
            row |= {"overhead": overhead.median, "low": overhead.low, "high": overhead.high}
        rows.append(row)
    return rows


@pytest.mark.parametrize("mode", VARIANTS)
def test_cost(
    mode: str, case: Case, workload: Workload, settings: Settings, recorder: Recorder, benchmark: Callable
) -> None:
    models = workload.models(mode)

    def drop_gradients() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    turns = Turns(workload.steps(mode, models), drop_gradients, settings.device, KINDS[mode], settings.clock)
    errors = workload.warm_up(mode, models, turns)
    rounds = turns.whole(settings.rounds) if settings.rounds else turns.rounds_in(SECONDS)
    benchmark.pedantic(turns.round, rounds=rounds)
    while len(turns.seconds["backbone"]) < KINDS[mode]:  # --benchmark-disable runs one
        turns.round()
    rows = rows_of(case, mode, turns, models, errors)
    recorder.backbones += rows
    if settings.memory:
        for row in rows:
            if not row["variant"].endswith(GRAPH):
                row["peak_mib"] = peak_extra_mib(row["variant"], mode, case, torch.get_num_threads())
