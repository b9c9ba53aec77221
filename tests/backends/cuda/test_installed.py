"""The CUDA part of the native module that was installed, on any machine."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from dsts_kernels.backends.build import _C

BINDINGS = Path(__file__).parents[3] / "csrc/cuda/bindings.cpp"


def functions(module: ModuleType) -> set[str]:
    """Those a native module has."""
    return {name for name, value in vars(module).items() if inspect.isroutine(value)}


def test_there_where_the_build_says_so():
    """``_C.cuda`` with every function of the sources where a toolkit built it, and else none."""
    if _C is None:
        pytest.skip("the native module is not built")
    built = _C.build_info()["cuda"] is not None
    assert hasattr(_C, "cuda") == built
    if built:
        assert functions(_C.cuda) == set(re.findall(r'define\(m, "(\w+)"\)', BINDINGS.read_text()))
