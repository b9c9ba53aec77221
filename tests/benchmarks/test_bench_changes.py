"""Old beside new: which cases there are, what is compared, and that they run without a GPU, at toy sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import changes
from benchmarks.gpu.changes import MODES, WHERE, Case, Side, Where, cases, line, measure, run
from benchmarks.gpu.workload import Workload
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu.switches import Switches, current

CPU = torch.device("cpu")
CHANGE = "plain_where_faster"
EAGER = [Case(CHANGE, mode, "tpn") for mode in MODES]


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(CPU, l2_bytes=1000, channels=8, grids={"tpn": (2, 3, 3)}, dtype=torch.float32)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is one call."""
    monkeypatch.setattr("benchmarks.op.ROUND_SECONDS", 0.0)


def test_every_switch_has_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four modes and both shapes unless it is said where a change may matter; the second shape comes last."""
    names = [field.name for field in dataclasses.fields(Switches)]
    assert set(WHERE) <= set(names), "a place for a switch that does not exist"
    assert {case.change for case in cases()} == set(names)
    for where in WHERE.values():
        assert set(where.modes) <= set(MODES) and where.shapes
    monkeypatch.delitem(WHERE, CHANGE)
    found = cases([CHANGE])
    assert [case.shape for case in found] == ["tpn"] * 4 + ["swin"] * 4 and len(set(found)) == 8
    monkeypatch.setitem(WHERE, CHANGE, Where(("frozen",), ("small",)))
    assert cases([CHANGE]) == [Case(CHANGE, "frozen", "small")]


def test_what_is_off_by_default_comes_last() -> None:
    """A fault of a kernel that no GPU ran would end the process, and with it whatever follows."""
    on = [getattr(Switches(), case.change) for case in cases()]
    assert True in on and False in on and on == sorted(on, reverse=True)


def test_all_cases_fit_into_eight_minutes() -> None:
    """Where they do not, changes.WHERE has to say in which modes a change may matter."""
    assert len(cases()) * changes.CASE_NEEDS <= changes.SECONDS < 480


def test_every_mode_runs(work: Workload, quick: None) -> None:
    """On plain PyTorch: results agree, ratios have intervals, graphs wait for a GPU, the switch is put back."""
    before = current()
    found = dict(run(EAGER, lambda shape: work, "eager", 600))
    assert current() is before and list(found) == EAGER
    for case, row in found.items():
        if case.mode.endswith("graph"):
            assert row["note"].startswith("not run: no CUDA graph"), row
            continue
        assert row["error"] == 0 and row["rounds"] == 1 and row["old_ms"] > 0, row
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert f"{case}: old " in line(case, row) and "95%: " in line(case, row)


def test_each_side_runs_under_its_switch(work: Workload, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is built, compared and timed."""
    seen: dict[bool, list[str]] = {False: [], True: []}

    class Spy(Side):
        def step_on(self, x):
            step = super().step_on(x)
            seen[current().plain_where_faster].append("built")

            def spied():
                assert current().plain_where_faster is self.changes[CHANGE]
                seen[current().plain_where_faster].append("run")
                return step()

            return spied

    monkeypatch.setattr(changes, "Side", Spy)
    measure(Case(CHANGE, "evaluation", "tpn"), work, "eager", 1)
    for ways in seen.values():
        assert ways.count("built") == len(work.inputs("tpn", 8)) and ways.count("run") > 3


def test_a_switch_of_the_choice_is_timed_where_it_is_asked(work: Workload) -> None:
    """A module that names its backend asks nobody, so both sides would be the same."""
    for change, backend in ((CHANGE, None), ("keep_lists", "eager")):
        side = Side(work, "eager", "evaluation", "tpn", {change: True})
        assert {layer.backend for layer in side.module.layers} == {backend}


def test_sides_that_differ_are_not_timed(work: Workload, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that gives something else is a failure with its reason, and the next case runs."""
    results = Side.results

    def wrong(side: Side) -> list[torch.Tensor]:
        return [t + side.changes[CHANGE] for t in results(side)]

    monkeypatch.setattr(Side, "results", wrong)
    found = list(run(EAGER[:2], lambda shape: work, "eager", 600))
    assert all(row["failed"] and "FAILED: AssertionError: the output differs by" in row["note"] for _, row in found)


def test_late_cases_are_listed(work: Workload) -> None:
    found = list(run(EAGER, lambda shape: work, "eager", 0))
    assert [row for _, row in found] == [{"note": "not run: time"}] * len(EAGER)


def test_the_command_writes_after_every_case(
    work: Workload, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Device, switch, both times; a failure is the exit code."""
    monkeypatch.setattr(changes, "require_gpu", lambda: CPU)
    monkeypatch.setattr(changes, "describe", lambda device, commit: {"device": "NVIDIA X100", "commit": commit})
    monkeypatch.setattr(changes, "workloads", lambda device, toy: lambda shape: work)
    monkeypatch.setitem(changes.BACKENDS, "triton", SimpleNamespace(why_not=lambda *_: None))
    monkeypatch.setitem(WHERE, CHANGE, Where(("evaluation",), ("tpn",)))
    measured = {"old_ms": 2.0, "new_ms": 1.0, "ratio": 0.5, "interval": (0.4, 0.6), "rounds": 6, "error": 0.0}
    measured |= {"kernels_us": [1900.0, 900.0], "host_us": [500.0, 400.0]}
    monkeypatch.setattr(changes, "measure", lambda *_: measured)
    assert changes.main(["--out", str(tmp_path), "--commit", "abc", "--change", CHANGE]) == 0
    said = capsys.readouterr().out
    assert "old 2.000 ms, new 1.000, new / old 0.500 (95%: 0.400 to 0.600, 6 rounds)" in said
    assert "kernels 1900 -> 900 us, host 500 -> 400 us" in said
    (row,) = json.loads((tmp_path / "changes-x100.json").read_text())["rows"]
    assert row["change"] == CHANGE and row["ratio"] == 0.5

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(changes, "measure", fail)
    assert changes.main(["--out", str(tmp_path), "--commit", "abc", "--change", CHANGE]) == 1
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = BACKENDS["triton"].why_not("gated_conv3d", CPU, torch.float32)
    with pytest.raises(SystemExit, match="triton cannot run on cpu: "):
        changes.main(["--dry-run"])
    assert reason
