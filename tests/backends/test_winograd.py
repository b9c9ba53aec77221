"""Fast convolution against float64 formulas: every instruction set, tile, layout and dtype, on poisoned scratch."""

from __future__ import annotations

import ctypes
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels import FusedDSTS, functional
from dsts_kernels.backends import BACKENDS, cpu
from dsts_kernels.backends.build import _C, build_details, build_record
from dsts_kernels.backends.convolution import SPATIAL, TEMPORAL
from dsts_kernels.backends.packing import Place, pack, unpack
from dsts_kernels.backends.winograd import TEMPORAL_TILES, TILES, Operator, tile_sizes
from dsts_kernels.testing import TOLERANCES, assert_close, poisoned_memory

if _C is None:
    assert build_record()[0] == "none", build_details()  # a build that does not import fails, it is not skipped
    pytest.skip("built without native kernels", allow_module_level=True)

M_PERTURB = -6  # glibc: fill allocated memory with the complement of a byte; 0x7f7f7f7f is 3.4e38 as a float
SHAPES = [
    (2, 33, 47, (3, 5, 7)),
    (1, 16, 16, (1, 1, 1)),
    (3, 70, 20, (4, 14, 2)),
    (1, 5, 130, (16, 7, 9)),
    (2, 20, 24, (2, 2, 28)),
    (1, 40, 33, (8, 17, 1)),
    (1, 3, 1, (9, 1, 18)),
    (1, 150, 70, (8, 16, 16)),  # two slices of channels, two tasks of outputs
]
LAYOUTS = ("contiguous", "channels_last", "strided")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


@pytest.fixture(autouse=True)
def poisoned_scratch():
    perturb = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if perturb is not None:
        perturb(M_PERTURB, 0x80)
    with poisoned_memory():
        yield
    if perturb is not None:
        perturb(M_PERTURB, 0)


