"""Build of the native module: calls CMake, and records what came of it in ``dsts_kernels/_build.py``.

The one build variable is ``DSTS_BUILD``: ``auto`` (default) builds what this machine can, CPU and CUDA kernels, and
installs without those it cannot; ``none`` builds nothing; ``cpu`` or ``cuda`` must succeed or the install fails.
Everything else (sources, flags, instruction sets) is described in ``CMakeLists.txt``.
"""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")


def chosen_build() -> str:
    value = os.environ.get("DSTS_BUILD", "auto")
    if value not in CHOICES:
        raise SystemExit(f"error: DSTS_BUILD is {value!r}; wanted one of {', '.join(CHOICES)}")
    return value


def tool(name: str, attribute: str) -> str:
    """Path of cmake or ninja: of its PyPI package where installed, as that need not be on PATH."""
    try:
        found = shutil.which(name, path=getattr(__import__(name), attribute))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} not found; install it, or build with isolation")
    return found


def first_error(output: str) -> str:
    """The first error of a build log with the lines that explain it, as one line."""
    lines = [line.strip() for line in output.splitlines()]
    start = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 3))
    message = []
    for line in lines[start : start + 12]:
        if message and line.startswith(("Call Stack", "-- ", "CMake Error", "[")):
            break
        if line:
            message.append(line)
    return " ".join(message)[:400] or "the build failed without a message"


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise RuntimeError(first_error(done.stdout))


def build_module(cuda: str) -> tuple[Path, str]:
    """Configure and build, incrementally; returns the module's path, and why it has no CUDA kernels if it has none."""
    # A CMake cache is bound to its source directory, Python and compiler: each combination has its own.
    key = "|".join([str(ROOT), sys.executable, *(os.environ.get(v, "") for v in ("CXX", "CXXFLAGS", "CUDACXX"))])
    directory = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{zlib.crc32(key.encode()):08x}"
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    defines = [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DDSTS_WITH_CUDA={cuda}",
    ]
    for old in directory.glob("_C*"):
        old.unlink()
    run(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(directory), *defines)
    run(cmake, "--build", str(directory), "--target", "_C")
    module = next(path for path in directory.glob("_C*") if path.suffix in (".so", ".pyd"))
    return module, (directory / "no_cuda.txt").read_text()


class BuildNative(build_ext):
    def run(self) -> None:
        choice = chosen_build()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "dsts_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_C*"):
            if stale.suffix in (".so", ".pyd"):
                stale.unlink()
        build, reason = "none", "DSTS_BUILD=none"
        # auto tries for both kinds of kernels, then for those of the CPU.
        for cuda in {"auto": ("AUTO", "OFF"), "cpu": ("OFF",), "cuda": ("ON",)}.get(choice, ()):
            try:
                module, no_cuda = build_module(cuda)
                reason = "DSTS_BUILD=cpu" if choice == "cpu" else no_cuda or (reason if cuda == "OFF" else "")
                build = "cpu" if reason else "cuda"
                shutil.copy2(module, package)
                break
            except (RuntimeError, OSError) as error:
                if choice != "auto":
                    raise CompileError(f"DSTS_BUILD={choice}: {error}") from error
                reason = str(error)
        if build != "cuda":
            lacking = "native" if build == "none" else "CUDA"
            print(f"dsts_kernels: installing without {lacking} kernels: {reason}", file=sys.stderr, flush=True)
        record = '"""Written by setup.py: what the native build gave, and why."""\n\n'
        record += f"BUILD = {build!r}\nREASON = {reason!r}\n"
        (package / "_build.py").write_text(record, encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


chosen_build()
sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()] + [ROOT / "CMakeLists.txt"]
module = Extension("dsts_kernels._C", [], depends=sorted(str(path.relative_to(ROOT)) for path in sources))
setup(ext_modules=[module], cmdclass={"build_ext": BuildNative})
