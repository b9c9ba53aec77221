"""Fast convolution against float64 formulas: every instruction set, tile, layout and dtype, on poisoned scratch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels import FusedDSTS, functional
from dsts_kernels.backends import BACKENDS, cpu
from dsts_kernels.backends.convolution import SPATIAL, TEMPORAL
from dsts_kernels.backends.packing import Place, pack, unpack
from dsts_kernels.backends.passes import Epilogue
from dsts_kernels.backends.winograd import Operator, beside, tile_sizes
from dsts_kernels.testing import TOLERANCES, assert_close

from .support import _C
from .winograd_support import DTYPES, LAYOUTS, SHAPES, every_tile, formula, half_gate, laid, operators_of, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")


def run(
    x: Tensor, gate: Tensor, spatial: Tensor, temporal: Tensor, out: Tensor | None = None, x_samples=None, **finish
) -> Tensor:
    if out is None:
        out = torch.empty(x.shape[0], spatial.shape[0], *x.shape[2:], dtype=x.dtype)
    operators = operators_of(gate, (spatial, temporal))
    BACKENDS["cpu"].winograd(x, *operators, Epilogue(out, **finish), x_samples)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa, shape, layout):
    """Listed channels, scaled channels and one operator alone; the output in any layout, gaps left alone."""
    batch, channels, outputs, grid = shape
    x = laid(torch.randn(batch, channels, *grid), layout)
    spatial, temporal = weights(outputs, channels)
    gates = (half_gate(x), torch.rand(batch, channels), torch.ones(batch, channels), torch.zeros(batch, channels))
    for gate, out_layout in itertools.product(gates, LAYOUTS):
        out = laid(torch.full((batch, outputs, *grid), torch.nan), out_layout)
        assert_close(run(x, gate, spatial, temporal, out), formula(x, gate, spatial, temporal))
        if out_layout == "strided":
            assert torch.isnan(out._base).sum() == out._base.numel() - out.numel()


@every_tile
def test_every_tile(isa, tiles, monkeypatch):
    """Each tile gives the same convolution, also where it does not divide the size."""
    monkeypatch.setattr(cpu, "tile_sizes", lambda *sizes: tiles)
    x = torch.randn(1, 24, 5, 6, 7)
    spatial, temporal = weights(17, 24)
    gate = half_gate(x)
    assert_close(run(x, gate, spatial, temporal), formula(x, gate, spatial, temporal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32"])
def test_dtypes(isa, dtype, weight_dtype):
    """Half types are storage: what is computed is float32, rounded once at the end."""
    x = torch.randn(2, 40, 4, 9, 9).to(dtype)
    spatial, temporal = weights(33, 40, weight_dtype or dtype)
    gate = half_gate(x)
    ref = formula(x, gate, spatial, temporal)
    assert_close(run(x, gate, spatial, temporal), ref)
    wide = torch.empty(ref.shape)
    assert_close(run(x, gate, spatial, temporal, wide), ref, dtype=torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
def test_epilogue(isa, layout, relu):
    """Bias, ReLU, skip connection and tap sums; samples by index on both sides."""
    x = torch.randn(4, 20, 6, 7, 9)
    spatial, temporal = weights(40, 20)
    gate, bias = half_gate(x), torch.randn(40)
    skip = laid(torch.randn(3, 40, 6, 7, 9), layout)
    out = laid(torch.full(skip.shape, torch.nan), layout)
    come, go = torch.tensor([3, 0]), torch.tensor([1, 2])
    for taps in (1, 9):
        sums = torch.full((3, 40, taps), torch.nan)
        run(x, gate, spatial, temporal, out, come, samples=go, bias=bias, relu=relu, skip=skip, sums=sums)
        ref = formula(x[come], gate[come], spatial, temporal) + bias[:, None, None, None]
        ref = (ref.relu() if relu else ref) + skip[go].double()
        assert_close(out[go], ref)
        assert_close(sums[go], BACKENDS["eager"].tap_sums(out[go].double(), taps), dtype=torch.float32)
        assert torch.isnan(out[0]).all() and torch.isnan(sums[0]).all()


@pytest.mark.parametrize("kernel", [SPATIAL, TEMPORAL], ids=["spatial", "temporal"])
@pytest.mark.parametrize("listed", [False, True])
def test_data_gradient(isa, kernel, listed):
    """The transpose of each operator, for all its inputs or some."""
    grad = torch.randn(2, 37, 4, 6, 11)
    weight = weights(37, 50)[kernel == TEMPORAL]
    inputs = torch.randperm(50)[:21].int() if listed else None
    operator = Operator.data_gradient(weight, inputs, kernel)
    count = 50 if inputs is None else 21
    dx = torch.empty(2, count, 4, 6, 11)
    BACKENDS["cpu"].winograd(grad, *beside(operator, kernel), Epilogue(dx))
    padding = tuple(k // 2 for k in kernel)
    ref = F.conv_transpose3d(grad.double(), weight.double(), padding=padding)
    assert_close(dx, ref if inputs is None else ref[:, inputs.long()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(isa, dtype):
    """Packed filters give what live ones give, bit for bit, and unpack to what was packed."""
    x = torch.randn(1, 30, 3, 8, 8).to(dtype)
    spatial, temporal = weights(21, 30, dtype)
    gate = half_gate(x)
    flats, operators = [], []
    for weight, listed, taps in ((spatial, gate[0] == 1, 9), (temporal, gate[0] == 0, 3)):
        channels = listed.nonzero()[:, 0].int()
        panel = weight.flatten(2)[:, channels.long()].transpose(1, 2)
        flats.append(
            torch.cat([torch.full((32 * taps,), torch.nan, dtype=dtype), pack(panel, "blocked")])
        )  # not at the start
        operators.append(Operator.packed(flats[-1], Place(32 * taps, channels.numel()), channels, 0))
        assert torch.equal(unpack(flats[-1][32 * taps :], "blocked", 21, taps, channels.numel()), panel)
    out = torch.empty(1, 21, 3, 8, 8, dtype=dtype)
    BACKENDS["cpu"].winograd(x, *operators, Epilogue(out))
    assert torch.equal(out, run(x, gate, spatial, temporal))


@pytest.mark.parametrize(
    "shape", [(1, 64, 80, (8, 16, 16)), (5, 24, 16, (4, 14, 14)), (2, 300, 48, (3, 7, 7))], ids=str
)
def test_does_not_depend_on_threads(isa, shape):
    """1, 2, 3 and 5 threads: equal bit for bit, tap sums included."""
    batch, channels, outputs, grid = shape
    x = torch.randn(batch, channels, *grid)
    spatial, temporal = weights(outputs, channels)
    gate, results, before = half_gate(x), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            sums = torch.empty(batch, outputs, 9)
            results.append((run(x, gate, spatial, temporal, sums=sums), sums))
    finally:
        torch.set_num_threads(before)
    for out, sums in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(sums, results[0][1])


def test_batch_does_not_matter(isa):
    """A sample's result is the same bits alone and in a batch where the tiles are: only they change the arithmetic."""
    x = torch.randn(9, 48, 8, 16, 16)
    spatial, temporal = weights(32, 48)
    gate = half_gate(x)
    whole = run(x, gate, spatial, temporal)
    for sample in (0, 4, 8):
        assert torch.equal(whole[sample], run(x[sample : sample + 1], gate[:1], spatial, temporal)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_samples_stay_apart(isa, bad):
    """NaN and Inf reach no other sample, and in their own no further than tiles that meet them."""
    x = torch.randn(3, 20, 16, 16, 16)
    spatial, temporal = weights(18, 20)
    gate = half_gate(x)
    clean = run(x, gate, spatial, temporal)
    x[1, :, 3, 5, 5] = bad
    out = run(x, gate, spatial, temporal)
    touched = ~(out == clean).all(1)  # (B, T, H, W)
    assert not touched[[0, 2]].any()
    assert not out[1, :, 3, 5, 5].isfinite().any()
    assert not touched[1, 8:].any() and not touched[1, :, 12:].any() and not touched[1, :, :, 12:].any()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e4, 1e30])
