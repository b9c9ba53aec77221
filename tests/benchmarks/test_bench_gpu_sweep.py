"""The GPU sweep without a GPU: its points, a run that goes on where it ended, and the rules that follow from times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import rules, sweep
from benchmarks.gpu.sweep import Group, Point, points
from dsts_kernels.backends import OPS
from dsts_kernels.backends.gpu import measured

CPU = torch.device("cpu")
FACTS = {"device": "NVIDIA X100", "torch": "9", "triton": "3", "commit": "abc", "date": "today"}
SMALL = {"tpn": (2, 3, 3), "swin": (3, 2, 2)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[Group, list[Point]]:
    """Two groups of small points, timed once."""
    monkeypatch.setattr(sweep, "NAMED_SHAPES", SMALL)
    for name, value in (("ROUND_SECONDS", 0.0), ("ROUNDS", 1), ("MORE_ROUNDS", 1), ("NEURONS", 3)):
        monkeypatch.setattr(sweep, name, value)
    groups = Group("float32", 16, 0.5), Group("float32", 16, 0.0)
    return {g: [Point(g, plane, 2, mode) for plane in SMALL for mode in sweep.MODES] for g in groups}


def test_points() -> None:
    """Every combination in half precision, some in the others, none beyond the limit; all groups in a mixed order."""
    found = points("bfloat16")
    half = {g for g in found if g.dtype == "bfloat16"}
    assert half == {Group("bfloat16", c, s) for c in (64, 128, 256, 512, 1024, 2048) for s in (0.0, 0.5, 1.0)}
    assert {g.dtype for g in found} == {"bfloat16", "float16", "float32"} and len(found) == len(half) + 6
    every = [point for group in found.values() for point in group]
    assert len(set(every)) == len(every) and {p.batch for p in every} == {1, 2, 8, 32} and len(every) > 450
    assert {p.plane for p in every} == {"tpn", "swin"} and {p.mode for p in every} == set(sweep.MODES)
    whole = {p for p in every if p.group.dtype == "bfloat16"}
    assert 0 < 18 * 24 - len(whole) < 10 and all(p.macs <= sweep.LIMIT for p in every)
    order = [g.channels for g in found]
    assert order != sorted(order) and list(points("bfloat16")) == list(found), "mixed, and the same every time"
    assert {g.dtype for g in points("float16")} == {"float16", "float32"}


def run(wanted: dict[Group, list[Point]], rows: list[dict[str, Any]], seconds: float = 600) -> tuple[int, list[int]]:
    saved: list[int] = []
    return sweep.run(wanted, rows, CPU, seconds, lambda rows: saved.append(len(rows))), saved


def test_a_run_goes_on_where_it_ended(small: dict[Group, list[Point]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point once: plain PyTorch and handwritten agree, and nothing that is there is measured again."""
    rows: list[dict[str, Any]] = []
    assert run(small, rows, 0) == (12, []) and rows == []
    first = dict(list(small.items())[:1])
    assert run(first, rows) == (0, [6])
    assert all(row["ms"] and set(row["ms"]) == {"eager", "handwritten"} for row in rows)
    before = list(rows)
    assert run(small, rows) == (0, [12])
    assert rows[:6] == before and len({sweep.key_of(row) for row in rows}) == 12
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured again"))
    assert run(small, rows) == (0, [])


