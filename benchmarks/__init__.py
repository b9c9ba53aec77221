"""Benchmarks of the DSTS module: ``pytest benchmarks/ --benchmark-only`` from the repository root.

One op is timed by ``python -m benchmarks.op``. Folders: ``cpu`` times stages, shapes and memory on a CPU, ``gpu`` holds
what needs a GPU, ``compiled`` compiles kernels and reads what came of it without one, ``report`` writes tables.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
