"""Results of a GPU benchmark that never ran, for tests of what is made of results."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import NAMED_SHAPES, Problem


def made_up(ms: dict[tuple[str, str, str, int], float | None], device: str = "Made up 1") -> dict[str, Any]:
    """Results with these milliseconds by mode, variant, shape and batch, and a matrix rate of 800 TFLOP/s."""
    rows = []
    for (mode, variant, shape, batch), value in ms.items():
        problem = Problem(shape, NAMED_SHAPES[shape], batch=batch)
        counted = {"literal_gflop": 2 * problem.literal_macs(mode) / 1e9, "peak_mib": None, "note": ""}
        rows.append({"mode": mode, "variant": variant, "shape": problem.label, "ms": value} | counted)
    machine = dict.fromkeys(("isa", "cuda", "cudnn"), "") | {"device": device, "threads": 1, "torch": "9"}
    return {
        "machine": machine | {"commit": "abc", "date": "today", "driver": "1.2", "triton": "3", "nvcc": "12.9"},
        "dtype": "bfloat16",
        "features": "none",
        "rate": {"torch.mm": 800e3, "best": "torch.mm"},
        "copy_gb_s": 3000.0,
        "rows": rows,
        "ops": [],
        "kernels": {},
        "goals": [],
        "scaling": [],
    }
