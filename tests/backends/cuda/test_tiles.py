"""Several tiles each way, whole waves, split tiles and idle CTAs: what the shared tests' small shapes do not reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.gpu.grids import Deal, PersistentGrid, deal
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.ops.frozen_layer import frozen_layer
from dsts_kernels.testing import TOLERANCES, assert_close, relative_error

from ...support.inputs import gated_inputs
from ...support.oracles import literal_gated, literal_gradients, literal_mixing, wide
from ...support.stand_ins import BACKEND, NAMES, check_gated, dtypes, emulated
from ...support.targets import INTERPRETED

if INTERPRETED:
    pytest.skip("these kernels are emulated, not interpreted: unset TRITON_INTERPRET", allow_module_level=True)
pytestmark = emulated
CHANNELS, OUTPUTS, SIZE = 140, 150, (3, 8, 9)  # 2 tiles along positions, 2 along outputs, none of them whole
CHIPS = (1, 2, 3, 5, 13)


def gates(batch: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Lists of very different lengths: both full, one full, the other, hard, few."""
    rows = [torch.full((channels,), 0.5), torch.ones(channels), torch.zeros(channels), (torch.rand(channels) < 0.5)]
    rows.append(torch.arange(channels) < 3)
    return torch.stack([rows[b % len(rows)].float() for b in range(batch)]).to(dtype)


def ragged(batch: int, dtype: torch.dtype, size: Sequence[int] = SIZE, channels: int = CHANNELS) -> list[Tensor]:
    neuron = [(5 * b + 2) % 3 for b in range(batch)]
    inputs = gated_inputs(batch, channels, OUTPUTS, size, dtype, neuron=neuron)
    inputs[1] = gates(batch, channels, dtype)
    return inputs


def k_blocks(gate: Tensor, dtype: torch.dtype) -> list[int]:
    """Of a tile of every sample: nine taps of those the spatial operator reads, three of the temporal one's."""
    block = tile_channels(dtype)
    read = [(int((row != 0).sum()), int((row != 1).sum())) for row in gate]
    return [9 * -(-spatial // block) + 3 * -(-temporal // block) for spatial, temporal in read]


def dealt(grid: PersistentGrid, steps: Sequence[int], per_sample: int) -> Deal:
    """How such a grid is dealt out."""
    assert grid.waves == grids.whole_waves(len(steps) * per_sample, grid.num_ctas)
    return deal(steps, per_sample, grid.num_ctas)


def same(runs: Iterable[Sequence[Tensor | None]]) -> bool:
    first, *others = runs
    return all(
        (a is None and b is None) or torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)
    )


@dtypes
def test_gated_on_any_chip(dtype, multiprocessors, launched, in_any_order):
    """The same to rounding however tiles are dealt, bit for bit in any order; all ways to deal them occur."""
    inputs, outputs, ways = ragged(5, dtype), {}, set()
    ref, steps = literal_gated(*wide(inputs)), k_blocks(inputs[1], dtype)
    for count in CHIPS:
        multiprocessors(count)
        outputs[count] = BACKEND.gated_conv3d(*inputs)
        assert_close(outputs[count], ref, name=f"{count} multiprocessors")
        share = dealt(launched[-1][1], steps, 4)
        ways |= {"waves"} if launched[-1][1].waves else set()
        ways |= {"whole"} if not share.parts else {"pair"} if share.parts_of_a_tile == 2 else {"many"}
    assert {form for form, _ in launched} == {"listed"}
    assert len({grid.num_ctas for _, grid in launched}) == len(CHIPS)
    assert ways >= {"waves", "many"}
    assert not same([[out] for out in outputs.values()]), "no tile was ever split"
    in_any_order()
    for count in (3, 13):
        multiprocessors(count)
        assert torch.equal(BACKEND.gated_conv3d(*inputs), outputs[count])


def test_ctas_without_work(multiprocessors, launched, in_any_order):
    """One tile with fewer K blocks than CTAs could take: the rest have nothing to do, and nobody waits for them."""
    inputs = gated_inputs(1, 40, 24, dtype=torch.float32, gate="all-temporal")
    multiprocessors(13)
    out = BACKEND.gated_conv3d(*inputs)
    share = dealt(launched[-1][1], k_blocks(inputs[1], torch.float32), 1)
    assert share.idle > 0 and share.longest == 6
    assert_close(out, literal_gated(*wide(inputs)))
    inputs[1] = torch.full_like(inputs[1], 0.5)  # two K blocks of all twelve taps: three CTAs a tile
    out = BACKEND.gated_conv3d(*inputs)
    share = dealt(launched[-1][1], [24], 1)
    assert share.parts_of_a_tile == 3
    assert_close(out, literal_gated(*wide(inputs)))
    in_any_order()
    assert torch.equal(BACKEND.gated_conv3d(*inputs), out)


def test_more_samples_than_ctas(multiprocessors, launched, in_any_order):
    """Many waves of short tiles, whose lengths differ, and a share of what they leave over."""
    inputs = ragged(23, torch.float32, (1, 3, 4), 40)
    multiprocessors(3)
    found = check_gated(inputs)
    assert launched[-1][1].waves == 23 * 2 // 3 - 1
    share = dealt(launched[-1][1], k_blocks(inputs[1], torch.float32), 2)
    assert share.parts > 0
    in_any_order()
    assert torch.equal(BACKEND.gated_conv3d(*inputs), found[0])


@dtypes
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)], ids=["both", "gate", "listed"])
def test_data_gradient(needs, dtype, in_any_order):
    """Ragged tiles of positions and channels; by lists, its columns are of one operator or of both."""
    inputs, (need_x, need_gate) = ragged(5, dtype), needs
    grad = torch.randn(5, OUTPUTS, *SIZE).to(dtype)
    arguments = (grad, *inputs, [need_x, need_gate, False, False])
    found = BACKEND.gated_conv3d_backward(*arguments)
    theirs = literal_gradients(literal_gated, inputs, grad)
    for name, need, mine, ref in zip(NAMES, (*needs, False, False), found, theirs, strict=True):
        assert (mine is not None) == need
        if need:
            assert_close(mine, ref, name=f"gradient of {name}", factor=2)
    in_any_order()
    assert same([found, BACKEND.gated_conv3d_backward(*arguments)])


