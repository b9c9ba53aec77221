"""The table of versions is that of its results, and results are added as said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import versions

ROW = {
    "python": "3.13.5",
    "torch": "2.6.0",
    "triton": "none",
    "machine": "x86_64",
    "system": "Debian",
    "kernels": "GNU 14, avx2",
    "tests": "12 passed",
    "passed": True,
    "date": "2026-11-26",
}


def test_the_page_has_the_table_of_its_results():
    rows = json.loads(versions.RESULTS.read_text(encoding="utf-8"))
    text = versions.PAGE.read_text(encoding="utf-8")
    assert versions.page(text, rows) == text, "run python -m tests.versions --table"


def test_a_result_takes_the_place_of_an_equal_one(tmp_path):
    path = tmp_path / "results.json"
    for more in ({}, {"torch": "2.9.1"}, {"tests": "1 failed, 11 passed", "passed": False}):
        versions.save(path, ROW | more)
    rows = json.loads(path.read_text())
    assert [(row["torch"], row["passed"]) for row in rows] == [("2.9.1", True), ("2.6.0", False)]
    lines = versions.table([*rows, ROW | {"python": "3.14.0"}, ROW | {"python": "3.9.20"}]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 3.14.0", "| 3.13.5", "| 3.13.5", "| 3.9.20"]
    assert "**failed**: 1 failed, 11 passed" in lines[4]


def test_steps_of_each_kind(tmp_path):
    """A wheel, the sources, a distribution's torch: what pip is asked for, and that the last asks no index."""
    own, wheel = tmp_path / "env/bin/python", tmp_path / "dsts_kernels-1-cp313-cp313-linux_x86_64.whl"

    def asked(torch: str, file=None) -> str:
        chosen = versions.Combination("python3", torch, None, file)
        return " ; ".join(" ".join(map(str, step)) for step in versions.steps_of(chosen, own))

    assert "-e .[test] torch==2.9.1" in asked("2.9.1") and "torch==" not in asked("newest")
    assert f"dsts_kernels[test] @ {wheel.as_uri()} torch==2.9.1" in asked("2.9.1", wheel)
    system = asked("system")
    assert "venv --system-site-packages" in system and "--no-deps --no-build-isolation -e ." in system
    assert f"--no-deps --no-index {wheel}" in asked("system", wheel)


def test_packages_of_a_virtual_environment_are_lent(tmp_path):
    """A path file names them; an interpreter that is in none lends nothing, as a virtual environment sees its own."""
    packages = tmp_path / "env/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    venv = tmp_path / "lender"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    for python, lent in ((base, None), (venv / "bin/python", venv)):
        step = versions.steps_of(versions.Combination(str(python), "system", None, None), tmp_path / "env/bin/python")[
            1
        ]
        subprocess.run(step, check=True)
        found = packages / "lent.pth"
        assert found.exists() == (lent is not None)
        assert lent is None or found.read_text().split("\n") == [str(next(lent.glob("lib/python*/site-packages")))]


def test_bad_arguments(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["versions", "2.9.1", "--system"])
    with pytest.raises(SystemExit) as stop:
        versions.parse()
    assert stop.value.code == 2 and "wanted no version: it is the interpreter's own" in capsys.readouterr().err
