"""Which GPU backend runs an op faster on this chip, at the paper's shapes: a part of ``benchmarks.gpu.tune``.

Every op is timed on both, forward and backward together where it has one of its own, after their results were
compared. An op's winner is the one that the geometric mean over shapes and batches favours. The file,
``dsts_kernels/backends/measured/<architecture>.json``, is what :mod:`dsts_kernels.backends.gpu.measured` reads; every
time that decided is in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import rotation_count, time_steps
from benchmarks.parity import relative_error
from benchmarks.registry import FACTOR, Inputs
from benchmarks.registry import OPS as REGISTRY
from benchmarks.report import machine
from benchmarks.shapes import NAMED_SHAPES, Problem
from dsts_kernels.backends import OPS
from dsts_kernels.testing import TOLERANCES

__all__ = ["KINDS", "compare", "winners", "write"]

KINDS = {"half": torch.bfloat16, "float": torch.float32}
PAIR = ("triton", "cuda")
BATCHES = (8, 1)
SECONDS = 0.2

Step = Callable[[], Sequence[Tensor]]
Timer = Callable[[Sequence[Step]], float]


def steps_of(op: str, inputs: Inputs, backend: str) -> list[Step]:
    """One step for each of the features: the op, and its backward where that is an op too."""
    calls = [REGISTRY[name].run for name in (op, f"{op}_backward") if name in REGISTRY]
    return [lambda x=x: [result for call in calls for result in call(inputs, x, backend)] for x in inputs.xs]


def median_ms(steps: Sequence[Step]) -> float:
    return time_steps(steps, SECONDS).median


@torch.no_grad()
def compare(
    problems: Sequence[Problem], kinds: dict[str, torch.dtype], device: torch.device, l2_bytes: int, timer: Timer
) -> list[dict[str, Any]]:
    """``op``, ``kind``, ``shape`` and ``ms`` by backend; raises ``AssertionError`` where results differ."""
    log = []
    for kind, dtype in kinds.items():
        for p in problems:
            elements = torch.Size(p.feature_shape).numel()
            inputs = Inputs(p, dtype, device, rotation_count(elements * dtype.itemsize, l2_bytes))
            for op in OPS:
                by_backend = {name: steps_of(op, inputs, name) for name in PAIR}
                results = [by_backend[name][0]() for name in PAIR]
                for one, other in zip(*results, strict=True):
                    error = relative_error(one.float(), other.float())
                    if not error <= FACTOR * TOLERANCES[dtype]:
                        raise AssertionError(f"{op} {kind} {p.label}: the backends differ by {error:.3g}")
                del results
                ms = {name: round(timer(by_backend[name]), 5) for name in PAIR}
                log.append({"op": op, "kind": kind, "shape": p.label, "ms": ms})
                print(
                    f"{op} {kind} {p.label}: " + ", ".join(f"{name} {t:.4f} ms" for name, t in ms.items()), flush=True
                )
    return log


def winners(log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The faster backend by ``"<op> <kind>"``, every shape alike; of two alike Triton, which is the default."""
    ratios: dict[str, float] = {}
    for entry in log:
        name = f"{entry['op']} {entry['kind']}"
        ratios[name] = ratios.get(name, 0.0) + math.log(entry["ms"]["triton"] / entry["ms"]["cuda"])
    return {name: "cuda" if ratio > 0 else "triton" for name, ratio in ratios.items()}


def write(folder: Path, device: torch.device, commit: str | None = None) -> Path:
    """Measures on ``device`` and writes ``folder/sm_90.json`` or whatever its compute capability is."""
    import triton

    problems = [Problem(name, grid, batch=batch) for batch in BATCHES for name, grid in NAMED_SHAPES.items()]
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    torch.set_float32_matmul_precision("highest")
    log = compare(problems, KINDS, device, l2_bytes, median_ms)
    facts = machine.describe(device)
    record = {
        "device": facts["device"],
        "torch": facts["torch"],
        "triton": triton.__version__,
        "commit": commit or facts["commit"],
        "faster": winners(log),
        "log": log,
    }
    major, minor = torch.cuda.get_device_capability(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{major}{minor}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