@dtypes
def test_weight_gradient(dtype, in_any_order):
    """Ragged tiles of listed channels and outputs over a slot's samples, one list empty; zeros elsewhere."""
    inputs = ragged(4, dtype)
    inputs[2] = torch.tensor([0, 2, 0, 0])
    grad = torch.randn(4, OUTPUTS, *SIZE).to(dtype)
    arguments = (grad, *inputs, [False, False, True, True])
    found = BACKEND.gated_conv3d_backward(*arguments)
    for mine, ref in zip(found[2:], literal_gradients(literal_gated, inputs, grad)[2:], strict=True):
        assert_close(mine, ref, factor=2)
        assert mine[1].count_nonzero() == 0
    assert found[3][2].count_nonzero() == 0, "its one sample's gate is all spatial"
    in_any_order()
    assert same([found, BACKEND.gated_conv3d_backward(*arguments)])


@dtypes
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
def test_mixing(kernel, dtype, multiprocessors, launched, in_any_order):
    """Filters as stored and turned round, and their gradient, by one multiprocessor and by thirteen."""
    z, neuron = torch.randn(3, OUTPUTS, *SIZE).to(dtype), torch.tensor([3, 0, 3])
    mixing = (torch.randn(4, OUTPUTS, OUTPUTS, *kernel) / (OUTPUTS * sum(kernel)) ** 0.5).to(dtype)
    grad = torch.randn(z.shape).to(dtype)
    ref = [literal_mixing(*wide([z, neuron, mixing])), *literal_gradients(literal_mixing, [z, neuron, mixing], grad)]

    def run() -> list[Tensor]:
        backward = BACKEND.mixing_conv3d_backward(grad, z, neuron, mixing, [True, True])
        return [BACKEND.mixing_conv3d(z, neuron, mixing), *backward]

    for count in (1, 13):
        multiprocessors(count)
        found = run()
        for name, mine, theirs in zip(("output", "dz", "dmixing"), found, ref, strict=True):
            assert_close(mine, theirs, name=f"{name}, {count} multiprocessors", factor=2)
    assert found[2][[1, 2]].count_nonzero() == 0
    assert {form for form, _ in launched} == {"stored", "transposed"}
    assert launched[0][1].waves > launched[-1][1].waves
    in_any_order()
    assert same([found, run()])


