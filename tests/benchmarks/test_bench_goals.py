"""What is made of a GPU's results: the speed goals, and the README's table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up import made_up

from benchmarks import ROOT
from benchmarks.gpu import goals, suite

ALL = {
    ("evaluation", "frozen triton", "tpn", 8): 1.0,
    ("evaluation", "literal", "tpn", 8): 12.0,
    ("evaluation", "handwritten", "tpn", 8): 2.4,
    ("evaluation", "handwritten graph", "tpn", 8): 1.2,
    ("evaluation", "graph triton", "tpn", 8): 0.9,
    ("evaluation", "graph triton", "tpn", 1): 0.18,
    ("training", "literal", "tpn", 8): 40.0,
    ("training", "fused triton", "tpn", 8): 10.0,
    ("evaluation", "frozen triton", "swin", 8): None,
    ("evaluation", "frozen cuda", "tpn", 8): 2.0,
}


def test_goals() -> None:
    """Met, missed and not measured, each with its figure."""
    results = made_up(ALL)
    results["ops"] = [
        {"op": "sums", "backend": "triton", "shape": "s", "us": 20.0, "bytes": 48_000_000},
        {"op": "pack", "backend": "triton", "shape": "s", "us": 20.0, "bytes": 30_000_000},
        {"op": "gate", "backend": "cuda", "shape": "s", "us": 9.0, "bytes": 10},
        {"op": "late", "backend": "cuda", "shape": "s", "us": None, "bytes": 10},
    ]
    found = {g["goal"]: g for g in goals.evaluate(results)}
    share = found["Triton: frozen, TPN: share of the matrix-product rate"]
    assert share["met"] is True and share["measured"] == "77.3% (1.000 ms)", "0.62 TFLOP in 1 ms of 800 TFLOP/s"
    assert [
        found[name]["met"]
        for name in (
            "Triton: literal eager / frozen, TPN",
            "Triton: best handwritten PyTorch / frozen, TPN",
            "Triton: literal eager / FusedDSTS training step, TPN",
            "Triton: frozen in a CUDA graph, batch 1 / batch 8, TPN",
        )
    ] == [True, False, True, True]
    assert found["Triton: best handwritten PyTorch / frozen, TPN"]["measured"] == "1.33", "1.2 / 0.9, graphs both"
    swin = [g for name, g in found.items() if "Swin-B" in name]
    assert len(swin) == 10 and all(g["met"] is None and g["measured"] == "not measured" for g in swin)
    ops = ("Triton: sums", "Triton: pack", "CUDA: gate", "CUDA: late")
    assert [found[f"{op}, s"]["met"] for op in ops] == [True, False, True, None]
    lines = goals.lines(list(found.values()))
    assert any(line.endswith("MISSED") for line in lines) and len(lines) == len(found)


@pytest.mark.parametrize(
    "device, dtype, ms, hopper, volta",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 2.0, True, None),  # 0.62 TFLOP in 2 ms of 800 TFLOP/s: 39%
        ("NVIDIA H200", "bfloat16", 2.5, False, None),
        ("Tesla V100-SXM2-16GB", "float16", 9.9, None, True),
        ("Tesla V100-SXM2-16GB", "float16", 10.1, None, False),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 1.0, None, None),
    ],
)
def test_cuda_goals(device: str, dtype: str, ms: float, hopper: bool | None, volta: bool | None) -> None:
    """Goals of a chip count on that chip alone; Triton's rows are not the CUDA backend's."""
    timed = {("evaluation", "frozen cuda", "tpn", 8): ms, ("evaluation", "frozen triton", "tpn", 8): 0.1}
    found = {g["goal"]: g["met"] for g in goals.evaluate(made_up(timed, device) | {"dtype": dtype})}
    assert found["CUDA: frozen, TPN: share of the matrix-product rate on an H100"] is hopper
    assert found["CUDA: frozen, Swin-B: share of the matrix-product rate on an H100"] is None
    assert found["CUDA: frozen, TPN, batch 8 in float16 on a V100"] is volta


def test_hopper_goals() -> None:
    """Milliseconds on an H100, or an H200, by shape and batch; not measured elsewhere."""
    timed = {
        ("evaluation", "graph triton", "tpn", 8): 1.0,
        ("evaluation", "frozen triton", "swin", 1): 0.4,
        ("training", "captured triton", "swin", 8): 5.0,
        ("training", "fused triton", "tpn", 8): 12.5,
    }
    found = {g["goal"]: g["met"] for g in goals.evaluate(made_up(timed, "NVIDIA H100 80GB HBM3"))}
    assert {name: met for name, met in found.items() if name.endswith("on an H100") and met is not None} == {
        "Triton: frozen in a CUDA graph, TPN, on an H100": True,
        "Triton: frozen, batch 1, Swin-B, on an H100": False,
        "Triton: training step in a CUDA graph, Swin-B, on an H100": True,
        "Triton: training step, TPN, on an H100": False,
    }
    other = {g["goal"]: g["met"] for g in goals.evaluate(made_up(timed, "NVIDIA L4"))}
    assert all(met is None for name, met in other.items() if name.endswith("on an H100"))


def test_report_of_a_gpu(tmp_path: Path) -> None:
    """The README's table is drawn from the file: graph rows, small times, driver, goals and kernels."""
    results = made_up({key: ms for key, ms in ALL.items() if ms})
    results["goals"] = goals.evaluate(results)
    results["backends"] = {"triton": None, "cuda": None, "other": "no such chip"}
    one = {"name": "conv_kernel", "calls": 3, "us": 200.0}
    results["kernels"] = {"frozen tpn": [one], "training tpn": [one | {"launches": [100.0, 400.0, 100.0]}]}
    results["host_us"] = {"training tpn": 700.0}
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(results))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for part in (
        "triton 3, nvcc 12.9, driver 1.2",
        "**FrozenDSTS, CUDA graph, Triton** | **0.180** |",
        "**FrozenDSTS, CUDA C++** | **2.000** | 6.00x | 0.60x |",
        "| best handwritten PyTorch, CUDA graph | 1.200 |",
        "other: not run, no such chip.",
        "copy rate 3000 GB/s",
        "Triton: literal eager / frozen, TPN: 12.00, wanted at least 10 (met)",
        "kernels of frozen tpn, 600 us by medians over launches of a name, not their sum: conv_kernel 3 x 200.0 us",
        "kernels of training tpn, 600 us in 3 launches, the host 700 us: conv_kernel 3 x 200.0 us",
    ):
        assert part in done.stdout
    assert suite.goal_lines(path, since=0) and not suite.goal_lines(path, since=time.time() + 60)
    assert suite.goal_lines(tmp_path / "none.json", since=0) == []
