"""A wheel for a V100, built here: by a compiler whose list has sm_70, of packages of CUDA 12.9 (:mod:`tests.nvcc12`).

What is in the wheel, and what it says of itself, of a torch that is too new and of the package that is missing.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.compiled import cuda_compilers

from .test_install import LEFT_OUT, ROOT, contents, environment, pip_wheel, script

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("volta")]  # one wheel for all of them

ASK = """
import torch
from unittest import mock
from dsts_kernels import backends

torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: {capability}
torch.cuda.get_arch_list = lambda: {archs}
print(backends.explain("gated_conv3d", "cuda", torch.float16))
"""


def cuobjdump() -> Path:
    """Of triton's package, or on PATH."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else Path()
    found = beside if beside.is_file() else shutil.which("cuobjdump")
    if not found:
        pytest.skip("cuobjdump is not installed")
    return Path(found)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents."""
    for module in ("setuptools", "cmake", "ninja", "pybind11"):
        pytest.importorskip(module, reason="the build requirements must be installed: nothing is downloaded here")
    if cuda_compilers.nvcc() is None or 70 in cuda_compilers.nvcc_targets() or cuda_compilers.missing(70):
        pytest.skip(cuda_compilers.missing(70) or "an nvcc of CUDA 13 is needed for the host's side")
    folder = tmp_path_factory.mktemp("volta")
    tree = shutil.copytree(ROOT, folder / "sources", ignore=shutil.ignore_patterns(*LEFT_OUT))
    nvcc = script(folder / "nvcc", f'PYTHONPATH="{ROOT}" exec "{sys.executable}" -m tests.nvcc12 "$@"')
    done = subprocess.run(
        pip_wheel(tree), env=environment(CUDACXX=nvcc, DSTS_BUILD="cuda"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (wheel,) = (folder / "wheels").glob("*.whl")
    assert contents(wheel) == ("cuda", "", True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def python(package: Path, *command: str) -> str:
    """What a Python that finds the wheel's package first says."""
    given = environment(PYTHONPATH=str(package))
    return subprocess.run([sys.executable, *command], env=given, cwd=package, capture_output=True, text=True).stdout


def test_the_module_has_code_for_a_v100(package):
    """One cubin for each source, of sm_70 and nothing else."""
    (module,) = package.glob("dsts_kernels/_C*.so")
    said = subprocess.run([cuobjdump(), "--list-elf", module], capture_output=True, text=True, check=True).stdout
    found = [line.split(":")[1].strip() for line in said.splitlines() if line.startswith("ELF file")]
    assert len(found) == len(cuda_compilers.SOURCES), said
    assert all(name.endswith(".sm_70.cubin") for name in found), said


def test_it_says_what_it_runs_on(package):
    """``info`` names the compute capability."""
    assert "for compute capability 7.0" in python(package, "-m", "dsts_kernels", "info")


@pytest.mark.parametrize(
    ("capability", "archs", "says"),
    [
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75"], "runs on 'cuda'"),
        ((7, 0), ["sm_75", "sm_80", "sm_90"], "install a build of torch for CUDA 12.6 (its version ends in +cu126)"),
        ((6, 1), ["sm_50", "sm_60", "sm_70"], "it needs compute capability 7.0 (tensor cores), this GPU has 6.1"),
    ],
    ids=["as docs/v100.md installs it", "torch without sm_70", "an older GPU"],
)
def test_it_says_what_is_missing(package, capability, archs, says):
    """On a GPU that is not here, beside a torch that is not here."""
    assert says in python(package, "-c", ASK.format(capability=capability, archs=archs))
