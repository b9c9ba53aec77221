"""The GPU benchmark's workloads with the CUDA backend emulated: every row, op and comparison runs, none is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_up import made_up

from benchmarks.gpu import bench as gpu_bench
from benchmarks.gpu import changes, ops, record, rows, sanitize, sweep, v100
from benchmarks.gpu.handwritten import GROUPINGS
from benchmarks.gpu.timing import Timing
from benchmarks.gpu.workload import Workload
from benchmarks.report import tables

CPU = torch.device("cpu")

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

    def kernel_times(step):
        step()
        return [{"name": "route_and_gather_kernel", "calls": 2, "us": 3.0, "launches": [2.0, 4.0]}]

    for module, name, found in (
        (rows, "time_steps", time_steps),
        (record, "copy_rate", lambda device: 100.0),
        (record, "matrix_rate", lambda device, dtype: {"mm": 1000.0, "best": "mm"}),
        (rows, "peak_extra_mib", lambda each: each() is None or 1.0),
        (rows, "captured", lambda step, pool=None, before=lambda: None: (Replayed(step, before), step())),
        (rows, "kernel_times", kernel_times),
        (rows, "host_us", lambda step: step() is not None or 7.0),
    ):
        monkeypatch.setattr(module, name, found)
    monkeypatch.setattr(ops, "device_events", device_events)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


class Replayed:
    """What stands for a captured graph on a CPU: a replay writes gradients anew, and does not add to them."""

    def __init__(self, step: Callable[[], object], before: Callable[[], object]) -> None:
        self.replay = lambda: (before(), step())

    def pool(self) -> None:
        return None


GRIDS = {"tpn": (2, 3, 3), "swin": (3, 2, 2)}


@pytest.fixture
def emulated_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CUDA backend on CPU tensors, as on sm_80, or on what ``on_v100`` says: workloads are not about kernels."""
    from tests.emulator import build
    from tests.support.emulation import EmulatedBackend

    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    backend = EmulatedBackend()
    backend.emulate(getattr(request, "param", 800), monkeypatch)
    return backend.name


on_v100 = pytest.mark.parametrize("emulated_cuda", [700], ids=["sm_70"], indirect=True)


def test_rows_of_the_cuda_backend(emulated_cuda: str, no_clock: None, tmp_path: Path) -> None:
    """Every row of ours passes its parity check, every op moves its bytes, and Triton says why it did not run."""
    work = Workload(CPU, l2_bytes=1000, channels=24, grids=GRIDS, dtype=torch.bfloat16)
    facts = made_up({})["machine"]
    bench = gpu_bench.Bench(work, 600, tmp_path / "made-up.json", facts)
    for part in (gpu_bench.frozen_rows, gpu_bench.fused_rows, gpu_bench.op_rows, gpu_bench.baseline_rows):
        part(bench)
    # So few channels in a half type may route the literal module elsewhere: its scores are in that type.
    assert [failure for failure in bench.failures if "literal" not in failure] == []
    assert bench.backends == [emulated_cuda] and bench.results["backends"]["triton"]
    variants = {row["variant"] for row in bench.results["rows"]}
    ours = {f"{variant} cuda" for variant in ("frozen", "graph", "fused", "captured")}
    assert variants == {*ours, "literal", "handwritten", "handwritten graph"}
    notes = {
        row["note"] for row in bench.results["rows"] if row["variant"] == "handwritten" and row["mode"] == "training"
    }
    assert notes <= set(GROUPINGS) and bench.results["host_us"].keys() == bench.results["kernels"].keys()
    assert {step.rsplit(" ", 2)[0] for step in bench.results["kernels"]} == {
        *(f"{mode} cuda" for mode in ("frozen", "evaluation", "training")),
        "training handwritten",
    }
    assert all(row["ms"] == 1.0 for row in bench.results["rows"] if row["variant"] != "literal")
    assert {op["op"] for op in bench.results["ops"]} == {"route and gather", *ops.OPS}
    assert all(op["us"] and op["bytes"] > 0 for op in bench.results["ops"])
    saved = json.loads((tmp_path / "made-up.json").read_text())
    lines = tables.plain(saved)
    assert any("FrozenDSTS, CUDA C++" in line for line in lines)
    assert any("best handwritten PyTorch, CUDA graph" in line for line in lines)
    assert any(line.startswith("kernels of training cuda") and "6 us in 2 launches, the host" in line for line in lines)