def test_a_point_that_differs_is_not_timed(small: dict[Group, list[Point]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and the others run."""
    build = sweep.build

    def wrong(variant: str, *args: Any) -> torch.nn.Module:
        return torch.nn.Identity() if variant == "frozen" else build(variant, *args)

    monkeypatch.setattr(sweep, "build", wrong)
    rows: list[dict[str, Any]] = []
    run(dict(list(small.items())[:1]), rows)
    notes = [row["note"] for row in rows if not row["ms"]]
    assert len(notes) == 2 and all("AssertionError: eager and handwritten differ by" in note for note in notes)


def test_each_sample_chooses_its_neuron(small: dict[Group, list[Point]]) -> None:
    """The features say which, and half precision changes nothing."""
    group = Group("bfloat16", 64, 0.5)
    layer = sweep.reference_of(group, CPU).layers[0]
    x = sweep.features_of(Point(group, "tpn", 5, "frozen"), CPU)
    scores = torch.einsum("bcthw,noc->bn", x.float(), layer.scoring.flatten(2).float())
    assert scores.argmax(1).tolist() == [0, 1, 2, 0, 1]
    assert ((layer.gate > 0).sum(1) == 32).all()


def test_a_file_of_another_run_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of another commit, device or torch, or where asked to; what failed is tried again."""
    path = tmp_path / "sweep-x100.json"
    assert sweep.before(path, FACTS, False) == []
    rows = [{"ms": {"eager": 1.0}}, {"ms": None, "note": "failed"}]
    path.write_text(json.dumps({"facts": FACTS, "rows": rows}))
    text = path.read_text()
    assert sweep.before(path, FACTS, False) == rows[:1] and path.is_file()
    for facts, fresh, reason in ((FACTS | {"torch": "8"}, False, "torch 9, not 8"), (FACTS, True, "--fresh")):
        path.write_text(text)
        assert sweep.before(path, facts, fresh) == [] and not path.exists()
        assert (tmp_path / "sweep-x100.abc.json").read_text() == text
        assert f"begins anew ({reason})" in capsys.readouterr().out


def test_the_command(
    small: dict[Group, list[Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Writes the points and the rules, says where ours loses and what is left, and goes on."""
    target = tmp_path / "measured.json"
    target.write_text("{}")
    monkeypatch.setattr(sweep, "require_gpu", lambda: CPU)
    monkeypatch.setattr(sweep, "describe", lambda device, commit: FACTS | {"commit": commit})
    monkeypatch.setattr(sweep, "points", lambda half: small)
    monkeypatch.setattr(sweep, "measure", lambda *_: {"triton": 1.2, "eager": 0.9, "handwritten": 1.0})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    write = rules.write
    monkeypatch.setattr(rules, "write", lambda rows, name, facts: write(rows, name, facts, target))
    options = ["--out", str(tmp_path), "--commit", "abc"]
    assert sweep.main([*options, "--seconds", "0", "--rules"]) == 0
    said = capsys.readouterr().out
    assert "12 points are left: the same command goes on" in said and "no rules written" in said
    assert target.read_text() == "{}"
    assert sweep.main([*options, "--rules"]) == 0
    said = capsys.readouterr().out
    assert "12 points in " in said and "all points are there" in said
    assert "frozen: 4 points, ours / handwritten: median 1.20, largest 1.20, above 1.05: 4" in said
    assert "  1.20: training, float32, C 16, tpn, batch 2, share 0: triton 1.200 ms, eager 0.900 ms" in said
    record = json.loads((tmp_path / "sweep-x100.json").read_text())
    assert len(record["rows"]) == 12 and record["facts"]["commit"] == "abc"
    assert {rule.backend for rule in measured.read(target.read_text())["sm_90"]} == {"eager"}
    assert json.loads(target.read_text())["sm_90"]["device"] == "NVIDIA X100"
    assert sweep.main(options) == 0 and "12 points were there" in capsys.readouterr().out


def row(mode: str, channels: int, positions: int, eager: float, cuda: float = 9.0, **more: Any) -> dict[str, Any]:
    ms = {"triton": 1.0, "cuda": cuda, "eager": eager, "handwritten": 1.0}
    return {"mode": mode, "dtype": "bfloat16", "channels": channels, "positions": positions, "ms": ms} | more


def live(*args: Any, **more: Any) -> list[dict[str, Any]]:
    return [row(mode, *args, **more) for mode in ("evaluation", "training")]


def found(rows: list[dict[str, Any]]) -> list[tuple]:
    return [(r["backend"], tuple(r["channels"]), r["positions"] and tuple(r["positions"])) for r in rules.derive(rows)]


def test_rules_of_live_ops() -> None:
    """Stretches of positions where another wins in both modes; neighbours in channels with the same stretch join."""
    rows = [*live(64, 100, 0.5), *live(64, 200, 0.9), *live(64, 400, 1.2), *live(64, 800, 3.0, 0.5)]
    rows += [*live(128, 100, 0.5), *live(128, 200, 0.7), *live(128, 400, 1.0), *live(128, 800, 3.0, 0.5)]
    rows += [*live(256, 100, 0.97), *live(256, 200, 0.5)]
    far = rules.FARTHEST
    assert found(rows) == [
        ("eager", (1, 127), (1, 200)),
        ("cuda", (1, 127), (800, far)),
        ("eager", (128, 128), (1, 200)),
        ("cuda", (128, 128), (800, far)),
        ("eager", (256, 256), (200, far)),
    ]
    assert all(set(rule["ops"]) <= set(OPS) for rule in rules.derive(rows))


def test_one_bad_point_is_enough_against_a_rule() -> None:
    """Another share, another dtype of the kind, another mode; a mode that is missing; a point that failed is none."""
    good = live(64, 100, 0.5)
    assert found(good) == [("eager", (1, 64), (1, rules.FARTHEST))]
    for bad in (
        row("training", 64, 100, 0.96, share=1.0),
        row("evaluation", 64, 100, 1.5) | {"dtype": "float16"},
    ):
        assert found([*good, bad]) == []
    assert found(good[:1]) == [] and found([*good, row("training", 64, 100, 0.9) | {"ms": None}]) != []
    assert found([*good, row("training", 64, 100, 1.5) | {"dtype": "float32"}]) != [], "another kind"


def test_rules_of_frozen_layers_ask_channels_alone() -> None:
    """One backend at every size that was measured, for a module is packed before sizes are known."""
    rows = [row("frozen", 64, p, 0.5) for p in (100, 800)] + [
        row("frozen", 128, 100, 0.5),
        row("frozen", 128, 800, 1.0),
    ]
    assert found(rows) == [("eager", (1, 64), None)]
    (rule,) = rules.derive(rows)
    assert rule["ops"] == ["frozen_layer"]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """Beside other chips' rules."""
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"sm_80": {"rules": []}}))
    rules.write([*live(64, 100, 0.5), row("frozen", 64, 100, 0.5)], "sm_90", FACTS, path)
    table = measured.read(path.read_text())
    assert list(table) == ["sm_80", "sm_90"] and len(table["sm_90"]) == 2
    assert table["sm_90"][0].holds((2, 64, 4, 5, 5)) and not table["sm_90"][0].holds((2, 65, 4, 5, 5))
