"""The CUDA kernels compiled for chips that are not here: registers, shared memory, instructions.

sm_70 needs the packages that benchmarks/compiled/cuda_compilers.py names, the others an nvcc.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.compiled import ahead_cuda, cubin, cuda_compilers
from benchmarks.compiled.ahead_cuda import Resources
from dsts_kernels.backends.cuda import launch
from tests.emulator import build as emulator

pytestmark = pytest.mark.slow
ARCHS = (70, 75, 80, 90, 100, 110, 120)  # the first of every generation
EXHAUSTIVE = (110,)  # like 100 but for memory
CTA_SMEM_KIB = {70: 96, 75: 64, 80: 163, 90: 227, 100: 227, 110: 227, 120: 99}  # that a CTA may have
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float": torch.float32}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            arch,
            marks=[pytest.mark.xdist_group(f"cuda-{arch}"), *[pytest.mark.exhaustive] * (arch in EXHAUSTIVE)],
            id=f"sm_{arch}",
        )
        for arch in ARCHS
    ],
)
def arch(request: pytest.FixtureRequest) -> int:
    reason = cuda_compilers.missing(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def compiled(arch: int) -> list[Resources]:
    """All kernels that have a body on this chip."""
    return [one for one in ahead_cuda.compile_all([arch]) if one.supported]


def products(compiled: list[Resources], *elements: str) -> list[Resources]:
    found = [one for one in compiled if one.name.base in ahead_cuda.PRODUCTS and one.element in elements]
    assert len(found) == 4 * len(elements), found  # convolution with filters by K and by output, two gradients
    return found


def told(found: list[Resources]) -> list[str]:
    return [f"{one.name} for sm_{one.arch}: {one}" for one in found]


def test_registers_hold_everything(compiled):
    """Nothing is spilled, and nothing lies on a stack."""
    spilled = [one for one in compiled if one.stack or one.spill_stores or one.spill_loads]
    assert not told(spilled)
    assert not told([one for one in compiled if one.counts["LDL"] or one.counts["STL"]])


def test_shared_memory_fits(compiled, arch):
    limit = CTA_SMEM_KIB[arch] * 1024
    assert not told([one for one in compiled if one.static_smem + one.dynamic_smem > limit or not one.resident])


def test_as_many_ctas_are_resident_as_launchers_count_on(compiled, arch, monkeypatch):
    chip = launch.Chip(arch, ahead_cuda.CHIPS[arch].processors)
    monkeypatch.setattr(launch, "chip", lambda device: chip)
    before = torch.get_float32_matmul_precision()
    try:
        for one in (one for one in compiled if one.name.base == "conv"):
            torch.set_float32_matmul_precision("high" if one.element == "tf32" else "highest")
            assert one.resident >= launch.resident(torch.empty(0, dtype=DTYPES[one.element])), told([one])
    finally:
        torch.set_float32_matmul_precision(before)


def test_two_ctas_share_a_multiprocessor(compiled, arch):
    """Of products in tensor cores, but where four stages of each do not fit."""
    found = products(compiled, "half", *(("bfloat16", "tf32") if arch >= 80 else ()))
    assert {one.resident for one in found} == {1 if arch >= 80 and ahead_cuda.CHIPS[arch].smem_kib < 128 else 2}


def test_products_run_in_tensor_cores(compiled, arch):
    """But for exact float32."""
    for one in products(compiled, "half", *(("bfloat16", "tf32") if arch >= 80 else ())):
        assert one.tensor, told([one])
        assert bool(one.counts["HMMA.884"]) == (arch < 75), told([one])
        assert bool(one.counts["HMMA"]) == (arch >= 75), told([one])
    assert not told([one for one in products(compiled, "float") if one.tensor])


def test_operands_come_as_matrices(compiled, arch):
    """Whole matrices at a time from shared memory, where the chip can."""
    for one in products(compiled, "half", *(["bfloat16", "tf32"] if arch >= 80 else [])):
        words = one.element == "tf32" and one.name.base == "weight_gradient"  # both lie by column
        assert bool(one.counts["LDSM"]) == (arch >= 75 and not words), told([one])


def test_asynchronous_copies(compiled, arch):
    """All products from sm_80 on fetch their operands so, nothing before does."""
    assert {bool(one.counts["LDGSTS"]) for one in compiled if one.name.base in ahead_cuda.PRODUCTS} == {arch >= 80}
    assert arch >= 80 or not told([one for one in compiled if one.counts["LDGSTS"]])


def test_wmma_for_simulators():
    """They know no mma.sync: with a switch the products of sm_70 do without."""
    if reason := cuda_compilers.missing(70):
        pytest.skip(reason)
    for source in (source for source in cuda_compilers.SOURCES if source.stem in ahead_cuda.PRODUCTS):
        ptx = [cuda_compilers.compile_source(source, 70, *define).ptx for define in ((), (cuda_compilers.WMMA,))]
        if None in ptx:
            pytest.skip("nvcc keeps no PTX")
        fast, simulated = (path.read_text() for path in ptx)
        assert "mma.sync.aligned.m8n8k4" in fast and "wmma.mma" not in fast
        assert "wmma.mma" in simulated and "m8n8k4" not in simulated


def test_what_simulators_lack(compiled, arch):
    """Atomics return a value, and half types are only stored: arithmetic is in float32 or in tensor cores."""
    if arch == 70:
        lacking = ("RED", *cubin.HALF)
        assert not told([one for one in compiled if any(one.counts[kind] for kind in lacking)])


def nvdisasm() -> Path:
    spec = importlib.util.find_spec("triton")
    found = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else None
    if found is None or not found.exists():
        pytest.skip("triton's nvdisasm is not installed")
    return found


def disassembled(path: Path) -> dict[str, Counter[str]]:
    """Instructions by kind of each kernel, by nvdisasm."""
    done = subprocess.run([nvdisasm(), "-c", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nvdisasm: {done.stderr.strip()}")
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        section = re.match(r"\.text\.(\w+):", line)
        if section:
            counts = found.setdefault(section[1], Counter())
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)", line)
        if instruction:
            counts[instruction[1].replace("REDG", "RED")] += 1
    return found


def test_opcodes_are_those_of_nvdisasm(arch):
    for source in ("conv", "lists", "gather_panel", "route"):
        path = next(path for path in cuda_compilers.SOURCES if path.stem == source)
        built = cuda_compilers.compile_source(path, arch)
        by_nvdisasm, own = disassembled(built.cubin), cubin.kernels(built.cubin, arch)
        assert {kernel.symbol for kernel in own} == set(by_nvdisasm)
        for kernel in own:
            for kind in set(cubin.KINDS.values()) - set(cubin.HALF):
                assert kernel.counts[kind] == by_nvdisasm[kernel.symbol][kind], (kernel.symbol, kind)


def test_shared_memory_is_what_the_launchers_ask_for(tmp_path):
    """The C++ compiler holds the sizes that are worked out in Python."""
    try:
        emulator.run([*emulator.compiler(), "--version"])
    except (OSError, RuntimeError):
        pytest.skip("no C++ compiler")
    types = {"half": "__half", "bfloat16": "__nv_bfloat16", "tf32": "Tf32", "float": "float"}
    lines = [f'#include "cuda/{name}.cu"' for name in ahead_cuda.PRODUCTS] + ["namespace dsts::cuda {"]
    for name, bytes_ in (("ConvSmem", ahead_cuda.CONV_SMEM), ("GradientSmem", ahead_cuda.GRADIENT_SMEM)):
        lines.append(f"static_assert(sizeof({name}) == {bytes_});")
    for element, type_ in types.items():
        for a_by_k, b_by_k in ((True, True), (True, False), (False, False)):
            for arch in (70, 75, 80, 90):
                operands = f"{type_}, {str(a_by_k).lower()}, {str(b_by_k).lower()}"
                bytes_ = ahead_cuda.product_smem(element, a_by_k, b_by_k, arch)
                lines.append(f"static_assert(product_smem_of<{operands}>({arch}) == {bytes_});")
    source = tmp_path / "sizes.cu"
    source.write_text("\n".join([*lines, "}", ""]))
    emulator.run([*emulator.compiler(), *emulator.flags(source, "plain", 800, "sizes"), "-fsyntax-only", str(source)])
