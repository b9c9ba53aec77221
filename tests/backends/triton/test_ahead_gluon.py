"""The Gluon kernels compiled ahead of time: what a Hopper GPU would be given, without one."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os

import pytest

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import ahead_gluon  # noqa: E402
from dsts_kernels.backends.gpu import grids  # noqa: E402
from dsts_kernels.backends.triton.gluon import plan  # noqa: E402

gluon, gl = map(importlib.import_module, ("triton.experimental.gluon", "triton.experimental.gluon.language"))
hopper = importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
mbarrier, tma = hopper.mbarrier, hopper.tma

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(interpreted, reason="the interpreter compiles nothing")
SHARED = (grids.SMEM_KIB[90] - 1) * 1024
REGISTERS = 65536  # of a multiprocessor
OLD = importlib.metadata.version("triton").startswith("3.6.")


CONV, DATA, WEIGHT = ahead_gluon.CONV, ahead_gluon.DATA, ahead_gluon.WEIGHT
# Boxes of a step: of features and filters; of both sides of a filter gradient, in rows of 128 bytes.
COPIES = {CONV: "5D 2D", DATA: "5D 3D", WEIGHT: "5D"}


@pytest.fixture(scope="module", params=[CONV, DATA, WEIGHT])
def looks(request) -> list[ahead_gluon.Look]:
    """Every launch of a kernel, compiled."""
    return [ahead_gluon.look(launch) for launch in ahead_gluon.launches((request.param,))]


def copies_of(look: ahead_gluon.Look) -> list[str]:
    count = (look.tile.m + look.tile.n) // 64 if look.kernel == WEIGHT else 1
    return [f"UTMALDG.{rank}" for rank in COPIES[look.kernel].split()] * count


@pytest.mark.slow
def test_compiled_code(looks):
    """Nothing spills, registers and shared memory fit, and a K step is what it was written to be."""
    kernel, ends = looks[0].kernel, {look.end for look in looks}
    assert {look.tile for look in looks} == set(plan.WEIGHT_TILES if kernel == WEIGHT else plan.TILES)
    for wanted in {
        CONV: ("9 tap sums", "channels-first"),
        DATA: ("features and gates", "channels-first", "gates alone"),
        WEIGHT: ("both operators, half", "both operators, fp32", "mixing 1x1x1", "mixing 1x3x3", "mixing 3x1x1"),
    }[kernel]:
        assert any(wanted in end for end in ends), ends
    for look in looks:
        # Triton 3.6 keeps two registers of nine taps' sums in memory, at a tile's end.
        allowed = 8 if OLD and "9 tap sums" in look.end else 0
        assert look.spilled <= allowed and look.step_spills == 0, look
        assert look.shared <= SHARED, look
        # Warps come in fours: the consumers' eight, and four of which the producer is one.
        assert 256 * look.consumer_registers + 128 * look.producer_registers <= REGISTERS, look
        assert look.product_operands == {"shared"}, look
        assert look.loops == (2 if kernel == DATA else 1), look
        assert look.step_products == look.tile.k // 16, look
        assert list(look.copies) == copies_of(look), look
        assert look.step <= 64 and look.step_barriers <= 2, look
        assert look.producer_step <= 90, look


@pytest.mark.slow
def test_warps_meet_before_a_stage_is_freed(looks):
    """One thread arrives for all eight warps, so all must be done with the stage: the stand-in cannot see that. Nor
    that what one warp parks another reads."""
    assert all(look.guarded_release for look in looks)


PTX = {
    True: "wgmma.wait_group.sync.aligned 1;\nbar.sync \t0, 256;\n@%p mbarrier.arrive.shared::cta.b64 _, [%r];",
    False: "bar.sync \t0, 256;\nwgmma.wait_group.sync.aligned 1;\n@%p mbarrier.arrive.shared::cta.b64 _, [%r];",
}


@pytest.mark.parametrize("guarded", PTX)
def test_how_a_release_is_read(guarded):
    assert ahead_gluon.release_is_guarded(PTX[guarded]) == guarded
    assert not ahead_gluon.release_is_guarded("bar.sync 0, 256;")


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_how_parking_is_read(before, after):
    meet, park = "bar.sync \t0, 256;\n", "st.global.v2.b32 [%rd1], {%r1, %r2};\n" * 3
    text = f"wgmma.wait_group.sync.aligned 0;\n{meet * before}{park}{meet * after}ld.global.v4.b32 %r;"
    assert ahead_gluon.parking_is_guarded(text) == (before and after)
    assert not ahead_gluon.parking_is_guarded(meet)


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


@gluon.jit
def clustered_kernel(filters):
    """Two CTAs that both get every box: who sends one waits until its stage is free, and frees it when it came."""
    ring = gl.allocate_shared_memory(filters.dtype, [2] + filters.block_type.shape, filters.layout)  # noqa: RUF005
    ready = mbarrier.allocate_mbarrier(batch=2)
    free = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    mbarrier.sync_cluster_init()
    for step in range(0, 8):
        stage = step % 2
        mbarrier.wait(free.index(stage), step // 2 & 1 ^ 1)
        mbarrier.expect(ready.index(stage), filters.nbytes_per_cta)
        tma.async_copy_global_to_shared(filters, [step * 64, 0], ready.index(stage), ring.index(stage), multicast=True)
        mbarrier.wait(ready.index(stage), step // 2 & 1)
        mbarrier.arrive(free.index(stage), count=1)


@pytest.mark.slow
def test_what_clusters_lack():
    """Why no kernel here multicasts, docs/log/gluon.md. Where this fails, Triton has learned it."""
    if OLD:
        assert "multicast" not in inspect.signature(tma.async_copy_global_to_shared).parameters
        assert not hasattr(hopper, "cluster")
        return
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, cga_layout=[[0, 0]])
    source = GluonASTSource(clustered_kernel, {"filters": f"tensordesc<bf16[64,64],{layout!r}>"}, {}, {})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_ctas": 2})
    ptx = built.asm["ptx"]
    assert ".multicast::cluster" in ptx
    assert "mbarrier.arrive.shared::cta" in ptx and "mapa" not in ptx and "mbarrier.arrive.shared::cluster" not in ptx
