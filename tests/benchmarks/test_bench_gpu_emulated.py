"""The GPU benchmark's workloads with the CUDA backend emulated: every row, op and comparison runs, none is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_gpu import CPU, made_up

from benchmarks import faster, gpu_bench, gpu_ops, gpu_sanitize, report
from benchmarks.gpu_timing import Timing
from benchmarks.gpu_workload import Workload
from benchmarks.shapes import Problem
from dsts_kernels.backends import BACKENDS, OPS

pytestmark = pytest.mark.emulated


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs once and takes a millisecond."""

    def time_steps(steps, seconds, before=lambda: None):
        for each in steps:
            before()
            each()
        return Timing(1.0, 1.0, len(steps))

    def device_events(step, repeats=1):
        step()
        return [("kernel", 5.0)] * repeats

    for name, found in (
        ("time_steps", time_steps),
        ("copy_rate", lambda device: 100.0),
        ("matrix_rate", lambda device, dtype: {"mm": 1000.0, "best": "mm"}),
        ("peak_extra_mib", lambda each: each() is None or 1.0),
        ("captured", lambda module, x, pool=None: (Replayed(module, x), module(x))),
        ("kernel_times", lambda step: [{"name": "route_and_pack_kernel", "calls": step() is not None, "us": 3.0}]),
    ):
        monkeypatch.setattr(gpu_bench, name, found)
    monkeypatch.setattr(gpu_ops, "device_events", device_events)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


class Replayed:
    """What stands for a captured graph on a CPU."""

    def __init__(self, module: torch.nn.Module, x: torch.Tensor) -> None:
        self.replay = lambda: module(x)

    def pool(self) -> None:
        return None


GRIDS = {"tpn": (2, 3, 3), "swin": (3, 2, 2)}


@pytest.fixture(params=[700, 800], ids=["sm_70", "sm_80"])
def emulated_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CUDA backend on CPU tensors, as on either architecture."""
    from tests.backends.gpu.emulation import EmulatedBackend
    from tests.emulator import build

    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    backend = EmulatedBackend()
    backend.emulate(request.param, monkeypatch)
    return backend.name


def test_rows_of_the_cuda_backend(emulated_cuda: str, no_clock: None, request: Any, tmp_path: Path) -> None:
    """Every row of ours passes its parity check, every op moves its bytes, and Triton says why it did not run."""
    dtype = torch.float16 if "sm_70" in request.node.name else torch.bfloat16
    work = Workload(CPU, l2_bytes=1000, channels=24, grids=GRIDS, dtype=dtype)
    facts = made_up({})["machine"]
    bench = gpu_bench.Bench(work, 600, tmp_path / "made-up.json", facts)
    for part in (gpu_bench.frozen_rows, gpu_bench.fused_rows, gpu_bench.op_rows, gpu_bench.baseline_rows):
        part(bench)
    # So few channels in a half type may route the literal module elsewhere: its scores are in that type.
    assert [failure for failure in bench.failures if "literal" not in failure] == []
    assert bench.backends == [emulated_cuda] and bench.results["backends"]["triton"]
    variants = {row["variant"] for row in bench.results["rows"]}
    assert variants == {"frozen cuda", "graph cuda", "fused cuda", "literal", "handwritten"}
    assert all(row["ms"] == 1.0 for row in bench.results["rows"] if row["variant"] != "literal")
    assert {op["op"] for op in bench.results["ops"]} == {"route and pack", *gpu_ops.OPS}
    assert all(op["us"] and op["bytes"] > 0 for op in bench.results["ops"])
    saved = json.loads((tmp_path / "made-up.json").read_text())
    assert any("FrozenDSTS, CUDA C++" in line for line in report.plain(saved))


def test_comparison_runs(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op in both kinds, results compared; the two names stand for one backend here."""
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS[emulated_cuda])
    half = torch.bfloat16 if BACKENDS[emulated_cuda].why_not("", CPU, torch.bfloat16) is None else torch.float16
    problems = [Problem(name, grid, batch=3, channels=24, neurons=3) for name, grid in GRIDS.items()]

    def timer(steps) -> float:
        assert all(isinstance(each()[0], torch.Tensor) for each in steps)
        return 1.0

    log = faster.compare(problems, faster.KINDS | {"half": half}, CPU, 1000, timer)
    assert [(entry["op"], entry["kind"]) for entry in log[:5]] == [(op, "half") for op in OPS]
    assert len(log) == len(OPS) * 2 * len(problems) and len(faster.winners(log)) == len(OPS) * 2


def test_sanitized_cases_run(emulated_cuda: str, capsys: pytest.CaptureFixture) -> None:
    """Each case in a dtype that the chip has; a backend that cannot run is said to."""
    ran = gpu_sanitize.run(CPU, [emulated_cuda, "triton"])
    lines = capsys.readouterr().out.splitlines()
    assert ran == len(lines[0].split(",")) and "float16, float32" in lines[0]
    assert lines[1].startswith("triton: not run: ")