SKIPS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "channels-first": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(
    "taps, kernel, count, dtype",
    [
        (1, (1, 1, 1), 1, torch.float32),
        (9, (1, 1, 1), 3, torch.float16),
        (1, (1, 1, 1), 13, torch.bfloat16),
        (9, (1, 1, 1), 13, torch.float32),
        (9, (3, 1, 1), 2, torch.float16),
        (1, (1, 3, 3), 5, torch.float32),
    ],
    ids=str,
)
def test_frozen_layer(taps, kernel, count, dtype, skip, multiprocessors, launched, in_any_order):
    """Packed filters, activation, skip in either memory format, and sums of whole and of split tiles."""
    dsts = FusedDSTS(CHANNELS, num_layers=1, num_neurons=3, mixing_kernel=kernel, backend="eager").eval().to(dtype)
    with torch.no_grad():
        dsts.layers[0].gate.normal_()[0] = -1  # that neuron's lists are one-sided
        dsts.layers[0].norm.bias.normal_()
    layer = dsts.freeze(backend=BACKEND.name).layers[0]
    x = SKIPS[skip](torch.randn(3, CHANNELS, *SIZE).to(dtype))
    multiprocessors(count)

    def run() -> tuple[Tensor, ...]:
        return frozen_layer(x, None, x, layer.weights(), layer.options(taps), backend=BACKEND.name)

    y, sums, *_ = found = run()
    assert_close(y, dsts.double()(x.double()), factor=2)
    assert_close(sums, BACKENDS["eager"].tap_sums(y.double(), taps), dtype=torch.float32)
    assert y.stride() == x.stride()
    assert [form for form, _ in launched] == (["packed"] if kernel == (1, 1, 1) else ["packed", "stored"])
    in_any_order()
    assert same([found, run()])


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_tf32(tf32, multiprocessors):
    """Where torch allows TF32 every product of float32 is one, before sm_80 exact."""
    multiprocessors(5)
    inputs, grad = ragged(3, torch.float32), torch.randn(3, OUTPUTS, *SIZE)
    z, mixing = grad, torch.randn(3, OUTPUTS, OUTPUTS, 1, 3, 3) / OUTPUTS
    neuron = inputs[2]
    found = [
        BACKEND.gated_conv3d(*inputs),
        *BACKEND.gated_conv3d_backward(grad, *inputs, [True] * 4),
        BACKEND.gated_conv3d_backward(grad, *inputs, [True, False, False, False])[0],
        BACKEND.mixing_conv3d(z, neuron, mixing),
        *BACKEND.mixing_conv3d_backward(grad, z, neuron, mixing, [True, True]),
    ]
    gradients = literal_gradients(literal_gated, inputs, grad)
    wanted = [literal_gated(*wide(inputs)), *gradients, gradients[0], literal_mixing(*wide([z, neuron, mixing]))]
    wanted += literal_gradients(literal_mixing, [z, neuron, mixing], grad)
    for mine, theirs in zip(found, wanted, strict=True):
        error = relative_error(mine, theirs)
        if BACKEND.arch >= 800:
            assert 2e-5 < error < TOLERANCES[torch.float16]
        else:
            assert error < 2 * TOLERANCES[torch.float32]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_stray_and_a_spoilt_sample(multiprocessors):
    """A neuron out of range makes its sample NaN, as NaN and Inf do theirs; no other, however tiles are shared."""
    inputs, grad = ragged(5, torch.float32), torch.randn(5, OUTPUTS, *SIZE)
    mixing, needs = torch.randn(3, OUTPUTS, OUTPUTS, 1, 1, 1) / OUTPUTS**0.5, [True, True, False, False]
    inputs[2] = torch.tensor([0, 7, 2, 1, 0])
    for count in (1, 13):
        multiprocessors(count)
        runs = []
        for spoilt in (False, True):
            x, own = inputs[0].clone(), grad.clone()
            if spoilt:
                x[3, 1, 2, 7, 8], own[3, -1, 0] = torch.nan, torch.inf
            out = BACKEND.gated_conv3d(x, *inputs[1:])
            gradients = BACKEND.gated_conv3d_backward(own, x, *inputs[1:], needs)[:2]
            runs.append([out, *gradients, BACKEND.mixing_conv3d(own, inputs[2], mixing)])
        for clean, spoilt in zip(*runs, strict=True):
            assert clean[1].isnan().all() and spoilt[1].isnan().all()
            assert clean[[0, 2, 3, 4]].isfinite().all() and not spoilt[3].isfinite().all()
            assert torch.equal(clean[[0, 2, 4]], spoilt[[0, 2, 4]])
