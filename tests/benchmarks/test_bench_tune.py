"""Tiles timed one by one, and the paper's row: what they make of times, without a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.gpu import tune, v100
from dsts_kernels.backends.triton import tuning
from dsts_kernels.roofline import CHIPS, SHAPES, Case, frozen_step, total
from dsts_kernels.roofline.tables import run_on
from tests.support.targets import INTERPRETED

CPU = torch.device("cpu")
PROBLEMS = [("ieee", torch.float32, (1, 3, 2), 2)]


@pytest.mark.skipif(not INTERPRETED, reason="runs kernels in Triton's interpreter: set TRITON_INTERPRET=1")
def test_every_tile_is_timed(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel with each candidate, in the interpreter; which one would run is told by the launchers' own rule."""
    monkeypatch.setattr(tune, "NEURONS", 2)
    ran = []

    def timer(call) -> float:
        ran.append(dict(tuning._forced))
        return float(len(ran))

    log = tune.tune(tuning.INTERPRETER, PROBLEMS, 8, CPU, timer, time.monotonic() + 600)
    assert [entry["problem"].split()[0] for entry in log] == list(tuning.KERNELS)
    tiles = [tile for kernel in tuning.KERNELS for tile in tuning.candidates(kernel, tuning.INTERPRETER, "ieee")]
    assert [tile for forced in ran for tile in forced.values()] == tiles
    assert all(entry["tiles"][entry["chosen"]] in tiles and len(entry["ms"]) == 2 for entry in log)


def test_a_tile_that_gives_something_else_is_an_error() -> None:
    """Before it is timed."""
    tiles = tuning.candidates("conv", "sm_90", "half")
    results = iter([torch.ones(3), torch.ones(3), torch.full((3,), 1.5)])
    timed = []
    with pytest.raises(AssertionError, match=r"conv with Tile.*: relative error 0.5 against the first"):
        tune.tile_times("conv", lambda: next(results), tiles, torch.bfloat16, lambda call: timed.append(call) or 1.0)
    assert len(timed) == 2


def test_faster_tiles_are_named() -> None:
    """Only where they are faster than the one that runs, and by enough."""
    log = [
        {"problem": "a", "chosen": 0, "ms": [1.0, 0.9], "tiles": ["first", "second"]},
        {"problem": "b", "chosen": 0, "ms": [1.0, 0.99], "tiles": ["first", "second"]},
        {"problem": "c", "chosen": 1, "ms": [1.0, 0.9], "tiles": ["first", "second"]},
    ]
    assert tune.better(log) == ["a: second takes 10% less than first"]


def test_nothing_begins_after_the_deadline() -> None:
    assert (
        tune.tune("sm_90", [("half", torch.bfloat16, (1, 2, 2), 1)], 8, CPU, lambda call: 1.0, time.monotonic()) == []
    )


def test_the_papers_row_without_a_gpu(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what it needs; the roofline's figure is marked as a prediction; the command fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert v100.PAPER_MS == 129 and v100.main([]) == 1
    first, _, paper, mark, _, predicted = capsys.readouterr().out.splitlines()
    assert "no CUDA GPU" in first and "nothing was measured" in first and "docs/v100.md" in first
    assert paper.endswith("129 ms a batch of 8") and mark.startswith("PREDICTION, NOT A MEASUREMENT")
    case = run_on(Case(*SHAPES["tpn"], batch=8), CHIPS["v100"])
    expected = total(frozen_step(case, CHIPS["v100"]), case.kind, CHIPS["v100"])
    assert "V100" in predicted and f"{expected.graph:.3f}" in predicted.split()
