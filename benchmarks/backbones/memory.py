"""Peak memory of one step of a backbone, in a fresh process: :mod:`benchmarks.cpu.memory`, for whole models.

The number is what a step adds to weights and clips. DSTS has weights of zeros that take no memory until they are
written; evaluation is measured with two neurons, as the others' weights would lie there unread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks import ROOT
from benchmarks.backbones.models import (
    CLASSES,
    VARIANTS,
    Case,
    dsts_in,
    evaluation,
    give_draws,
    make_backbone,
    training,
    variant_of,
)
from benchmarks.cpu.memory import resident_peak_kib
from benchmarks.variants import make_draws, make_reference

__all__ = ["measure_here", "peak_extra_mib"]

TINY = {"frames": 8, "size": 64}  # clips that bring threads and code into memory; BatchNorm of TPN wants so much
TIMEOUT_S = 600


def measure_here(variant: str, mode: str, case: Case) -> dict[str, float | str]:
    """The measurement itself, in this process; returns ``{"peak_mib", "method"}``."""
    if mode == "evaluation":
        case = dataclasses.replace(case, neurons=min(2, case.neurons))
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    reference = make_reference(case.problem(), dtype, device, lazy=True)
    model = variant_of(make_backbone(case), variant, mode, case, reference)
    if mode == "training" and variant != "backbone":
        give_draws(dsts_in(model, case), [make_draws(case.problem(), device, dtype)])
    targets = torch.arange(case.batch, device=device) % CLASSES

    def step_on(case: Case) -> Callable[[], object]:
        clips = case.placed(torch.ones(case.clip_shape))
        if mode == "evaluation":
            return lambda: evaluation(model, clips)
        return lambda: training(model, clips, targets)

    step_on(dataclasses.replace(case, **TINY))()
    model.zero_grad(set_to_none=True)
    step = step_on(case)
    if device.type == "cuda":
        from benchmarks.gpu.timing import peak_extra_mib as on_gpu

        return {"peak_mib": on_gpu(step), "method": "torch.cuda.max_memory_allocated"}
    extra, method = resident_peak_kib(step)
    return {"peak_mib": extra / 2**10, "method": method}


def peak_extra_mib(variant: str, mode: str, case: Case, threads: int) -> float:
    """Runs :func:`measure_here` in a fresh process.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    request = json.dumps({"variant": variant, "mode": mode, "case": str(case), "threads": threads})
    command = [sys.executable, "-m", "benchmarks.backbones.memory", request]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"memory of {variant} {mode}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backbones.memory", description="Peak extra memory of a backbone's step, as JSON."
    )
    parser.add_argument("request", type=json.loads, help="variant, mode, case, threads as JSON")
    request = parser.parse_args().request
    if request["variant"] not in VARIANTS.get(request["mode"], ()):
        parser.error(f"request: cannot measure {request['variant']!r} in mode {request['mode']!r}")
    torch.set_num_threads(request["threads"])
    print(json.dumps(measure_here(request["variant"], request["mode"], Case.read(request["case"]))))


if __name__ == "__main__":
    main()