def laid(x, layout):
    """The same features in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "strided":
        b, c, t, h, w = x.shape
        return x.new_full((b, c + 1, t, w + 2, h * 2), torch.nan)[:, 1:, :, 1:-1, ::2].transpose(3, 4).copy_(x)
    return x.contiguous()


def formula(x, gate, spatial, temporal):
    """The row "specialise" of section 1, one neuron, in float64."""
    x, g = x.double(), gate.double()[:, :, None, None, None]
    kept, rest = torch.where(g == 0, 0, g * x), torch.where(g == 1, 0, (1 - g) * x)
    return F.conv3d(kept, spatial.double(), padding=(0, 1, 1)) + F.conv3d(rest, temporal.double(), padding=(1, 0, 0))


def weights(outputs, channels, dtype=torch.float32):
    spatial = torch.randn(outputs, channels, 1, 3, 3) / (9 * channels) ** 0.5
    temporal = torch.randn(outputs, channels, 3, 1, 1) / (3 * channels) ** 0.5
    return spatial.to(dtype), temporal.to(dtype)


def run(x, gate, spatial, temporal, out=None, **finish):
    """Both operators on live weights: hard gates as lists of channels, soft gates as scales."""
    hard = bool(((gate == 0) | (gate == 1)).all())
    lists = [own.nonzero()[:, 0].int() for own in (gate[0] == 1, gate[0] == 0)] if hard else [None, None]
    operators = [
        None if own is not None and not own.numel() else Operator.forward(weight, own, None if hard else gate, kernel)
        for weight, own, kernel in zip((spatial, temporal), lists, (SPATIAL, TEMPORAL), strict=True)
    ]
    if out is None:
        out = torch.empty(x.shape[0], spatial.shape[0], *x.shape[2:], dtype=x.dtype)
    BACKENDS["cpu"].winograd(x, *operators, out, **finish)
    return out


def half_gate(x, share=0.5):
    """One gate for all samples, some of it open: at least a channel on each side where there are two."""
    gate = (torch.rand(x.shape[1]) < share).to(x.dtype)
    gate[0] = 1
    gate[-1:] = 0 if len(gate) > 1 else 1
    return gate.expand(x.shape[0], -1).contiguous()


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


@pytest.mark.parametrize("tiles", [t for t in itertools.product(TEMPORAL_TILES, TILES, TILES) if 1 not in t], ids=str)
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
def test_finish(isa, layout, relu):
    """Bias, ReLU, skip connection and tap sums; samples by index on both sides."""
    x = torch.randn(4, 20, 6, 7, 9)
    spatial, temporal = weights(40, 20)
    gate, bias = half_gate(x), torch.randn(40)
    skip = laid(torch.randn(3, 40, 6, 7, 9), layout)
    out = laid(torch.full(skip.shape, torch.nan), layout)
    come, go = torch.tensor([3, 0]), torch.tensor([1, 2])
    for taps in (1, 9):
        sums = torch.full((3, 40, taps), torch.nan)
        finish = {"bias": bias, "relu": relu, "skip": skip, "sums": sums, "x_samples": come, "samples": go}
        run(x, gate, spatial, temporal, out, **finish)
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
    operator = Operator.data_gradient(weight, inputs)
    count = 50 if inputs is None else 21
    dx = torch.empty(2, count, 4, 6, 11)
    BACKENDS["cpu"].winograd(grad, *((operator, None) if kernel == SPATIAL else (None, operator)), dx)
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
    for weight, own, taps in ((spatial, gate[0] == 1, 9), (temporal, gate[0] == 0, 3)):
        channels = own.nonzero()[:, 0].int()
        panel = weight.flatten(2)[:, channels.long()].transpose(1, 2)
        flats.append(
            torch.cat([torch.full((32 * taps,), torch.nan, dtype=dtype), pack(panel, "blocked")])
        )  # not at the start
        operators.append(Operator.packed(flats[-1], Place(32 * taps, channels.numel()), channels, 0))
        assert torch.equal(unpack(flats[-1][32 * taps :], "blocked", 21, taps, channels.numel()), panel)
    out = torch.empty(1, 21, 3, 8, 8, dtype=dtype)
    BACKENDS["cpu"].winograd(x, *operators, out)
    assert torch.equal(out, run(x, gate, spatial, temporal))


@pytest.mark.parametrize(
    "shape", [(1, 64, 80, (8, 16, 16)), (5, 24, 16, (4, 14, 14)), (2, 300, 48, (3, 7, 7))], ids=str
)
def test_does_not_depend_on_threads(isa, shape):
    """1, 2, 3 and 5 threads: equal bit for bit, tap sums included."""
    batch, channels, outputs, grid = shape
    x = torch.randn(batch, channels, *grid)
    spatial, temporal = weights(outputs, channels)
    gate, found, before = half_gate(x), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            sums = torch.empty(batch, outputs, 9)
            found.append((run(x, gate, spatial, temporal, sums=sums), sums))
    finally:
        torch.set_num_threads(before)
    for out, sums in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(sums, found[0][1])


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
    none = (0,) * 12
    one = Operator.forward(torch.randn(4, 4, 1, 3, 3), None, None, SPATIAL)

    def call(spatial=one, tiles=(2, 2, 2), dtype=0, threads=1):
        x = torch.randn(1, 4, 2, 2, 2)
        spatial = none if spatial is None else cpu._operator(spatial)
        address = (x.data_ptr(), x.stride(), 0, spatial, none, tiles, 0, 0, 0, (0,) * 5, out.data_ptr(), out.stride())
        _C.winograd(*address, 0, 1, 0, 1, 4, (2, 2, 2), dtype, dtype, dtype, threads, 0)

    for arguments, message in (
        ({"spatial": None}, "no channels"),
        ({"tiles": (1, 2, 2)}, "a tile is 1 for a size of 2"),
        ({"tiles": (2, 8, 2)}, "a tile is 8"),
        ({"dtype": 1}, "float64"),
        ({"threads": 0}, "threads is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    assert torch.isnan(out).all()
    call()
    assert out.isfinite().all()


def count_calls(monkeypatch):
    """Names of the passes that run, in order."""
    calls = []
    for name in ("winograd", "gather_panel", "epilogue"):
        original = getattr(cpu.CpuBackend, name)
        monkeypatch.setattr(
            cpu.CpuBackend,
            name,
            lambda self, *a, original=original, name=name, **k: calls.append(name) or original(self, *a, **k),
        )
    return calls


def test_forward_is_one_pass(monkeypatch):
    """A gated convolution and a frozen layer write no panel: one native call a neuron."""
    calls = count_calls(monkeypatch)
    x, gate = torch.randn(2, 16, 4, 4, 4), torch.rand(2, 16)
    spatial, temporal = weights(16, 16)
    functional.gated_conv3d(x, gate, torch.zeros(2, dtype=torch.int64), spatial[None], temporal[None])
    assert calls == ["winograd"]
    calls.clear()
    FusedDSTS(16, num_layers=2, num_neurons=1).eval().freeze()(x)
    assert calls == ["winograd"] * 2


def test_float64_stays_direct(monkeypatch):
    """What float32 arithmetic would ruin is left to the library."""
    calls = count_calls(monkeypatch)
    dsts = FusedDSTS(8, num_layers=1, num_neurons=1, dtype=torch.float64).eval()
    x = torch.randn(1, 8, 2, 4, 4, dtype=torch.float64)
    dsts(x), dsts.freeze()(x)
    assert "winograd" not in calls


def filter_formula(x, grad, gate, shapes):
    """Gradients of both filters by autograd on the formula, in float64."""
    filters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return torch.autograd.grad(formula(x, gate, *filters), filters, grad.double())


def filter_gradients(x, grad, gate, shapes, dtype=torch.float32, add=None, **options):
    """Both gradients; hard gates write their listed channels only. ``add``: what to start from."""
    found = [torch.full(shape, torch.nan, dtype=dtype) for shape in shapes] if add is None else add
    hard = bool(((gate == 0) | (gate == 1)).all())
    lists = [own.nonzero()[:, 0].int() for own in (gate[0] == 1, gate[0] == 0)] if hard else [None, None]
    operators = [
        None if own is not None and not own.numel() else Operator.forward(total, own, None if hard else gate, kernel)
        for total, own, kernel in zip(found, lists, (SPATIAL, TEMPORAL), strict=True)
    ]
    BACKENDS["cpu"].winograd_gradient(x, grad, *operators, add=add is not None, **options)
    return found, lists


def shapes_of(outputs, channels):
    return (outputs, channels, 1, 3, 3), (outputs, channels, 3, 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filter_gradient(isa, shape, layout):
    """Listed channels (the others left alone) and scaled channels, in any layout; then added to what is there."""
    batch, channels, outputs, grid = shape
    x, grad = (laid(torch.randn(batch, c, *grid), layout) for c in (channels, outputs))
    sizes = shapes_of(outputs, channels)
    for gate in (half_gate(x), torch.rand(batch, channels), torch.ones(batch, channels)):
        refs = filter_formula(x, grad, gate, sizes)
        found, lists = filter_gradients(x, grad, gate, sizes)
        for mine, ref, own in zip(found, refs, lists, strict=True):
            written = torch.ones(channels, dtype=torch.bool) if own is None else torch.zeros(channels) == 1
            if own is not None:
                written[own.long()] = True
            if written.any():
                assert_close(mine[:, written], ref[:, written])
            assert torch.isnan(mine[:, ~written]).all()
        start = [torch.randn_like(mine) for mine in found]
        added, _ = filter_gradients(x, grad, gate, sizes, add=[s.clone() for s in start])
        for mine, before, ref in zip(added, start, refs, strict=True):
            assert_close(mine, before.double() + ref)


@pytest.mark.parametrize("tiles", [t for t in itertools.product(TEMPORAL_TILES, TILES, TILES) if 1 not in t], ids=str)
def test_filter_gradient_of_every_tile(isa, tiles, monkeypatch):
    """Each tile gives the same gradient, also where it does not divide the size."""
    monkeypatch.setattr(cpu, "tile_sizes", lambda *sizes: tiles)
    x, grad, gate = torch.randn(1, 24, 5, 6, 7), torch.randn(1, 17, 5, 6, 7), torch.rand(1, 24)
    found, _ = filter_gradients(x, grad, gate, shapes_of(17, 24))
    for mine, ref in zip(found, filter_formula(x, grad, gate, shapes_of(17, 24)), strict=True):
        assert_close(mine, ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filter_gradient_dtypes(isa, dtype):
    """Half features and gradients; the result in their dtype or in float32."""
    x, grad = torch.randn(3, 20, 4, 9, 9).to(dtype), torch.randn(3, 18, 4, 9, 9).to(dtype)
    gate, samples = torch.rand(3, 20).to(dtype), torch.tensor([2, 0])
    refs = filter_formula(x[samples], grad[samples], gate[samples], shapes_of(18, 20))
    for result in (dtype, torch.float32):
        found, _ = filter_gradients(x, grad, gate, shapes_of(18, 20), result, samples=samples)
        for mine, ref in zip(found, refs, strict=True):
            # In half precision 1 - gate is rounded before it multiplies.
            assert_close(mine, ref, dtype=dtype)


def test_filter_gradient_does_not_depend_on_threads(isa):
    """1, 2, 3 and 5 threads: equal bit for bit, over several chunks."""
    x, grad = torch.randn(6, 40, 8, 16, 16), torch.randn(6, 96, 8, 16, 16)
    gate, results, before = half_gate(x), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            zeros = [torch.zeros(shape) for shape in shapes_of(96, 40)]
            results.append(filter_gradients(x, grad, gate, shapes_of(96, 40), add=zeros)[0])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_filter_gradient_at_full_width():
    """The shapes of the paper: within what float32 is allowed."""
    x, grad, gate = torch.randn(1, 1024, 8, 16, 16).relu(), torch.randn(1, 32, 8, 16, 16), torch.rand(1, 1024)
    found, _ = filter_gradients(x, grad, gate, shapes_of(32, 1024))
    for mine, ref in zip(found, filter_formula(x, grad, gate, shapes_of(32, 1024)), strict=True):
        assert_close(mine, ref)
