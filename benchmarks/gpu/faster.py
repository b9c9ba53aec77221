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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import rotation_count, time_steps
from benchmarks.parity import relative_error
from benchmarks.report import machine
from benchmarks.shapes import NAMED_SHAPES, Problem
from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS, OPS, Backend
from dsts_kernels.testing import TOLERANCES

__all__ = ["KINDS", "compare", "winners", "write"]

KINDS = {"half": torch.bfloat16, "float": torch.float32}
PAIR = ("triton", "cuda")
BATCHES = (8, 1)
SECONDS = 0.2
FACTOR = 5  # on the tolerance of a dtype: two results, each with an error of its own

Step = Callable[[], Sequence[Tensor]]
Timer = Callable[[Sequence[Step]], float]


class Operands:
    """What every op takes at one shape: inputs that take turns, hard and soft gates, lively weights."""

    def __init__(self, p: Problem, dtype: torch.dtype, device: torch.device, l2_bytes: int) -> None:
        self.p, self.dtype, self.device = p, dtype, device
        elements = torch.Size(p.feature_shape).numel()
        self.xs = [self.features() for _ in range(rotation_count(elements * dtype.itemsize, l2_bytes))]
        self.grad = self.features()
        self.neuron = torch.arange(p.batch, device=device) % p.neurons
        self.hard = torch.arange(p.batch, device=device) % 2 == 0
        self.logits, self.noise, self.gate_grad = (
            self.randn(rows, p.channels) for rows in (p.neurons, p.batch, p.batch)
        )
        soft = torch.sigmoid(self.randn(p.batch, p.channels))
        self.gate = torch.where(self.hard[:, None], (soft > 0.5).to(dtype), soft)
        n, c, scale = p.neurons, p.channels, (6 * p.channels) ** -0.5
        self.spatial = self.randn(n, c, c, 1, 3, 3) * scale
        self.temporal = self.randn(n, c, c, 3, 1, 1) * scale
        self.mixing = self.randn(n, c, c, 1, 1, 1) * scale

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device).to(self.dtype)

    def features(self) -> Tensor:
        b, c, *grid = self.p.feature_shape
        return self.randn(b, *grid, c).permute(0, 4, 1, 2, 3)

    @cached_property
    def frozen(self) -> torch.nn.Module:
        """One frozen layer with half the channels spatial; both backends read the same packing."""
        options = {"num_layers": 1, "num_neurons": self.p.neurons, "dtype": self.dtype, "device": self.device}
        module = FusedDSTS(self.p.channels, **options).eval()
        with torch.no_grad():
            module.layers[0].gate.normal_()
        return module.freeze(backend=PAIR[0]).layers[0]

    def steps(self, op: str, run: Backend) -> list[Step]:
        """One step an input."""
        if op == "semhash_gate":
            args = self.logits, self.neuron, self.noise
            backward = self.gate_grad, *args
            return [lambda: (run.semhash_gate(*args, self.hard), run.semhash_gate_backward(*backward))]
        return [lambda x=x: self.step(op, run, x) for x in self.xs]

    def step(self, op: str, run: Backend, x: Tensor) -> Sequence[Tensor]:
        if op == "tap_sums":
            return (run.tap_sums(x, 1),)
        if op == "gated_conv3d":
            args = x, self.gate, self.neuron, self.spatial, self.temporal
            return (run.gated_conv3d(*args), *run.gated_conv3d_backward(self.grad, *args, [True] * 4))
        if op == "mixing_conv3d":
            args = x, self.neuron, self.mixing
            return (run.mixing_conv3d(*args), *run.mixing_conv3d_backward(self.grad, *args, [True] * 2))
        layer = self.frozen
        return run.frozen_layer(x, None, None, layer.weights(), layer.options(1))[:1]


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
            operands = Operands(p, dtype, device, l2_bytes)
            for op in OPS:
                steps = {name: operands.steps(op, BACKENDS[name]) for name in PAIR}
                results = [steps[name][0]() for name in PAIR]
                for mine, theirs in zip(*results, strict=True):
                    error = relative_error(mine.float(), theirs.float())
                    if not error <= FACTOR * TOLERANCES[dtype]:
                        raise AssertionError(f"{op} {kind} {p.label}: the backends differ by {error:.3g}")
                del results
                ms = {name: round(timer(steps[name]), 5) for name in PAIR}
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
