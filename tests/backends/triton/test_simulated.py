"""The gathers as they are compiled, run on the CPU by their PTX: exact, in every dtype and layout, with each switch."""

from __future__ import annotations

import os

import pytest
import torch

from ...support.targets import require_triton

require_triton()
from benchmarks.compiled import ptx  # noqa: E402
from benchmarks.compiled.simulated import simulated  # noqa: E402
from dsts_kernels.backends.base import FrozenWeights  # noqa: E402
from dsts_kernels.backends.gpu.lists import Lists, panel_width  # noqa: E402
from dsts_kernels.backends.gpu.switches import switched  # noqa: E402
from dsts_kernels.backends.packing import tile_channels  # noqa: E402

from ...support.inputs import GATES, LAYOUTS  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SIZE = (2, 5, 8)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
WAYS = {"before": dict(flat_gather=False), "flat": {}, "gluon": dict(gluon_gather=True)}


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.nan_to_num(nan=77), wanted.nan_to_num(nan=77))


def written(rows: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor | None]], width: int) -> torch.Tensor:
    """A panel of ``rows (T, H, W, C)``: lists and what scales them, in K blocks; NaN where nobody writes."""
    block, at = tile_channels(rows.dtype), 0
    wanted = torch.full((*rows.shape[:3], width), torch.nan, dtype=rows.dtype)
    for own, scale in parts:
        columns = -(-len(own) // block) * block
        wanted[..., at : at + columns] = 0
        values = rows[..., own]
        wanted[..., at : at + len(own)] = values if scale is None else (values.float() * scale[own]).to(rows.dtype)
        at += columns
    return wanted


# Rows of whole 16 bytes and ragged ones; lists of all and of nothing; samples of a neuron out of range.
@dtypes
@pytest.mark.parametrize("way", ["before", "flat"])
@pytest.mark.parametrize("channels, gate", [(72, "mixed"), (70, "soft"), (64, "all-spatial"), (33, "all-temporal")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_panel(layout, channels, gate, way, dtype):
    """Training's gather on sm_90: the same bits as in PyTorch."""
    x = LAYOUTS[layout](torch.randn(2, channels, *SIZE).to(dtype))
    gates, neuron = GATES[gate](2, channels).to(dtype), torch.tensor([1, 5])
    block, orders, plans = tile_channels(dtype), [], []
    for b, row in enumerate(gates.float()):
        first, both, second = (mask.nonzero()[:, 0] for mask in (row == 1, (row > 0) & (row < 1), row == 0))
        read, start = len(first) + len(both), len(first)
        orders.append(torch.cat([first, both, second]))
        plans.append([0, -(-read // block), -(-(channels - start) // block), read, start, b])
    lists = Lists(torch.stack(orders).int(), torch.tensor(plans, dtype=torch.int32), torch.empty(0, dtype=torch.int8))
    width = panel_width(channels, dtype, True)
    with switched(**WAYS[way]), simulated("sm_90", 2) as chip:
        panel = chip.backend.kernels.gather_panel(x, gates, neuron, 3, None, lists, width)
    scale = gates[0].float()
    parts = [(orders[0][: plans[0][3]], scale), (orders[0][plans[0][4] :], 1 - scale)]
    assert same(panel[0], written(x[0].movedim(0, -1), parts, width))
    columns = (plans[1][1] + plans[1][2]) * block
    assert panel[1, ..., :columns].isnan().all(), "a sample without a neuron becomes NaN"


CASES = {
    "rows": (72, 0.5, 1),
    "ragged": (70, 0.4, 1),
    "all-spatial": (64, 1.0, 1),
    "all-temporal": (128, 0.0, 9),
    "a block more": (256, 0.3, 1),
    "few": (3, 0.5, 1),
    "several rounds": (512, 0.5, 1),
}


@dtypes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["channels-last", "channels-first", "strided"])
def test_route_and_gather(layout, case, way, dtype):
    """Choice, plan, scores, zeroed counters and panel on sm_90; NaN in one sample stays there."""
    channels, share, taps = CASES[case]
    neurons, block = 3, tile_channels(dtype)
    x = torch.randn(2, channels, *SIZE)
    x[1, channels // 2] = torch.nan
    x = LAYOUTS[layout](x.to(dtype))
    sums, scoring = torch.randn(2, 2, channels * taps), torch.randn(neurons, channels, taps)
    sums[1, 0, 0] = torch.nan
    counts = [round(channels * share), channels // 3 if 0 < share < 1 else round(channels * share)]
    counts.append(counts[0])
    orders = [
        torch.cat([part.sort()[0] for part in torch.randperm(channels).split([n, channels - n])]) for n in counts
    ]
    starts = torch.tensor([0, *counts]).cumsum(0)
    empty = torch.empty(0)
    weights = FrozenWeights(scoring, torch.stack(orders).int(), starts, empty, torch.empty(neurons, 4), None)
    neuron, scores = torch.full((2,), -7), torch.full((2, neurons), torch.nan)
    counters = torch.full((300,), 5, dtype=torch.int32)
    with switched(**WAYS[way]), simulated("sm_90", 2) as chip:
        panel, plan = chip.backend.kernels.route_and_gather(x, sums, weights, 7, neuron, scores, counters)
    gluon = way == "gluon" and layout == "channels-last" and channels * dtype.itemsize % 16 == 0
    assert (chip.accesses[0].kernel == "route_and_gather_rows_kernel") == gluon
    wanted = torch.einsum("bps,ns->bn", sums.double(), scoring.flatten(1).double()) / 7
    torch.testing.assert_close(scores, wanted.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert neuron.tolist() == scores.argmax(1).tolist() and not counters.any()
    for b, n in enumerate(neuron.tolist()):
        own, count = orders[n], counts[n]
        blocks = [[-(-m // block), -(-(channels - m) // block)] for m in counts]
        filters = sum(9 * spatial + 3 * temporal for spatial, temporal in blocks[:n])
        assert plan[b].tolist() == [filters, *blocks[n], count, count, n]
        parts = [(own[:count], None), (own[count:], None)]
        assert same(panel[b], written(x[b].movedim(0, -1), parts, panel.shape[-1]))
    assert not panel[0][..., :channels].isnan().any()


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