def test_wide_range(isa, scale):
    """Denormal, tiny, large and huge inputs lose no more than the direct path may."""
    x = torch.randn(1, 64, 8, 8, 8)
    spatial, temporal = weights(32, 64)
    gate = half_gate(x)
    x = x * scale
    ref = formula(x, gate, spatial, temporal)
    factor = 1 if scale > 1e-35 else 1e3  # float32 ends at 1e-45, a hundred-thousandth of these
    assert_close(run(x, gate, spatial, temporal), ref, factor=factor)


def test_mixed_magnitudes(isa):
    """Frames of 1e4 beside frames of 1: the error is relative to what a tile sees, as its tolerance says."""
    x = torch.randn(1, 64, 8, 12, 12)
    x[:, :, ::2] *= 1e4
    spatial, temporal = weights(32, 64)
    gate = half_gate(x)
    assert_close(run(x, gate, spatial, temporal), formula(x, gate, spatial, temporal))


@pytest.mark.parametrize("grid", [(8, 16, 16), (16, 7, 7)], ids=str)
def test_error_at_full_width(grid):
    """The shapes of the paper: below 5e-6, half of what float32 is allowed."""
    x = torch.randn(1, 1024, *grid).relu()
    spatial, temporal = weights(32, 1024)
    gate = half_gate(x)
    factor = 5e-6 / TOLERANCES[torch.float32]
    assert_close(run(x, gate, spatial, temporal), formula(x, gate, spatial, temporal), factor=factor)


