"""Peak memory of one evaluation or one training step, each in a fresh process.

The number is the peak resident set during the step less the resident set just before it. Before it: weights
(and packed weights) in place, input and draws made, one step of a tiny module of the same kind behind us
(threads and code pages are there), every gradient ``None``, freed heap returned to the system. So it counts
activations, workspace and gradients, not weights. Evaluation is measured with two neurons whatever the
table's number: the others' weights would lie there unread. Resident memory is the honest measure on a CPU: a
gradient of stacked weights may be a dense tensor whose untouched neurons are pages the system has not yet had
to provide. The peak is the kernel's own mark (``VmHWM``, reset through ``/proc/self/clear_refs``), or where
that file is not to be had the largest of frequent samples. On CUDA it is ``torch.cuda.max_memory_allocated``
less what was allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.features import random_features
from benchmarks.shapes import Problem
from benchmarks.variants import VARIANTS, build, make_draws, make_reference, training_step

__all__ = ["peak_extra_mib"]

WARM_UP = {"grid": (3, 4, 4), "channels": 16, "layers": 1, "neurons": 2}
TIMEOUT_S = 300


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def release_heap() -> None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc: freed memory that is kept makes the step look smaller, never larger


def resident_peak_kib(step: Callable[[], object]) -> tuple[int, str]:
    """Peak extra KiB of ``step`` and how it was found."""
    release_heap()
    before = status_kib("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return sampled_peak_kib(step, before), "sampled"
    step()
    return status_kib("VmHWM") - before, "VmHWM"


def sampled_peak_kib(step: Callable[[], object], before: int) -> int:
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, status_kib("VmRSS"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return peak - before


def step_of(module: torch.nn.Module, mode: str, problem: Problem, dtype: torch.dtype, device: torch.device):
    """One step as a call; what it returns holds the output and, with the module, every gradient."""
    x = random_features(problem.feature_shape).to(device, dtype)
    if mode == "evaluation":

        @torch.inference_mode()
        def evaluate() -> object:
            return module(x)

        return evaluate
    draws, grad = make_draws(problem, device, dtype), torch.ones_like(x)
    x.requires_grad_()
    return lambda: training_step(module, x, draws, grad)


def measure_here(variant: str, mode: str, problem: Problem, dtype: torch.dtype, device: torch.device) -> dict:
    """The measurement itself, in this process; returns ``{"peak_mib", "method"}``."""
    if mode == "evaluation":
        problem = dataclasses.replace(problem, neurons=min(2, problem.neurons))

    def module_for(problem: Problem) -> torch.nn.Module:
        return build(variant, mode, problem, make_reference(problem, dtype, device, lazy=True))

    module = module_for(problem)
    tiny = dataclasses.replace(problem, **WARM_UP)
    step_of(module_for(tiny), mode, tiny, dtype, device)()
    module.zero_grad(set_to_none=True)
    step = step_of(module, mode, problem, dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        extra = torch.cuda.max_memory_allocated(device) - before
        return {"peak_mib": extra / 2**20, "method": "torch.cuda.max_memory_allocated"}
    extra, method = resident_peak_kib(step)
    return {"peak_mib": extra / 2**10, "method": method}


def peak_extra_mib(
    variant: str, mode: str, problem: Problem, dtype: torch.dtype, device: torch.device, threads: int
) -> dict:
    """Runs :func:`measure_here` in a fresh process; raises ``RuntimeError`` with its last words if it
    fails."""
    request = {
        "variant": variant,
        "mode": mode,
        "problem": dataclasses.asdict(problem),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": threads,
    }
    command = [sys.executable, "-m", "benchmarks.cpu.memory", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"memory of {variant} {mode}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.memory", description="Peak extra memory of one step, as JSON."
    )
    parser.add_argument("request", type=json.loads, help="variant, mode, problem, dtype, device, threads as JSON")
    request = parser.parse_args().request
    known = VARIANTS.get(request["mode"], ())
    if request["variant"] not in known or request["variant"] == "compiled":
        parser.error(f"request: cannot measure {request['variant']!r} in mode {request['mode']!r}")
    torch.set_num_threads(request["threads"])
    problem = Problem(**{**request["problem"], "grid": tuple(request["problem"]["grid"])})
    dtype, device = getattr(torch, request["dtype"]), torch.device(request["device"])
    print(json.dumps(measure_here(request["variant"], request["mode"], problem, dtype, device)))


if __name__ == "__main__":
    main()
