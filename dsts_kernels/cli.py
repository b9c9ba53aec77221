"""``python -m dsts_kernels info``: versions, the native build, and what runs where."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import numpy
import torch

from . import __version__, backends
from .backends.cpu import build_details


def info() -> str:
    """A report for a bug tracker: every version that matters and the reason for everything that is missing."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"dsts_kernels  {__version__}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"numpy         {numpy.__version__}",
        f"GPU           {cuda}",
        *(f"{name:<13} {value}" for name, value in build_details().items()),
        "backends",
    ]
    for name, backend in backends.BACKENDS.items():
        reason = backend.missing()
        lines.append(f"  {name:<11} " + (f"can run ({backend.remark})" if reason is None else f"no: {reason}"))
    lines.append("")
    lines.append(backends.explain("gated_conv3d", "cuda" if torch.cuda.is_available() else "cpu", torch.float32))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsts_kernels", description="Fused kernels for DSTS.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, the native build, and backends with reasons")
    parser.parse_args(arguments)
    print(info())
    return 0
