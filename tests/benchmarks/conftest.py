"""Benchmarks are run from the repository and not installed: its root goes on the path for their tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
