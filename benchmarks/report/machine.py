"""The machine beside the numbers: its name, its versions, how fast it multiplies matrices and copies memory.

The matrix rate is the yardstick for the kernels' own efficiency, so it is the best that torch offers on this machine
and in this run: a large ``torch.mm`` or a large 1x1 convolution, whichever is faster. On CPUs where the BLAS
library does not use the widest vector instructions, oneDNN's convolution can be more than twice as fast.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

__all__ = ["copy_rate", "describe", "matrix_rate", "synchronise"]

MATRIX = 2048
RATE_ROUNDS = 7
RATE_SECONDS = 5.0  # after which no further round begins: a half type that nothing multiplies takes long
COPY_BYTES = 64 << 20


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; a CPU is never ahead of its caller."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    synchronise(device)
    seconds = []
    for _ in range(RATE_ROUNDS):
        start = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > RATE_SECONDS:
            break
    return min(seconds)


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """Rates in GFLOP/s of the two large products, and which is the yardstick (``"best"``)."""
    n = MATRIX
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    image = torch.randn(8, n, n // 128, 16, device=device).to(dtype)  # n positions of n channels
    image = image.contiguous(memory_format=torch.channels_last)
    kernel = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    flops = 2 * n**3
    rates = {
        f"torch.mm {n}^3": flops / best_seconds(lambda: torch.mm(a, b), device) / 1e9,
        f"1x1 convolution {n}^3": flops / best_seconds(lambda: F.conv2d(image, kernel), device) / 1e9,
    }
    best = max(rates, key=lambda name: rates[name])
    return {**rates, "best": best}


def copy_rate() -> float:
    """GB/s of a large copy on the CPU, read and written bytes counted."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), source.device) / 1e9


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def commit() -> str:
    """The checked-out commit, marked when files differ from it; ``"unknown"`` outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe(device: torch.device) -> dict[str, str | int]:
    """What a number needs beside it to mean something."""
    return {
        "device": device_name(device),
        "isa": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
