"""Memory of modules by channels, counted from their parameters: ``python -m benchmarks.report.memory``.

In float32 with the paper's three layers of ten neurons; nothing is allocated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dsts_kernels import FusedDSTS

__all__ = ["main", "markdown"]

CHANNELS = (64, 256, 1024)
ADAMW = 4  # weights, gradients, two moments


def markdown(channels: Sequence[int] = CHANNELS) -> str:
    """MiB of weights, and of all that a step of AdamW keeps."""
    lines = ["| | parameters, millions | weights | training with AdamW: weights, gradients, two moments |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for count in channels:
        numbers = sum(p.numel() for p in FusedDSTS(count, device="meta").parameters())
        mebibytes, millions = numbers * 4 / 2**20, numbers / 1e6
        shown = f"{millions:.{1 if millions < 100 else 0}f}"
        lines.append(f"| `FusedDSTS({count})` | {shown} | {mebibytes:.0f} | {ADAMW * mebibytes:.0f} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.report.memory", description=__doc__.splitlines()[0]).parse_args()
    print(markdown())


if __name__ == "__main__":
    main()
