"""Saved results become a table and a figure, with a reason wherever there is no number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.report import tables
from benchmarks.shapes import Problem, parse_shape


@pytest.fixture
def results() -> dict[str, Any]:
    def row(mode: str, shape: str, variant: str, ms: float | None, note: str = "") -> dict[str, Any]:
        return {
            "mode": mode,
            "shape": shape,
            "variant": variant,
            "ms": ms,
            "peak_mib": 12.0,
            "literal_gflop": 100.0,
            "note": note,
        }

    rows = [
        row("training", "tpn", "fused", 250.0),
        row("evaluation", "tpn", "compiled", None, "not timed: took more than 60 s"),
        row("evaluation", "tpn", "literal", 800.0),
        row("evaluation", "tpn", "handwritten", 200.0),
        row("evaluation", "tpn", "fused", 100.0),
        row("training", "tpn", "literal", 1000.0),
    ]
    machine = dict.fromkeys(("cuda", "cudnn"), "")
    machine |= {
        "device": "A CPU",
        "isa": "AVX9",
        "threads": 2,
        "torch": "9.9",
        "commit": "abc",
        "date": "today",
    }
    rate = {"torch.mm": 200.0, "1x1 convolution": 400.0, "best": "1x1 convolution"}
    scaling = [{"name": "import", "text": "3 ms over import torch"}]
    return {
        "machine": machine,
        "dtype": "float32",
        "features": "a clip",
        "rate": rate,
        "rows": rows,
        "scaling": scaling,
    }


def test_table(results: dict[str, Any]) -> None:
    lines = tables.table(results)
    assert [line[2] for line in lines[:4]] == [
        tables.TITLES[v] for v in ("literal", "compiled", "handwritten", "fused")
    ]
    assert lines[3] == ["evaluation", "tpn", "FusedDSTS", "100.0", "8.00x", "2.00x", "1000", "250%", "12"]
    assert lines[1][3] == "not timed: took more than 60 s"
    assert lines[5][4:6] == ["4.00x", "-"], "no handwritten row to compare with"


def test_plain_and_markdown_say_what_they_measured(results: dict[str, Any]) -> None:
    for text in ("\n".join(tables.plain(results)), tables.markdown(results)):
        for part in (
            "A CPU (AVX9), 2 threads, torch 9.9",
            "400 GFLOP/s (1x1 convolution",
            "a clip",
            "import: 3 ms",
        ):
            assert part in text


def test_markdown_is_one_table(results: dict[str, Any]) -> None:
    lines = [line for line in tables.markdown(results).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(results["rows"])
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.needs("matplotlib")
def test_command_line_draws_a_figure(results: dict[str, Any], tmp_path: Path) -> None:
    source, image = tmp_path / "results.json", tmp_path / "figure.png"
    source.write_text(json.dumps(results))
    command = [sys.executable, "-m", "benchmarks.report", str(source), "--figure", str(image)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tables.markdown(results)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_literal_count_is_the_design_s() -> None:
    problem = Problem("tpn", (8, 16, 16), batch=8)
    assert problem.positions == 8 * 2048
    assert 2 * problem.literal_macs("evaluation") == pytest.approx(2.37e12, rel=0.01)
    assert 2 * problem.useful_macs("evaluation") == pytest.approx(0.62e12, rel=0.01)


@pytest.mark.parametrize("text", ["8x16", "0x7x7", "big", "8x16x16x1"])
def test_bad_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="wanted one of"):
        parse_shape(text)