def test_tile_sizes():
    """A tile of 1 for a size of 1 only; large tiles where there is much to multiply, small ones where filters weigh."""
    assert tile_sizes(1, 8, 16, 16) == (8, 4, 4)
    assert tile_sizes(1, 16, 7, 7) == (8, 4, 4)
    assert tile_sizes(4, 12, 28, 56) == (4, 4, 4)
    assert tile_sizes(1, 8, 1, 1) == (2, 1, 1)
    assert tile_sizes(1, 1, 7, 7) == (1, 2, 2)
    assert tile_sizes(16, 2, 2, 1) == (2, 2, 1)


def test_bad_arguments():
    """Refused before anything is written, with the argument and what was wanted."""
    out = torch.full((1, 4, 2, 2, 2), torch.nan)
    one = Operator.forward(torch.randn(4, 4, 1, 3, 3), None, None, SPATIAL)

    def call(spatial=one, tiles=(2, 2, 2), dtype=torch.float32, out=out, threads=1) -> None:
        x = torch.randn(1, 4, 2, 2, 2).to(dtype)
        _C.winograd(x, None, spatial, None, Epilogue(out), tiles, threads, None)

    for arguments, message in (
        ({"spatial": None}, "no channels"),
        ({"tiles": (1, 2, 2)}, "a tile is 1 for a size of 2"),
        ({"tiles": (2, 8, 2)}, "a tile is 8"),
        ({"tiles": (3, 2, 2)}, "a tile is 3"),
        ({"tiles": (16, 2, 2)}, "a tile is 16"),
        ({"dtype": torch.float64}, "x has dtype float64; wanted float32 or a half type"),
        ({"threads": 0}, "threads is 0"),
        ({"out": torch.zeros(1, 4, 2, 2, 3)}, "out has W = 3; wanted 2"),
        ({"spatial": one._replace(channels=torch.arange(3, dtype=torch.int32))}, "channels has 3 channels; wanted 4"),
        ({"spatial": one._replace(scale=torch.zeros(1, 4).half())}, "scale has dtype float16; wanted float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    assert torch.isnan(out).all()
    call()
    assert out.isfinite().all()


def count_calls(monkeypatch):
    """Names of the passes that run, in order."""
    calls = []
    for name in ("winograd", "gather_panel", "epilogue", "_run_frozen"):
        original = getattr(cpu.CpuBackend, name)
        monkeypatch.setattr(
            cpu.CpuBackend,
            name,
            lambda self, *a, original=original, name=name, **k: calls.append(name) or original(self, *a, **k),
        )
    return calls


def test_forward_is_one_pass(monkeypatch):
    """A gated convolution and a frozen module write no panel: one native call a neuron, and one for all layers."""
    calls = count_calls(monkeypatch)
    x, gate = torch.randn(2, 16, 4, 4, 4), torch.rand(2, 16)
    spatial, temporal = weights(16, 16)
    functional.gated_conv3d(x, gate, torch.zeros(2, dtype=torch.int64), spatial[None], temporal[None])
    assert calls == ["winograd"]
    calls.clear()
    FusedDSTS(16, num_layers=2, num_neurons=1).eval().freeze()(x)
    assert calls == ["_run_frozen"]


def test_float64_stays_direct(monkeypatch):
    """What float32 arithmetic would ruin is left to the library."""
    calls = count_calls(monkeypatch)
    dsts = FusedDSTS(8, num_layers=1, num_neurons=1, dtype=torch.float64).eval()
    x = torch.randn(1, 8, 2, 4, 4, dtype=torch.float64)
    dsts(x), dsts.freeze()(x)
    assert "winograd" not in calls
