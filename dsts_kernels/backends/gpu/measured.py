"""Which of the GPU backends was measured faster, by op: what ``python -m benchmarks.gpu.tune`` wrote on such a chip.

``backends/measured/sm_90.json`` holds ``{"faster": {"tap_sums half": "cuda", ...}}``, by op and kind (half or float).
Where nothing was measured the order of :data:`dsts_kernels.backends.BACKENDS` decides.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from .dtypes import DTYPES

FOLDER = Path(__file__).parents[1] / "measured"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def faster(architecture: str) -> dict[str, str]:
    """The faster backend by ``"<op> <kind>"``; empty where nothing was measured."""
    path = FOLDER / f"{architecture}.json"
    return json.loads(path.read_text(encoding="utf-8"))["faster"] if path.exists() else {}


def winner(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The name of the backend that was measured faster for ``op`` on a device like this."""
    if device.type != "cuda":
        return None
    major, minor = capability(device)
    return faster(f"sm_{major}{minor}").get(f"{op} {DTYPES[dtype].kind}")
