"""Compilers of the CUDA kernels that need no GPU: nvcc, and for sm_70 NVRTC 12.9 with ptxas 12.9.

CUDA 13 no longer compiles for sm_70, so an nvcc of CUDA 13 is joined by three PyPI packages of CUDA 12.9. What was
compiled is kept in build/ahead, by a digest of sources, options and compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OUTPUT = ROOT / "build" / "ahead"
PACKAGES = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12")
OPTIONS = ("-std=c++17", f"-I{ROOT / 'csrc'}")
WMMA = "-DDSTS_WMMA"  # sm_70 multiplies by wmma.mma, which simulators know, and not by mma.sync


class Missing(Exception):
    """No compiler for a target is installed."""


class Built(NamedTuple):
    """One source compiled for one target: paths, so that they can stay where they are."""

    source: str
    arch: int
    cubin: Path
    log: Path  # what ptxas -v said
    ptx: Path | None


def nvcc() -> str | None:
    """On PATH, in CUDA_HOME or where it is installed by default."""
    places = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def run(*command: str | Path) -> str:
    """Both streams of a command that succeeds."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@functools.cache
def nvcc_targets() -> tuple[int, ...]:
    """What the installed nvcc compiles for, from sm_70 on."""
    found = nvcc()
    listed = re.findall(r"^sm_(\d+)$", run(found, "--list-gpu-code"), re.MULTILINE) if found else []
    return tuple(sorted(arch for arch in map(int, listed) if arch >= 70))


@functools.cache
def package(name: str, needed: str) -> Path | None:
    """Where one of NVIDIA's PyPI packages lies: the folder nvidia/`name` that has `needed`."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return next((Path(f) / name for f in folders if (Path(f) / name / needed).exists()), None)


class Nvrtc(NamedTuple):
    library: Path
    ptxas: Path
    headers: tuple[Path, Path]


def nvrtc() -> Nvrtc | None:
    """NVRTC of CUDA 12, where the three packages are installed."""
    library = package("cuda_nvrtc", "lib/libnvrtc.so.12")
    runtime = package("cuda_runtime", "include/cuda_fp16.h")
    compiler = package("cuda_nvcc", "bin/ptxas")
    if library is None or runtime is None or compiler is None:
        return None
    headers = runtime / "include", compiler / "include"
    return Nvrtc(library / "lib" / "libnvrtc.so.12", compiler / "bin" / "ptxas", headers)


def missing(arch: int) -> str | None:
    """Why a target cannot be compiled for, or None."""
    if arch in nvcc_targets() or (arch == 70 and nvrtc()):
        return None
    if arch == 70:
        return f"sm_70 needs an nvcc of CUDA 12, or these packages: {' '.join(f'{name}==12.9.*' for name in PACKAGES)}"
    found = nvcc()
    return f"sm_{arch}: not among the targets of {found}" if found else f"sm_{arch}: no nvcc found"


def compiler(arch: int) -> Path:
    """nvcc, or the ptxas that assembles for a target which that lacks."""
    reason = missing(arch)
    if reason:
        raise Missing(reason)
    found, tools = nvcc(), nvrtc()
    if arch in nvcc_targets() and found:
        return Path(found)
    assert tools is not None
    return tools.ptxas


def to_ptx(tools: Nvrtc, source: Path, arch: int, *defines: str) -> bytes:
    """NVRTC as a library: every explicit instance of a template becomes an entry."""
    library = ctypes.CDLL(str(tools.library))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def text_of(what: str) -> bytes:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, text)
        return text.value

    include = (f"-I{folder}" for folder in tools.headers)
    options = [f"--gpu-architecture=compute_{arch}", *OPTIONS, *defines, *include]
    encoded = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            raise RuntimeError(f"{source.name} for sm_{arch}: {text_of('ProgramLog').decode()}")
        return text_of("PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def digest(parts: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


@functools.cache
def version(path: str | Path) -> str:
    return run(path, "--version")


def write(target: Path, make: Callable[[Path], object]) -> None:
    """`target` whole or not at all, whoever else writes it."""
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    make(partial)
    partial.replace(target)


def compile_source(source: Path, arch: int, *defines: str) -> Built:
    """To a cubin, through PTX where NVRTC does it; ``defines`` are options such as :data:`WMMA`."""
    reason = missing(arch)
    if reason:
        raise Missing(reason)
    tools = None if arch in nvcc_targets() else nvrtc()
    by = nvcc() if tools is None else tools.ptxas
    assert by is not None
    headers = (header.read_bytes() for header in sorted((ROOT / "csrc").rglob("*.h")))
    library = [] if tools is None else [str(tools), str(tools.library.stat().st_size)]
    inputs = digest([source.read_bytes(), *headers, *OPTIONS, str(by), version(by), *library, str(arch), *defines])
    stem = OUTPUT / f"{source.stem}-sm_{arch}-{inputs}"
    cubin, log, ptx = (stem.with_suffix(suffix) for suffix in (".cubin", ".log", ".ptx"))
    if not cubin.exists():  # it is written last
        OUTPUT.mkdir(parents=True, exist_ok=True)

        def assemble(target: Path) -> None:
            if tools is None:
                said = run(
                    by, "-cubin", f"-arch=sm_{arch}", "-O3", *OPTIONS, *defines, "-Xptxas", "-v", source, "-o", target
                )
            else:
                write(ptx, lambda path: path.write_bytes(to_ptx(tools, source, arch, *defines)))
                said = run(by, "-v", f"-arch=sm_{arch}", ptx, "-o", target)
            write(log, lambda path: path.write_text(said))

        write(cubin, assemble)
    return Built(source.stem, arch, cubin, log, ptx if tools else None)


def write_ptx(folder: Path, arch: int, *defines: str) -> list[Path]:
    """The PTX of every source, as NAME.ptx."""
    reason = missing(arch)
    if reason:
        raise Missing(reason)
    folder.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.ptx"
        if arch in nvcc_targets():
            run(nvcc(), "-ptx", f"-arch=compute_{arch}", "-O3", *OPTIONS, *defines, source, "-o", target)
        else:
            shutil.copyfile(compile_source(source, arch, *defines).ptx, target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, SOURCES))


def compile_all(archs: Iterable[int], processes: int = 2) -> list[Built]:
    """Every source for every target; the long ones first."""
    work = sorted(((source, arch) for arch in archs for source in SOURCES), key=lambda one: -one[0].stat().st_size)
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda one: compile_source(*one), work))
