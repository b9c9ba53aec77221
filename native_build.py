"""Drives CMake for ``setup.py``: one incremental build of the native module, shown as it goes.

A build directory belongs to one Python and one set of compilers and flags. What fails is told in its own words, for
they are all that is left of a build once pip has removed its directory. Nothing here imports torch.
"""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

ROOT = Path(__file__).resolve().parent
# CMake reads these at its first run in a directory, and keeps what they said.
KEPT = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CMAKE_BUILD_TYPE")
WORDS = 1000  # characters of an error that are kept


class BuildError(Exception):
    """A step of the build failed; the message is one line, in the words of what failed."""


@contextlib.contextmanager
def build_directory() -> Iterator[Path]:
    """Where a build leaves its files, for one install at a time: ``build``, or elsewhere where sources are read-only.

    All installs of a tree write into it, so another waits. The lock ends with its process.
    """
    if not os.access(ROOT, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="dsts_kernels-") as directory:
            yield Path(directory).resolve()
        return
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("dsts_kernels: waiting for another install of this tree to end", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield ROOT / "build"


def tool(name: str, attribute: str) -> str:
    """Path of cmake or ninja: of its PyPI package where installed, as that need not be on PATH."""
    try:
        found = shutil.which(name, path=getattr(__import__(name), attribute))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} not found; install it, or build with isolation")
    return found


def find(lines: list[str], pattern: str) -> int | None:
    """Number of the first line that begins as ``pattern`` says."""
    return next((i for i, line in enumerate(lines) if re.match(pattern, line, re.IGNORECASE)), None)


def own_words(output: str) -> str:
    """What a failed build says of its cause, as one line: the compiler's words where one ran, else CMake's."""
    lines = [line.strip() for line in output.splitlines()]
    failed = find(lines, "FAILED: ")
    if failed is not None:  # as ninja writes it: this line, the command, all that the command said
        command = lines[failed + 1]
        head = command.removeprefix(": && ").split(" ")[0] + ": "
        start, end = failed + 2, r"\[\d+/\d+\] |ninja: |FAILED: "
        silent = f"it failed without a word; the command was {command}"
    else:
        start = find(lines, r"(?!-- ).*\b(error|fatal)\b")
        start = max(0, len(lines) - 3) if start is None else start + lines[start].startswith("CMake Error at ")
        head, end, silent = "", "Call Stack|-- |CMake Error", "the build failed without a message"
    said = [line for line in itertools.takewhile(lambda line: not re.match(end, line), lines[start:]) if line]
    if len(" ".join(said)) > WORDS:  # the first error matters more than the warnings before it
        said = said[find(said, r".*\b(error|fatal)\b") or 0 :]
    words = " ".join(said) or silent
    return head + (words if len(words) <= WORDS else words[:WORDS] + " ... (pip -v shows all)")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def progress(ninja: str) -> str:
    """What ninja begins its lines with: steps of all, the time so far and, where it can tell, what is left."""
    said = subprocess.run([ninja, "--version"], capture_output=True, text=True).stdout
    version = tuple(int(part) for part in re.findall(r"[0-9]+", said)[:2])
    return "[%f/%t] %w, %W left: " if version >= (1, 12) else "[%f/%t] %e s: "


def run(*command: str, **more: str) -> None:
    """Run a command whose output is shown as it comes, in English and in any bytes; ``more`` of environment."""
    said, encoding = [], sys.stdout.encoding or "utf-8"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "backslashreplace"}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "LC_ALL": "C", **more}, **pipes) as process:
        for line in process.stdout:
            print(line.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
            said.append(line)
    if process.returncode != 0:
        raise BuildError(own_words("".join(said)))


def build_module(cuda: str, base: Path) -> tuple[Path, str]:
    """Configure and build with ``DSTS_WITH_CUDA=cuda``: the module's path, and why it has no CUDA kernels if so."""
    # A CMake cache is bound to its source directory, Python and compilers: each combination has its own. The Python of
    # an isolated build is another each time; what it is made from is not.
    python = os.path.realpath(sys.executable)
    key = "|".join([str(ROOT), python, *(os.environ.get(name, "") for name in KEPT)])
    directory = base / f"cmake-{sys.implementation.cache_tag}-{zlib.crc32(key.encode()):08x}"
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    ninja = tool("ninja", "BIN_DIR")
    defines = [
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DDSTS_WITH_CUDA={cuda}",
    ]
    for old in directory.glob("_C*"):
        old.unlink()
    began = time.monotonic()
    run(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(directory), *defines)
    run(cmake, "--build", str(directory), "--target", "_C", NINJA_STATUS=progress(ninja))
    print(f"dsts_kernels: the native module took {duration(time.monotonic() - began)}", flush=True)
    module = next(path for path in directory.glob("_C*") if path.suffix in (".so", ".pyd"))
    return module, (directory / "no_cuda.txt").read_text(encoding="utf-8")
