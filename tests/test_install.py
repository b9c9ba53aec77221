"""Installing with and without a working compiler: DSTS_BUILD does what it says, and says what it did."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
]


NO_NVCC = "/nonexistent/nvcc"  # what CUDACXX names is taken, and only that: .ci/run's own install is the one with CUDA


@pytest.fixture
def build_wheel(tmp_path):
    """build_wheel(DSTS_BUILD=..., CXX=...): pip on a copy of the sources; (process, wheel or None)."""
    for module in ("setuptools", "cmake", "ninja", "pybind11"):
        pytest.importorskip(module, reason="the build requirements must be installed: nothing is downloaded here")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    built = shutil.ignore_patterns("_C.*", "_build.py", "__pycache__")
    for name in ("csrc", "dsts_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=built)

    def build(**env):
        out = tmp_path / "wheels"
        shutil.rmtree(out, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            str(source),
            "--no-deps",
            "--no-build-isolation",
            "-v",
            "-w",
            str(out),
        ]
        clean = {k: v for k, v in os.environ.items() if k not in ("DSTS_BUILD", "CXX", "CXXFLAGS")}
        given = {**clean, "CUDACXX": NO_NVCC, **env}
        done = subprocess.run(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wheels = list(out.glob("*.whl"))
        return done, wheels[0] if wheels else None

    return build


def contents(wheel):
    """(BUILD, REASON, whether the native module is in it) of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        record = {}
        exec(archive.read("dsts_kernels/_build.py"), record)
        native = any(name.startswith("dsts_kernels/_C.") for name in archive.namelist())
    return record["BUILD"], record["REASON"], native


def test_none_builds_nothing(build_wheel):
    """DSTS_BUILD=none installs without the native module and records it."""
    done, wheel = build_wheel(DSTS_BUILD="none")
    assert done.returncode == 0, done.stdout
    assert contents(wheel) == ("none", "DSTS_BUILD=none", False)
    assert "installing without native kernels: DSTS_BUILD=none" in done.stdout


def test_unknown_choice_is_refused(build_wheel):
    """Any other value fails: variable, what came, what is wanted."""
    done, wheel = build_wheel(DSTS_BUILD="bogus")
    assert done.returncode != 0 and wheel is None
    assert "DSTS_BUILD is 'bogus'; wanted one of auto, none, cpu, cuda" in done.stdout


def test_auto_without_compiler_installs(build_wheel):
    """auto never fails for want of a compiler; the reason is printed in one line and kept."""
    done, wheel = build_wheel(CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout
    build, reason, native = contents(wheel)
    assert (build, native) == ("none", False) and "/nonexistent/c++" in reason and "\n" not in reason
    assert f"installing without native kernels: {reason}" in done.stdout


@pytest.mark.parametrize("nvcc", [NO_NVCC, "/bin/false"], ids=["absent", "broken"])
def test_auto_without_nvcc_builds_the_rest(build_wheel, nvcc):
    """auto installs the CPU kernels where nvcc is absent or does not work; the reason is printed and kept."""
    done, wheel = build_wheel(CUDACXX=nvcc)
    assert done.returncode == 0, done.stdout
    build, reason, native = contents(wheel)
    assert (build, native) == ("cpu", True)
    assert f"installing without CUDA kernels: {reason}" in done.stdout
    assert ("nvcc was not found" if nvcc == NO_NVCC else "/bin/false --list-gpu-code failed") in reason


@pytest.mark.parametrize(
    "env, reason",
    [
        pytest.param({"DSTS_BUILD": "cpu", "CXX": "/nonexistent/c++"}, "/nonexistent/c++", id="cpu-no-compiler"),
        pytest.param({"DSTS_BUILD": "cuda"}, "nvcc was not found", id="cuda-no-nvcc"),
    ],
)
def test_named_build_must_succeed(build_wheel, env, reason):
    """A build that was asked for by name and cannot be had fails the install, with the reason."""
    done, wheel = build_wheel(**env)
    assert done.returncode != 0 and wheel is None
    line = next(line for line in done.stdout.splitlines() if f"error: DSTS_BUILD={env['DSTS_BUILD']}: " in line)
    assert reason in line


def test_failed_build_leaves_no_stale_module(build_wheel):
    """A native module of an earlier build is gone after one that gave none; both in the same tree."""
    done, wheel = build_wheel(DSTS_BUILD="cpu")
    assert done.returncode == 0, done.stdout
    assert contents(wheel) == ("cpu", "DSTS_BUILD=cpu", True)
    done, wheel = build_wheel(CXX="/nonexistent/c++")
    assert done.returncode == 0 and contents(wheel)[2] is False
