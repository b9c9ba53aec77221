"""Types: the stub of the native module says what the module has; a user's code over the public face is checked."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsts_kernels
from dsts_kernels.backends.build import _C

ROOT = Path(__file__).resolve().parents[1]
STUB = ast.parse(Path(dsts_kernels.__file__).with_name("_C.pyi").read_text(encoding="utf-8"))


def functions(body: list[ast.stmt]) -> dict[str, list[str]]:
    """Names of functions, each with those of its arguments."""
    return {node.name: [arg.arg for arg in node.args.args] for node in body if isinstance(node, ast.FunctionDef)}


def values(body: list[ast.stmt]) -> set[str]:
    return {node.target.id for node in body if isinstance(node, ast.AnnAssign)}


def arguments(call) -> list[str]:
    """Names that pybind11 writes into a docstring; of a method, with ``self``."""
    (signature,) = re.findall(rf"^{call.__name__}\((.*)\) -> ", call.__doc__, re.MULTILINE)
    return re.findall(r"(\w+): ", signature)


def class_body(name: str) -> list[ast.stmt]:
    return next(node.body for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == name)


@pytest.mark.skipif(_C is None, reason="the native module is not built")
def test_the_stub_has_what_the_module_has():
    """Every function and class with its arguments in order, as pybind11 writes them into a docstring; every value."""
    named = [name for name in dir(_C) if not name.startswith("_")]
    calls = [name for name in named if inspect.isroutine(getattr(_C, name))]
    classes = [name for name in named if inspect.isclass(getattr(_C, name))]
    assert functions(STUB.body) == {name: arguments(getattr(_C, name)) for name in calls}
    for name in classes:
        assert functions(class_body(name))["__init__"][1:] == arguments(getattr(_C, name).__init__)[1:]
    assert values(STUB.body) | {"cuda"} == set(named) - {*calls, *classes} | {"cuda"}


@pytest.mark.skipif(_C is None or _C.build_info()["cuda"] is None, reason="built without CUDA kernels")
def test_the_stub_has_what_cuda_has():
    stated = {*functions(class_body("Cuda")), *values(class_body("Cuda"))}
    assert stated == {name for name in dir(_C.cuda) if not name.startswith("_")}
    (signature,) = re.findall(r"__init__\((.*)\) -> ", _C.cuda.Target.__init__.__doc__)
    assert functions(class_body("Target"))["__init__"] == re.findall(r"(\w+): ", signature)


@pytest.mark.skipif(_C is None, reason="the native module is not built")
@pytest.mark.parametrize("name", ["BuildInfo", "CudaInfo", "Tiles", "Units"])
def test_the_stub_has_the_keys_of_dictionaries(name):
    info = _C.build_info()
    given = {"BuildInfo": info, "CudaInfo": info["cuda"], "Tiles": _C.winograd_tiles, "Units": _C.units()}[name]
    if given is None:
        pytest.skip("built without CUDA kernels")
    assert values(class_body(name)) == set(given)


def test_public_names_have_types():
    """Every argument and result of what ``import dsts_kernels`` offers."""
    bare = []
    for name in dsts_kernels.__all__:
        offered = getattr(dsts_kernels, name)
        parts = [offered] if not inspect.ismodule(offered) else [getattr(offered, n) for n in offered.__all__]
        for part in parts:
            methods = [m for _, m in inspect.getmembers(part, inspect.isfunction)] if inspect.isclass(part) else [part]
            for call in filter(inspect.isfunction, methods):
                if not call.__module__.startswith("dsts_kernels") or call.__name__.startswith("_"):
                    continue
                hints = call.__annotations__
                wanted = {*inspect.signature(call).parameters, "return"} - {"self", "cls"}
                bare += [f"{call.__module__}.{call.__qualname__}: {missing}" for missing in wanted - set(hints)]
    assert not bare


@pytest.mark.slow
def test_mypy_refuses_what_is_wrong(tmp_path):
    """The command of ``.ci/run`` passes on ``tests/typed_use.py``, and finds each wrong line that is added to it."""
    if shutil.which("mypy", path=Path(sys.executable).parent) is None:
        pytest.skip("mypy is not installed")
    good = (ROOT / "tests/typed_use.py").read_text(encoding="utf-8")
    wrong = ['FusedDSTS("16")', "FusedDSTS(16, layers=3)", "dsts.freeze(dtype=16)", "SemHashGate(gate=2)", "x: int = y"]
    (tmp_path / "use.py").write_text(good + "".join(f"{line}\n" for line in wrong), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "use.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = {int(n) for n in re.findall(r"use\.py:(\d+): error", done.stdout)}
    first = good.count("\n") + 1
    assert lines == set(range(first, first + len(wrong))), done.stdout + done.stderr
