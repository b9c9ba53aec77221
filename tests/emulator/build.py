"""Builds the CUDA sources for the CPU: g++, the shadow headers in include/ and the runtime make them a Python module.

By hand: python -m tests.emulator.build plain 700
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "emulator"
RUNTIME = sorted((HERE / "runtime").glob("*.cpp"))

SANITIZE = {
    "plain": [],
    "wmma": [],  # sm_70 as simulators get it
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
OPTIMIZE = {
    "plain": ["-O2"],
    "wmma": ["-O2", "-DDSTS_WMMA"],
    "address": ["-O1", "-fno-omit-frame-pointer"],
    "thread": ["-O1"],
}
# Without unique symbols, two flavours loaded in one process stay apart.
COMMON = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)
    return done.stdout


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be built here; ``None`` where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator is for x86-64 Linux"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    try:
        run([*compiler(), "--version"])
    except (OSError, RuntimeError):
        return "no C++ compiler"
    return None


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]


def flags(source: Path, flavour: str, arch: int, name: str) -> list[str]:
    """How to compile a source. Only kernels are instrumented; only they and the runtime know the architecture."""
    include = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    if source.suffix == ".cu":
        cuda = ["-x", "c++", "-include", str(HERE / "include" / "cuda_runtime.h")]  # as nvcc does
        defines = ["-D__CUDACC__", "-DDSTS_NO_PTX", f"-D__CUDA_ARCH__={arch}"]
        # g++ does not know "#pragma unroll".
        return [*cuda, *COMMON, "-Wno-unknown-pragmas", *OPTIMIZE[flavour], *SANITIZE[flavour], *defines, *include]
    if source in RUNTIME:
        return [*COMMON, "-O2", f"-DEMULATOR_ARCH={arch}", f"-DEMULATOR_{flavour.upper()}", *include]
    import pybind11

    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    return [*COMMON, "-O1", f"-DEMULATOR_MODULE={name}", *include, *python]


def headers_digest(source: Path) -> str:
    """Of every header that the source could include."""
    folders = [HERE] if HERE in source.parents else [HERE, ROOT / "csrc"]
    return digest(*(part for f in folders for h in sorted(f.rglob("*.h")) for part in (str(h), h.read_bytes())))


def build(
    flavour: str = "plain", arch: int = 700, sources: list[Path] | None = None, name: str = "dsts_emulated"
) -> Path:
    """Compiles what changed and returns the path of the module. Processes that build wait for one another.

    `sources` stand in for the project's own; RUNTIME and module.cpp are always added.
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(flavour, arch, sources, name)


def _build(flavour: str, arch: int, sources: list[Path] | None, name: str) -> Path:
    if sources is None:
        sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "cuda" / "bindings.cpp"]
    sources = [*(Path(s).resolve() for s in sources), *RUNTIME, HERE / "module.cpp"]
    version = run([*compiler(), "--version"])
    objects = OUTPUT / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        options = flags(source, flavour, arch, name)
        inputs = digest(*options, str(source), source.read_bytes(), headers_digest(source), version)
        target = objects / f"{source.stem}-{inputs}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            run([*compiler(), *options, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compile_one, sources))
    module = OUTPUT / f"{flavour}-{arch}-{digest(*(m.name for m in made))}" / f"{name}.so"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        partial = module.with_suffix(f".{os.getpid()}")
        run([*compiler(), "-shared", *SANITIZE[flavour], *map(str, made), "-o", str(partial), "-pthread"])
        partial.replace(module)
    return module


def load(path: Path) -> ModuleType:
    """Imports a built module. A sanitizer's flavour needs a process started in `environment`."""
    # pybind11 keeps modules by their full name, so that of a flavour must be its own.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(flavour: str) -> dict[str, str]:
    """The variables, beyond os.environ, of a Python process that loads a module of this flavour.

    It exits with status 66 at the first report of a sanitizer.
    """
    if not SANITIZE[flavour]:
        return {}
    library = {"address": "libasan.so", "thread": "libtsan.so"}[flavour]
    # libstdc++ has to be there when AddressSanitizer looks for what it intercepts.
    preload = [run([*compiler(), f"-print-file-name={lib}"]).strip() for lib in (library, "libstdc++.so.6")]
    return {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66:handle_abort=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=66",
        # Of libraries that are not instrumented nothing is known that orders their accesses.
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_thread_leaks=0:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "plain", int(sys.argv[2]) if len(sys.argv) > 2 else 700))
