"""The CUDA part of the native module that was installed, on any machine."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from dsts_kernels.backends import cpu

BINDINGS = Path(__file__).parents[3] / "csrc/cuda/bindings.cpp"


def functions(module: ModuleType) -> set[str]:
    """Those a native module has."""
    return {name for name, value in vars(module).items() if inspect.isroutine(value)}


def test_there_where_the_build_says_so():
    """``_C.cuda`` with every function of the sources where a toolkit built it, and else none."""
    if cpu._C is None:
        pytest.skip("the native module is not built")
    built = cpu._C.build_info()["cuda"] is not None
    assert hasattr(cpu._C, "cuda") == built
    if built:
        assert functions(cpu._C.cuda) == set(re.findall(r'm\.def\("(\w+)"', BINDINGS.read_text()))
