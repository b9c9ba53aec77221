"""Which backend was faster, and the paper's row: what they make of times, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import faster, v100
from dsts_kernels.backends import OPS
from dsts_kernels.backends.gpu import measured
from dsts_kernels.roofline import CHIPS, SHAPES, Case, frozen_step, total
from dsts_kernels.roofline.tables import run_on


def test_winners() -> None:
    """Every shape alike, by the geometric mean: twice as fast outweighs a slower half by less."""
    times = [("tap_sums", "half", 1.0, 2.0), ("tap_sums", "half", 1.0, 0.4), ("gated_conv3d", "float", 3.0, 3.0)]
    log = [{"op": op, "kind": kind, "shape": "", "ms": {"triton": t, "cuda": c}} for op, kind, t, c in times]
    assert faster.winners(log) == {"tap_sums half": "cuda", "gated_conv3d float": "triton"}
    assert faster.winners([]) == {}


def test_winners_are_what_backends_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is written is the one looked up, by op, kind and chip."""
    log = [
        {"op": op, "kind": kind, "shape": "", "ms": {"triton": 2.0, "cuda": 1.0 if op == "tap_sums" else 3.0}}
        for op in OPS
        for kind in faster.KINDS
    ]
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    monkeypatch.setattr(faster, "compare", lambda *_: log)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(faster.machine, "describe", lambda device: {"device": "Made up", "torch": "9", "commit": "abc"})
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(measured, "capability", lambda device: (9, 0))
    monkeypatch.setattr(measured, "faster", measured.faster.__wrapped__)
    path = faster.write(tmp_path, torch.device("cuda"))
    assert path.name == "sm_90.json"
    record = json.loads(path.read_text())
    assert [record[key] for key in ("device", "torch", "triton", "commit")] == ["Made up", "9", "3", "abc"]
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            wanted = "cuda" if op == "tap_sums" else "triton"
            assert measured.winner(op, torch.device("cuda"), dtype) == wanted


def test_the_papers_row_without_a_gpu(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what it needs; the roofline's figure is marked as a prediction; the command fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert v100.PAPER_MS == 129 and v100.main([]) == 1
    first, _, paper, mark, _, predicted = capsys.readouterr().out.splitlines()
    assert "no CUDA GPU" in first and "nothing was measured" in first and "docs/gpu.md" in first
    assert paper.endswith("129 ms a batch of 8") and mark.startswith("PREDICTION, NOT A MEASUREMENT")
    case = run_on(Case(*SHAPES["tpn"], batch=8), CHIPS["v100"])
    expected = total(frozen_step(case, CHIPS["v100"]), case.kind, CHIPS["v100"])
    assert "V100" in predicted and f"{expected.graph:.3f}" in predicted.split()