@pytest.fixture
def no_cuda_device(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks.gpu.v100 asks of torch about the device is answered for the emulated one."""
    for name, found in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_properties", SimpleNamespace(L2_cache_size=1000)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    monkeypatch.setattr(v100, "describe", lambda device, commit: made_up({}, "Emulated")["machine"])
    monkeypatch.setattr(
        v100,
        "Workload",
        lambda device, l2_bytes: Workload(CPU, l2_bytes, channels=256, grids=GRIDS, dtype=torch.float16),
    )


@on_v100
def test_the_papers_row(no_cuda_device: None, no_clock: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every variant at the paper's batch, compared and timed, beside the paper's time; the device is named."""
    out = tmp_path / "folder" / "row.json"
    assert v100.main(["--out", str(out)]) == 0
    said = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["literal", "handwritten", "fused cuda", "frozen cuda", "graph cuda"]
    assert all(row["shape"] == "tpn 8x256x2x3x3" and row["ms"] == 1.0 and 0 < row["error"] < 5e-2 for row in rows)
    table = said[said.index("Emulated, 1 threads") :].splitlines()
    assert table[2].split()[-3:] == ["129", "1.0", "-"] and "the paper, V100 (870 - 741)" in table[2]
    assert [line.split()[-3:-1] for line in table[3:8]] == [["1", "129.0"]] * 5, "129 ms / 1 ms"
    assert "triton did not run: " in said and "PREDICTION, NOT A MEASUREMENT" in said


@on_v100
def test_a_wrong_result_has_no_time(
    no_cuda_device: None, no_clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A variant that gives something else is not timed, and the command fails."""

    def build(variant: str, *options: Any) -> torch.nn.Module:
        return gpu_bench.build(variant, *options) if variant == "frozen" else torch.nn.Identity()

    monkeypatch.setattr(v100, "build", build)
    assert v100.main(["--out", str(tmp_path / "row.json")]) == 1
    said = capsys.readouterr().out
    assert "FAILED evaluation tpn 8x256x2x3x3 fused cuda: not timed: " in said
    rows = {row["variant"]: row["ms"] for row in json.loads((tmp_path / "row.json").read_text())["rows"]}
    assert rows["fused cuda"] is None and rows["frozen cuda"] == 1.0


def test_changes_run(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run: every switch off and on, wherever it may matter, with results compared."""
    monkeypatch.setattr("benchmarks.op.ROUND_SECONDS", 0.0)
    for case, found in changes.run(changes.cases(), changes.workloads(CPU, True), emulated_cuda, 3600):
        assert found.get("error", 1.0) < 1e-3 or found["note"].startswith("not run: no CUDA graph"), (case, found)


def test_sweep_runs(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point of every mode in each dtype that the chip has: this backend, plain PyTorch and handwritten agree."""
    monkeypatch.setattr(sweep, "NAMED_SHAPES", GRIDS)
    for name, value in (("ROUND_SECONDS", 0.0), ("ROUNDS", 1), ("MORE_ROUNDS", 1), ("NEURONS", 3)):
        monkeypatch.setattr(sweep, name, value)
    groups = [sweep.Group(dtype, 24, 0.5) for dtype in ("bfloat16", "float16", "float32")]
    wanted = {g: [sweep.Point(g, "tpn", 4, mode) for mode in sweep.MODES] for g in groups}
    found: list[dict[str, Any]] = []
    assert sweep.run(wanted, found, CPU, 3600, lambda rows: None) == 0
    assert [row for row in found if not row["ms"]] == []
    assert all(list(row["ms"]) == [emulated_cuda, "eager", "handwritten"] for row in found) and len(found) == 9


def test_sanitized_cases_run(emulated_cuda: str, capsys: pytest.CaptureFixture) -> None:
    """Each case in a dtype that the chip has; a backend that cannot run is said to."""
    ran = sanitize.run(CPU, [emulated_cuda, "triton"])
    lines = capsys.readouterr().out.splitlines()
    assert ran == len(lines[0].split(",")) and "float16, float32" in lines[0]
    assert lines[1].startswith("triton: not run: ")
