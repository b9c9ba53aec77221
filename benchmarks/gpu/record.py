"""What a run of the GPU benchmark writes down: one JSON, saved after every row, and a deadline that rows keep to."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import goals
from benchmarks.gpu.timing import Timing, copy_rate, matrix_rate
from benchmarks.gpu.workload import Workload, gpu_backends
from benchmarks.report import machine
from benchmarks.shapes import Problem
from dsts_kernels.backends.cuda import native_targets

__all__ = ["LATE", "Bench", "describe", "timed"]

LATE = "not run: time"


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What :func:`benchmarks.report.machine.describe` says, and versions of the driver, of Triton and of nvcc."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    nvcc, _ = native_targets() or ("", [])
    facts = machine.describe(device) | {"driver": driver.strip(), "triton": triton, "nvcc": nvcc}
    return facts | ({"commit": commit} if commit else {})


class Bench:
    """Collects rows, keeps to its time, and saves after each."""

    def __init__(self, work: Workload, seconds: float, target: Path, facts: dict[str, Any]) -> None:
        self.work, self.target = work, target
        self.deadline = time.monotonic() + seconds
        self.failures: list[str] = []
        reasons = gpu_backends(work.device, work.dtype)
        self.backends = [name for name, reason in reasons.items() if reason is None]
        rate = matrix_rate(work.device, work.dtype)
        self.results: dict[str, Any] = {
            "machine": facts,
            "dtype": str(work.dtype).removeprefix("torch."),
            "backends": reasons,
            "features": "none",
            "rate": rate,
            "copy_gb_s": copy_rate(work.device),
            "rows": [],
            "ops": [],
            "kernels": {},
            "host_us": {},
            "goals": [],
            "scaling": [],
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        self.results["features"] = self.work.features_text
        self.results["goals"] = goals.evaluate(self.results)
        self.target.write_text(json.dumps(self.results, indent=1) + "\n")

    def row(
        self, mode: str, variant: str, problem: Problem, measure: Callable[[], dict[str, Any]], needs: float
    ) -> None:
        """One row: what ``measure`` returns, or why there is no number."""
        name = f"{mode} {problem.label} {variant}"
        try:
            measured = measure() if self.left() > needs else {"note": LATE}
        except Exception as error:
            text = str(error).strip()
            measured = {"note": "not timed: " + (text.splitlines()[0][:100] if text else type(error).__name__)}
            if variant != "compiled" or isinstance(error, AssertionError):
                self.failures.append(f"{name}: {measured['note']}")
        empty = {"ms": None, "ms_min": None, "rounds": 0, "peak_mib": None, "error": None, "note": ""}
        counted = {
            "literal_gflop": 2 * problem.literal_macs(mode) / 1e9,
            "useful_gflop": 2 * problem.useful_macs(mode) / 1e9,
        }
        row = {"mode": mode, "shape": problem.label, "variant": variant} | empty | counted | measured
        self.results["rows"].append(row)
        print(f"{name}: " + (f"{row['ms']:.3f} ms" if row["ms"] is not None else row["note"]), flush=True)
        self.save()


def timed(timing: Timing, error: float, peak: float | None, note: str = "") -> dict[str, Any]:
    numbers = {"ms": timing.median, "ms_min": timing.least, "rounds": timing.rounds}
    return numbers | {"error": error, "peak_mib": peak, "note": note}
