"""Ahead-of-time compilation of every launch with every tile that ships: what a GPU would be given, without one."""

from __future__ import annotations

import os

import pytest

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import ahead  # noqa: E402
from dsts_kernels.backends.gpu import grids  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
UNIT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
SHARED = {name: (grids.SMEM_KIB[chip] - 1) * 1024 for name, chip in ahead.TARGETS.items()}  # bytes a program may have


@pytest.fixture(
    scope="module",
    params=[pytest.param(chip, marks=pytest.mark.xdist_group(f"triton-{chip}")) for chip in ahead.TARGETS],
)
def compiled(request: pytest.FixtureRequest) -> list[ahead.Compiled]:
    """Everything compiled for one architecture at both of the paper's shapes."""
    return ahead.compile_all([request.param], list(ahead.SHAPES), ahead.KINDS, os.cpu_count() or 1)


def test_nothing_spills(compiled):
    """Registers hold what every kernel keeps, in every tile."""
    assert not [one for one in compiled if one.stack]


def test_shared_memory_fits(compiled):
    """No program asks for more than a chip gives, and as many fit a multiprocessor as the launcher counts on."""
    assert not [one for one in compiled if one.shared > SHARED[one.architecture] or one.programs < 1]


def test_matrix_units(compiled):
    """The three large kernels run on the chip's matrix unit, but for float32 in full precision."""
    large = [one for one in compiled if one.kernel in ahead.LARGE]
    assert {one.kernel for one in large} == set(ahead.LARGE)
    for one in large:
        full = one.dtype == "fp32" and one.instruction == "none"
        assert full or one.instruction == UNIT[one.architecture], one
    assert {one.form for one in large if one.kernel == "conv_kernel"} == {"packed", "listed", "stored", "transposed"}
    assert {one.instruction for one in large if one.dtype == "bf16"} == {UNIT[large[0].architecture]}


def test_descriptors(compiled):
    """Matrix units are fed by tensor descriptors wherever the chip has them; Hopper's not by listed filters."""
    for one in compiled:
        if one.kernel in ahead.LARGE:
            wanted = one.architecture != "sm_80" and one.instruction != "none"
            assert one.descriptors == (wanted and not (one.architecture == "sm_90" and one.form == "listed")), one


def test_no_product_reads_registers(compiled):
    """Triton overwrites registers that Hopper's products still read: they read shared memory. See triton/launch.py."""
    assert not [one for one in compiled if one.from_registers]
