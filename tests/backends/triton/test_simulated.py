"""The gathers as they are compiled, run on the CPU by their PTX: exact, in every dtype and layout, with each switch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable

import pytest
import torch

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import gathers, ptx  # noqa: E402
from benchmarks.compiled.simulated import simulated  # noqa: E402
from dsts_kernels.backends.gpu.switches import switched  # noqa: E402

from ...support.gathered import ROUTED, check_gather_panel, check_route_and_gather  # noqa: E402
from ...support.inputs import LAYOUTS  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SIZE = (2, 5, 8)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = {"before": dict(flat_gather=False, early_gather=False), "flat": {}, "gluon": dict(gluon_gather=True)}


# Rows of whole 16 bytes and ragged ones; lists of all and of nothing; samples of a neuron out of range.
@pytest.mark.parametrize("way, dtype", [("before", torch.float16), *(("flat", dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("channels, gate", [(72, "mixed"), (70, "soft"), (64, "all-spatial"), (33, "all-temporal")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_panel(layout, channels, gate, way, dtype):
    """Training's gather on sm_90: the same bits as in PyTorch."""
    with switched(**WAYS[way]), simulated("sm_90", 2) as chip:
        check_gather_panel(chip.backend.kernels, layout, channels, gate, SIZE, dtype)


@pytest.mark.parametrize("way, dtype", [("before", torch.bfloat16), *itertools.product(("flat", "gluon"), DTYPES)])
@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("layout", ["channels-last", "channels-first", "strided"])
def test_route_and_gather(layout, case, way, dtype):
    """A frozen layer's first launch on sm_90; in Gluon where whole 16 bytes of channels lie side by side."""
    with switched(**WAYS[way]), simulated("sm_90", 1) as chip:
        check_route_and_gather(chip.backend.kernels, layout, case, SIZE, dtype)
    gluon = way == "gluon" and layout == "channels-last" and ROUTED[case][0] * dtype.itemsize % 16 == 0
    assert (chip.accesses[0].kernel == "route_and_gather_rows_kernel") == gluon


def test_missing_barriers_are_noticed():
    """Of the compiled Gluon kernel: without any one of its barriers but the last, which nobody waits for."""

    def run(edit: Callable[[str], str] = str) -> str:
        with switched(gluon_gather=True), simulated("sm_90", 1, lambda grid: [(0, 0)], edit) as chip:
            gathers.route_and_gather(chip, gathers.features("swin", "channels-last", torch.bfloat16))
        return chip.built[0].asm["ptx"]

    places = [found.start() for found in re.finditer(r"bar\.sync", run())]
    unnoticed = 0
    for at in places:
        try:
            run(lambda text, at=at: text[:at] + "bar.warp" + text[at + len("bar.sync") :])
            unnoticed += 1
        except ptx.Fault:
            pass
    assert len(places) > 5 and unnoticed <= 1


def test_faults_are_noticed():
    """Without a barrier between who writes shared memory and who reads it, and outside of a tensor."""
    header = ".visible .entry k(.param .u64 k_param_0)\n.reqntid 64\n{\n"
    body = """
        mov.u32 %r1, %tid.x;
        shl.b32 %r2, %r1, 2;
        st.shared.b32 [%r2], %r1;
        bar.sync 0;
        xor.b32 %r3, %r2, 128;
        ld.shared.b32 %r4, [%r3];
        ld.param.b64 %rd1, [k_param_0];
        cvt.u64.u32 %rd2, %r2;
        add.s64 %rd3, %rd1, %rd2;
        st.global.b32 [%rd3], %r4;
        ret;
    }"""

    def run(text: str, size: int = 64) -> torch.Tensor:
        memory, out = ptx.Memory(), torch.zeros(size, dtype=torch.int32)
        at = memory.put(out)
        accesses = ptx.run(ptx.parse(header + text), memory, [at], shared=256)
        assert [one.sectors for one in accesses if one.space == "global"] == [4, 4]
        return memory.get(at, out)

    assert run(body).tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(ptx.Fault, match="without a barrier"):
        run(body.replace("bar.sync 0;", ""))
    with pytest.raises(ptx.Fault, match="outside of every tensor"):
        run(body, 60)
    with pytest.raises(ptx.Fault, match="nobody wrote"):
        run(body.replace("st.shared", "@!%p1 st.shared").replace("shl", "setp.ge.u32 %p1, %r1, 0; shl"))
    with pytest.raises(ptx.Fault, match="apart"):
        run(body.replace("bar.sync 0;", "setp.lt.u32 %p1, %r1, 3; @%p1 ret; bar.sync 0;"))
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence"):
        run(body.replace("bar.sync 0;", "wgmma.fence %r1, %r2;"))
