"""``python -m dsts_kernels bench``: parity before times, every variant in turns, one Markdown table."""

from __future__ import annotations

import argparse

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.bench import Problem, command, measure, turns
from dsts_kernels.cli import count, main, shape

SMALL = Problem(8, (2, 3, 4), layers=2, neurons=3)
VARIANTS = {
    "evaluation": ["literal", "handwritten", "fused", "frozen"],
    "training": ["literal", "handwritten", "fused"],
}


@pytest.mark.parametrize("step", turns.STEPS)
def test_every_variant_is_right_and_timed(step):
    rows = list(measure(SMALL, step, 0.0))
    assert [row.variant for row in rows] == VARIANTS[step]
    assert all(row.ms > 0 and row.rounds == 3 and row.error < 1e-5 for row in rows)
    assert rows[0].error == 0.0


@pytest.mark.parametrize("step", turns.STEPS)
def test_a_wrong_variant_is_not_timed(step, monkeypatch):
    """Wrong by a tenth, or not a number: an error that names it."""
    right = FusedDSTS.forward
    for fault in (1.1, float("nan")):
        monkeypatch.setattr(FusedDSTS, "forward", lambda self, *a, fault=fault, **k: right(self, *a, **k) * fault)
        with pytest.raises(ArithmeticError, match=f"^{step}, FusedDSTS: off by .* nothing was timed"):
            list(measure(SMALL, step, 0.0))


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    """In training the input's gradient is compared, too."""
    right = FusedDSTS.forward

    def wrong(self, x, draws=None):
        y = right(self, x, draws)
        return y.detach() + 2 * (y - y.detach())

    monkeypatch.setattr(FusedDSTS, "forward", wrong)
    with pytest.raises(ArithmeticError, match=r"^training, FusedDSTS: off by"):
        list(measure(SMALL, "training", 0.0))


def test_rounds_take_turns_without_gradients(monkeypatch):
    """Every round has each variant once, and each begins without gradients."""
    seen = []
    real = turns.timed

    def watched(one, device):
        seen.append(one)
        assert all(p.grad is None for module in modules.values() for p in module.parameters())
        return real(one, device)

    modules = {}
    made = turns.variants
    monkeypatch.setattr(turns, "variants", lambda *a: modules.update(made(*a)) or modules)
    monkeypatch.setattr(turns, "timed", watched)
    list(measure(SMALL, "training", 0.0))
    assert len(seen) == 3 * 4 and seen == seen[:3] * 4


def test_command(capsys, monkeypatch):
    """The table, what it was measured on, and a warning where others work."""
    monkeypatch.setattr(command.os, "getloadavg", lambda: (30.0, 0, 0), raising=False)
    options = "bench --quick --shape 8x2x3x4 --shape 16x2x3x4 --neurons 2 --layers 1 --batch 2 --threads 1"
    assert main(options.split()) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and "1 threads" in lines[0] and "float32" in lines[0]
    assert [cell.strip() for cell in lines[2].strip("| ").split("|")] == list(command.COLUMNS)
    rows = [[cell.strip(" *") for cell in line.strip("| ").split("|")] for line in lines[4:] if line.startswith("|")]
    titles = [turns.TITLES[name] for step in turns.STEPS for name in VARIANTS[step]]
    assert [row[2] for row in rows] == titles * 2
    assert {row[1] for row in rows} == {"2x8x2x3x4", "2x16x2x3x4"}
    first, second = rows[:2]
    assert first[4] == second[5] == "1.00x" and float(second[4][:-1]) == pytest.approx(
        float(first[3]) / float(second[3]), rel=0.02
    )
    assert "**The machine was busy** (load 30" in told.out and "weights of a module: 0.0 GiB" in told.err


def test_defaults(capsys):
    """Both shapes of the paper, or with ``--quick`` the smaller; a device that is not there is one line."""
    for quick, shapes in ((True, 1), (False, 2)):
        given = main_options(quick)
        found = command.problems(given)
        assert len(found) == shapes and all(p.neurons == 10 and p.channels == 1024 for p in found)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "meta"])
    assert stop.value.code == 2 and "device: got 'meta', wanted a device of this machine" in capsys.readouterr().err


def main_options(quick: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser, shape, count)
    return parser.parse_args(["--quick"] if quick else [])
