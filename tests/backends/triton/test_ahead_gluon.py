"""The Gluon convolution compiled ahead of time: what a Hopper GPU would be given, without one."""

from __future__ import annotations

import importlib.metadata
import os

import pytest

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import ahead_gluon  # noqa: E402
from dsts_kernels.backends.gpu import grids  # noqa: E402
from dsts_kernels.backends.triton.gluon import plan  # noqa: E402

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(interpreted, reason="the interpreter compiles nothing")
SHARED = (grids.SMEM_KIB[90] - 1) * 1024
REGISTERS = 65536  # of a multiprocessor
OLD = importlib.metadata.version("triton").startswith("3.6.")


@pytest.fixture(scope="module")
def looks() -> list[ahead_gluon.Look]:
    """Every launch, compiled."""
    return [ahead_gluon.look(launch) for launch in ahead_gluon.launches()]


@pytest.mark.slow
def test_compiled_code(looks):
    """Nothing spills, registers and shared memory fit, and a K step is what it was written to be."""
    assert {look.tile for look in looks} == set(plan.TILES)
    ends = {look.end for look in looks}
    assert any("9 tap sums" in end for end in ends) and any("channels-first" in end for end in ends), ends
    for look in looks:
        # Triton 3.6 keeps two registers of nine taps' sums in memory, at a tile's end.
        allowed = 8 if OLD and "9 tap sums" in look.end else 0
        assert look.spilled <= allowed and look.step_spills == 0, look
        assert look.shared <= SHARED, look
        # Warps come in fours: the consumers' eight, and four of which the producer is one.
        assert 256 * look.consumer_registers + 128 * look.producer_registers <= REGISTERS, look
        assert look.product_operands == {"shared"}, look
        assert look.step_products == look.tile.k // 16, look
        assert look.copies == ("UTMALDG.5D", "UTMALDG.2D"), look
        assert look.step <= 64 and look.step_barriers <= 2, look
        assert look.producer_step <= 80, look


@pytest.mark.slow
def test_warps_meet_before_a_stage_is_freed(looks):
    """One thread arrives for all eight warps, so all must be done with the stage: the stand-in cannot see that."""
    assert all(look.guarded_release for look in looks)


PTX = {
    True: "wgmma.wait_group.sync.aligned 1;\nbar.sync \t0, 256;\n@%p mbarrier.arrive.shared::cta.b64 _, [%r];",
    False: "bar.sync \t0, 256;\nwgmma.wait_group.sync.aligned 1;\n@%p mbarrier.arrive.shared::cta.b64 _, [%r];",
}


@pytest.mark.parametrize("guarded", PTX)
def test_how_a_release_is_read(guarded):
    assert ahead_gluon.release_is_guarded(PTX[guarded]) == guarded
    assert not ahead_gluon.release_is_guarded("bar.sync 0, 256;")


def test_how_a_loop_is_read():
    """The innermost loop with an instruction, without what lies outside it."""
    sass = """
.L_x_1:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_2:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/              @P0  BRA `(.L_x_2) ;
        /*0030*/              @P1  BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0050*/                   EXIT ;
"""
    assert len(ahead_gluon.step_of(sass, "HGMMA")) == 2
    assert sorted(map(len, ahead_gluon.loops(sass))) == [2, 4]
