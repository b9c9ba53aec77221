"""The program that needs nothing but a CUDA driver, benchmarks/compiled/bare, with the emulator as the driver."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import ahead_cuda, cubin, cuda_compilers
from dsts_kernels.backends.gpu.grids import MAX_CTAS, flat_tiles, persistent_grid, resident_ctas
from tests.emulator import build as emulator

KERNEL = "_ZN4dsts4cuda11conv_kernelI6__halfLb1EEEvNS0_10ConvParamsE"
OTHER = KERNEL.replace("Lb1", "Lb0")
PTX = f""".version 6.3
.target sm_70
.address_size 64
.visible .entry {OTHER}(
.visible .entry {KERNEL}(
"""
SIZES = ["--batch", "2", "--channels", "96", "--size", "3", "5", "4", "--repeat", "2"]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="the emulator is for x86-64 Linux"
    ),
]


def made(folder: Path, arch: int) -> Path:
    """The program, a driver that runs the kernel of a chip on the CPU, and PTX that this driver does not read."""
    try:
        emulator.run([*emulator.compiler(), "--version"])
    except (OSError, RuntimeError):
        pytest.skip("no C++ compiler")
    sources = [emulator.ROOT / "csrc/cuda/conv.cu", *emulator.RUNTIME, emulator.HERE / "fake_driver.cpp"]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    for source, target in zip(sources, objects, strict=True):
        flags = emulator.flags(source, "plain", arch, "fake")
        emulator.run([*emulator.compiler(), *flags, "-c", str(source), "-o", target])
    driver = folder / "libcuda.so.1"
    emulator.run([*emulator.compiler(), "-shared", "-Wl,-z,defs", *objects, "-o", str(driver), "-pthread"])
    program = emulator.ROOT / "benchmarks/compiled/bare/bare.cpp"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    options = ["-std=c++17", "-O1", *warnings, f"-I{emulator.ROOT / 'csrc'}", str(program), "-ldl"]
    emulator.run([*emulator.compiler(), *options, "-o", str(folder / "bare")])
    (folder / "conv.ptx").write_text(PTX)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("bare"), 700)


def bare(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(folder / "bare"), *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("channels", [96, 131])  # in rows of whole 16 bytes, and not
def test_right_outputs(folder, channels):
    status, said = bare(folder, str(folder / "conv.ptx"), *SIZES, "--channels", str(channels))
    assert status == 0, said
    assert "device: emulator, 7.0, 3 multiprocessors" in said
    assert re.search(r"time: 1\.0000 ms, median of 2\nrate: [\d.]+ TFLOP/s, [\d.]+ GB/s\nerror: \S+ at most", said), (
        said
    )


def test_launch_is_that_of_the_launchers(folder):
    said = bare(folder, str(folder / "conv.ptx"), *SIZES)[1]
    name, *numbers = re.search(
        r"kernel: (\S+) for sm_70, (\d+) CTAs of (\d+) threads, (\d+) waves, (\d+) bytes", said
    ).groups()
    num_ctas, threads, waves, smem_bytes = map(int, numbers)
    assert name == KERNEL
    assert smem_bytes == ahead_cuda.dynamic_smem(cubin.readable(name), 70, threads, num_ctas)
    # SIZES: one tile a sample, two K blocks and one more of all taps; the fake driver has three multiprocessors.
    grid = persistent_grid(2, flat_tiles(60, 96), 3 * 12, 3, resident_ctas(70, exact=False), MAX_CTAS)
    assert (num_ctas, waves) == (grid.num_ctas, grid.waves)


@pytest.mark.parametrize("sizes", [["--size", "4", "13", "11"], ["--batch", "9", "--channels", "8"]])
def test_several_tiles(folder, sizes):
    """Positions that fill more than one tile; more tiles than CTAs."""
    status, said = bare(folder, str(folder / "conv.ptx"), *SIZES, *sizes)
    assert status == 0, said


def test_outputs_that_were_not_written(folder):
    status, said = bare(folder, str(folder / "conv.ptx"), *SIZES, FAKE_DRIVER_IDLE="1")
    assert status == 1
    assert "WRONG" in said and "11520 outputs are NaN" in said


def test_what_cannot_run(folder):
    ptx = str(folder / "conv.ptx")
    for arguments, said in [
        ([], "wanted: bare KERNEL.ptx"),
        ([ptx, "--batch", "0"], "got '0', wanted a positive number"),
        ([ptx, "--kernel", "absent"], f"there are:\n  {OTHER}\n  {KERNEL}"),
        ([ptx, "--kernel", OTHER, *SIZES], "cuModuleGetFunction: error 500, named symbol not found"),
        ([str(folder / "bare")], "no kernel's name has"),
        ([str(folder / "absent.ptx")], "cannot be read"),
    ]:
        status, found = bare(folder, *arguments)
        assert status == 2 and said in found, found


def test_no_driver(folder, tmp_path):
    status, said = bare(folder, str(folder / "conv.ptx"), LD_LIBRARY_PATH=str(tmp_path))
    assert status == 2 and ("no CUDA driver" in said or "cuInit" in said), said


@pytest.mark.slow
@pytest.mark.parametrize("arch, emulated", [(70, 700), (75, 750), (90, 800)])
def test_real_cubin(tmp_path, arch, emulated):
    """Names and target of a file that a compiler wrote, where one is installed; also its PTX."""
    if cuda_compilers.missing(arch):
        pytest.skip(cuda_compilers.missing(arch))
    folder = made(tmp_path, emulated)
    source = next(path for path in cuda_compilers.SOURCES if path.stem == "conv")
    built = cuda_compilers.compile_source(source, arch)
    for path in filter(None, (built.cubin, built.ptx)):
        status, said = bare(folder, str(path), *SIZES)
        assert f"kernel: {KERNEL} for sm_{arch}, " in said, said
        assert status == 0, said
