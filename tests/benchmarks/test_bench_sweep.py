"""The sweep runs, agrees with itself, saves what it measured and draws it."""

import json
import sys

import pytest

from benchmarks.cpu import sweep


@pytest.mark.needs("matplotlib")
def test_small_sweep(tmp_path, monkeypatch, capsys):
    """Every mode at one channel count and a tiny limit: rows, a count of what was left out, JSON, a figure."""
    saved, drawn = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = ["--channels", "16", "--shares", "0.5", "--limit", "0.0001", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments, "--save", str(saved), "--figure", str(drawn)])
    sweep.main()
    results = json.loads(saved.read_text())
    assert set(results["modes"]) == set(sweep.MODES)
    for mode, rows in results["modes"].items():
        assert rows and all(row["ours"] > 0 and row["handwritten"] > 0 for row in rows)
        assert all(("direct" in row) == (mode == "frozen") for row in rows)
    assert drawn.stat().st_size > 10_000
    assert "beyond the limit" in capsys.readouterr().out
