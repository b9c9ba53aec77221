"""Host time by a stand-in for the driver: what it refuses and says, and one short run of it."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.compiled import host_time
from tests.support.targets import INTERPRETED, require_triton


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backward"], "steps: got 'backward', wanted one of frozen, evaluation, training"),
        (["--base", "/"], "--base: got '/', wanted a checkout of the project"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        host_time.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_report():
    """Of one tree its time, of two the ratios."""
    assert host_time.report("frozen", [7], [[30.0, 20.0]]) == "frozen: 20 us, 7 launches"
    text = host_time.report("frozen", [7, 5], [[40.0, 50.0], [20.0, 20.0]])
    assert text == (
        "frozen: 20 us, 5 launches; before 40 us, 7 launches; ratio 0.50, by the turn 0.40 to 0.50, median 0.45"
    )


@pytest.mark.slow
def test_a_run(capsys):
    """A frozen module of three layers in seven launches, two a layer and one before them."""
    require_triton()
    if INTERPRETED or shutil.which("cc") is None:
        pytest.skip("wants Triton's compiler and a C compiler")
    host_time.main(["frozen", "--rounds", "1"])
    assert ", 7 launches" in capsys.readouterr().out
