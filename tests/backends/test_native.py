"""The native CPU kernels against float64 formulas, straight through ``dsts_kernels._C``: every instruction
set this machine can run, every dtype, odd sizes, any stride order, NaN-poisoned outputs, and 1, 2 and 3
threads bit for bit. One file for five small ops, hence its length: they share the layouts and the checks.
"""

import importlib
import itertools

import pytest
import torch

from dsts_kernels.backends.build import build_record

try:
    _C = importlib.import_module("dsts_kernels._C")
except ImportError as error:
    if build_record()[0] != "none":  # a build that does not import fails, it is not skipped
        raise
    pytest.skip(f"built without native kernels ({build_record()[1]}): {error}", allow_module_level=True)

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LAYOUTS = ("contiguous", "channels_last", "frames_first", "strided", "expanded")
SHAPES = [
    (2, 33, 3, 5, 7),
    (3, 17, 1, 1, 6),
    (1, 7, 4, 6, 1),
    (2, 1, 2, 1, 1),
    (0, 7, 2, 3, 3),
    (2, 70, 8, 16, 16),
]
dtypes = pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture(params=_C.supported_isas(), autouse=True)
def isa(request):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny, and torch's threads would compete with the kernels'
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")
    torch.set_num_threads(threads)


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape, dtype, layout="contiguous"):
    """A tensor of NaN in the given memory layout; "strided" leaves gaps that must stay NaN."""
    B, C, T, H, W = shape
    if layout == "channels_last":
        return torch.full((B, T, H, W, C), torch.nan, dtype=dtype).permute(0, 4, 1, 2, 3)
    if layout == "frames_first":
        return torch.full((B, T, C, H, W), torch.nan, dtype=dtype).transpose(1, 2)
    if layout == "strided":
        return torch.full((B, C + 1, T, W + 2, H * 2), torch.nan, dtype=dtype)[:, 1:, :, 1:-1, ::2].transpose(3, 4)
    return torch.full(shape, torch.nan, dtype=dtype)


def filled(shape, dtype, layout="contiguous"):
    if layout == "expanded":
        return torch.randn(shape[0], shape[1], 1, shape[3], 1, dtype=dtype).expand(shape)
    return empty(shape, dtype, layout).copy_(torch.randn(shape, dtype=torch.float64))


def ptr(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def strides(tensor):
    return (0,) * 5 if tensor is None else tensor.stride()


def check(out, ref, dtype, factor=1.0):
    """||out - ref|| / ||ref|| within the dtype's tolerance; a NaN or Inf anywhere fails."""
    assert out.isfinite().all()
    error = (out.double() - ref).norm() / ref.norm().clamp_min(1e-30)
    assert not ref.numel() or error <= factor * TOLERANCES[dtype], f"relative error {error:.2e}"


def bits(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def check_threads(run):
    """run(threads) gives tensors: equal bit for bit for 1, 2 and 3 threads. Returns the first."""
    first = run(1)
    for threads in (2, 3):
        for a, b in zip(first, run(threads), strict=True):
            assert torch.equal(bits(a), bits(b))
    return first


def tap_sums_ref(x, taps):
    x = x.double()
    if taps == 1:
        return x.sum((2, 3, 4))[..., None]
    H, W = x.shape[3:]
    rows = [slice(0, H - 1), slice(0, H), slice(1, H)]
    cols = [slice(0, W - 1), slice(0, W), slice(1, W)]
    return torch.stack([x[..., i, j].sum((2, 3, 4)) for i in rows for j in cols], -1)


# SemHash


def semhash_forward(logits, neuron, noise, hard, B, threads=1):
    N, C = logits.shape
    gate = torch.full((B, C), torch.nan, dtype=logits.dtype)
    _C.semhash_forward(
        ptr(logits), ptr(neuron), ptr(noise), ptr(hard), ptr(gate), B, N, C, CODES[logits.dtype], threads
    )
    return gate


def semhash_backward(grad, logits, neuron, noise, threads=1):
    (B, C), N = grad.shape, len(logits)
    out = torch.full((N, C), torch.nan, dtype=logits.dtype)
    _C.semhash_backward(
        ptr(grad), ptr(logits), ptr(neuron), ptr(noise), ptr(out), B, N, C, CODES[logits.dtype], threads
    )
    return out


def soft_ref(q):
    return (1.2 * q.sigmoid() - 0.1).clamp(0, 1)


@dtypes
@pytest.mark.parametrize("C", [1, 7, 17, 33, 1024])
@pytest.mark.parametrize("B", [0, 1, 40])
def test_semhash_values(dtype, C, B):
    """Soft and hard gates, forward and backward, follow the formulas for every dtype and width."""
    N = 5
    logits, noise, grad = (torch.randn(n, C, dtype=torch.float64).mul(2).to(dtype) for n in (N, B, B))
    neuron, hard = torch.randint(0, N - 1, (B,)), torch.arange(B) % 2 == 0
    q = logits.double()[neuron] + noise.double()
    gate = check_threads(lambda k: [semhash_forward(logits, neuron, noise, hard, B, k)])[0]
    check(gate, torch.where(hard[:, None], (q > 0).double(), soft_ref(q)), dtype)
    s = q.sigmoid()
    slope = torch.where((soft_ref(q) > 0) & (soft_ref(q) < 1), 1.2 * s * (1 - s), 0.0)
    ref = torch.zeros(N, C, dtype=torch.float64).index_add_(0, neuron, grad.double() * slope)
    dlogits = check_threads(lambda k: [semhash_backward(grad, logits, neuron, noise, k)])[0]
    check(dlogits, ref, dtype, 4)
    assert not dlogits[N - 1].any()


def test_semhash_defaults():
    """Null neuron, noise and hard mean: own row, no noise, every sample hard; q == 0 closes the gate."""
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, -0.0]])
    assert torch.equal(semhash_forward(logits, None, None, None, 2), (logits > 0).float())
    soft = semhash_forward(logits, None, None, torch.zeros(2, dtype=torch.bool), 2)
    check(soft, soft_ref(logits.double()), torch.float32)


def test_semhash_extremes():
    """Infinite, huge and NaN logits: exact 0 and 1 when saturated, soft NaN stays NaN, hard NaN is 0."""
    logits = torch.tensor([[torch.inf, -torch.inf, 200.0, -200.0, torch.nan]])
    soft = semhash_forward(logits, None, None, torch.zeros(1, dtype=torch.bool), 1)
    assert soft[0, :4].tolist() == [1, 0, 1, 0] and soft[0, 4].isnan()
    assert semhash_forward(logits, None, None, None, 1).tolist() == [[1, 0, 1, 0, 0]]


def test_semhash_backward_isolates():
    """A NaN gradient stays in its neuron's row, and a saturated gate passes nothing, not even 0 * Inf."""
    logits = torch.tensor([[0.0, 9.0], [0.0, 0.0], [0.0, 0.0]])
    grad = torch.tensor([[1.0, torch.inf], [torch.nan, torch.nan]])
    out = semhash_backward(grad, logits, torch.tensor([0, 1]), None)
    assert out[0].tolist() == pytest.approx([0.3, 0.0]) and out[1].isnan().all() and not out[2].any()


def test_semhash_bad_neuron():
    """A neuron index out of range raises before anything is written."""
    logits, gate = torch.zeros(2, 3), torch.full((2, 3), 7.0)
    for bad in (-1, 2):
        neuron = torch.tensor([0, bad])
        with pytest.raises(IndexError, match="neuron index"):
            _C.semhash_forward(ptr(logits), ptr(neuron), 0, 0, ptr(gate), 2, 2, 3, 0, 1)
        with pytest.raises(IndexError, match="neuron index"):
            _C.semhash_backward(ptr(logits), ptr(logits), ptr(neuron), 0, ptr(gate), 2, 2, 3, 0, 1)
    assert (gate == 7).all()


# Tap sums


def tap_sums(x, taps, threads=1):
    out = torch.full((*x.shape[:2], taps), torch.nan, dtype=acc(x.dtype))
    _C.tap_sums(ptr(x), strides(x), ptr(out), *x.shape, taps, CODES[x.dtype], threads)
    return out


@dtypes
@shapes
@layouts
@pytest.mark.parametrize("taps", [1, 9])
def test_tap_sums_values(dtype, shape, layout, taps):
    """Both tap counts in every layout, H or W of 1 included, against slices summed in float64."""
    x = filled(shape, dtype, layout)
    out = check_threads(lambda k: [tap_sums(x, taps, k)])[0]
    check(out, tap_sums_ref(x, taps), acc(dtype), 4)  # random signs cancel: the sum is small beside its terms


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tap_sums_accuracy(taps, layout):
    """A long sum of positive numbers keeps float32 accuracy: partial sums, never one running total."""
    x = filled((1, 2, 20, 80, 100), torch.float32, layout).abs_()
    check(tap_sums(x, taps), tap_sums_ref(x, taps), torch.float32)


def test_tap_sums_no_cancellation():
    """A huge edge row does not disturb the taps that do not see it: nothing is computed by subtraction."""
    for layout in ("contiguous", "channels_last"):
        x = filled((1, 3, 2, 5, 5), torch.float32, layout)
        x[:, :, :, 0, :] = 1e12
        check(tap_sums(x, 9)[..., 6:], tap_sums_ref(x, 9)[..., 6:], torch.float32)


def test_tap_sums_wide_rows():
    """A row longer than the plane buffer takes the other way and is right too."""
    x = filled((1, 2, 2, 3, 5000), torch.float32)
    check(tap_sums(x, 9), tap_sums_ref(x, 9), torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_tap_sums_isolates(layout):
    """NaN and Inf of one sample and channel stay there."""
    x = filled((3, 9, 2, 4, 4), torch.float32, layout)
    x[1, 2, 1, 1, 1], x[1, 4, 0, 2, 3] = torch.nan, torch.inf
    bad = ~tap_sums(x, 9).isfinite().all(-1)
    assert bad.nonzero().tolist() == [[1, 2], [1, 4]]


# Gather


def gather(src, samples, channels, scale, complement, out, threads=1):
    nb, width, T, H, W = out.shape
    nc = src.shape[1] if channels is None else len(channels)
    stride_b = 0 if scale is None or scale.dim() == 1 else scale.stride(0)
    _C.gather_panel(
        ptr(src), strides(src), ptr(samples), nb, ptr(channels), nc, ptr(scale), stride_b, complement,
        ptr(out), strides(out), width, T, H, W, CODES[src.dtype], CODES[out.dtype], threads,
    )  # fmt: skip
    return out


def gather_ref(src, samples, channels, scale, complement, width):
    ref = src.double()
    if scale is not None:
        s = 1 - scale.double() if complement else scale.double()
        ref = ref * s.expand(src.shape[:2])[..., None, None, None]
    ref = ref[samples] if samples is not None else ref
    ref = ref[:, channels.long()] if channels is not None else ref
    zeros = ref.new_zeros(len(ref), width - ref.shape[1], *ref.shape[2:])
    return torch.cat([ref, zeros], 1)


PAIRS = [(d, d) for d in CODES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))

LARGE = (1, 530, 2, 9, 16)  # over one tile of channels, one row piece, one chunk of positions


def shapes_of(pair):
    """Small shapes for every dtype pair; tiling is the same for all, so the large one for float32 only."""
    return SHAPES[:5] + [LARGE] * (pair == (torch.float32, torch.float32))


def some_channels(C, n):
    """n distinct channels: ascending as a gate gives them, or in any order for the even widths."""
    channels = torch.randperm(C)[:n]
    return channels if C % 2 == 0 and C != LARGE[1] else channels.sort().values


def layout_pairs(sources):
    """Every source layout with two output layouts, and every output layout at least twice."""
    return [(s, LAYOUTS[(i + k) % 4]) for i, s in enumerate(sources) for k in (0, 1)]


@pairs
@pytest.mark.parametrize(("src_layout", "out_layout"), layout_pairs(LAYOUTS))
def test_gather_values(pair, src_layout, out_layout):
    """Every pair of layouts and dtypes: copies bit for bit, scaled, complemented, padded with zeros."""
    dtype, out_dtype = pair
    for shape in shapes_of(pair):
        B, C, *rest = shape
        src = filled(shape, dtype, src_layout)
        channels = some_channels(C, (C + 1) // 2).int()
        samples = torch.tensor([B - 1, 0, B - 1]) if B else torch.zeros(0, dtype=torch.int64)
        scale = torch.rand(B, C, dtype=torch.float64).to(dtype)
        listed = len(channels)
        for width, chosen, by, complement in [
            (C + 3, None, None, False), (listed, channels, scale, False), (listed + 5, channels, scale, True)
        ]:  # fmt: skip
            full = (len(samples), width, *rest)

            def run(threads):
                out = empty(full, out_dtype, out_layout)
                return [gather(src, samples, chosen, by, complement, out, threads)]

            out = check_threads(run)[0]
            ref = gather_ref(src, samples, chosen, by, complement, width)
            if by is None:
                assert torch.equal(out.double(), ref)
            else:
                check(out, ref, dtype if dtype == out_dtype else torch.float32)


@dtypes
@pytest.mark.parametrize("taps", [(1, 3, 3), (3, 1, 1)], ids=["spatial", "temporal"])
def test_gather_weights(dtype, taps):
    """Weights (O, C, taps) gathered to (O, taps, C'): output channels as the batch, taps as positions."""
    weights = filled((70, 200, *taps), dtype)
    channels = torch.arange(0, 200, 3, dtype=torch.int32)
    out = check_threads(
        lambda k: [gather(weights, None, channels, None, False, empty((70, 72, *taps), dtype, "channels_last"), k)]
    )
    assert torch.equal(out[0].double(), gather_ref(weights, None, channels, None, False, 72))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gather_keeps_payload(layout):
    """An unscaled bfloat16 copy keeps every bit pattern, NaN payloads included."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(1, 64, 4, 16, 16)
    out = gather(bits, None, None, None, False, empty(bits.shape, torch.bfloat16, layout))
    assert torch.equal(out.contiguous().view(torch.uint16).int(), bits.view(torch.uint16).int())


def test_half_conversions():
    """All 65536 float16 and bfloat16 values load exactly, and rounding back and scaled agrees with torch."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, 64, 4, 16, 16)
        wide = gather(x, None, None, None, False, empty(x.shape, torch.float32))
        torch.testing.assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)
        scale = torch.linspace(0.3, 1.7, 64).to(dtype)
        out = gather(x, None, None, scale, False, empty(x.shape, dtype))
        ref = (x.float() * scale.float().view(1, 64, 1, 1, 1)).to(dtype)
        torch.testing.assert_close(out, ref, rtol=0, atol=0, equal_nan=True)


# Epilogue


def panel(t):
    """(B, C, T, H, W) as a dense channels-last panel (B, T, H, W, C); None stays None."""
    return None if t is None else t.permute(0, 2, 3, 4, 1).contiguous()


def epilogue(zs, zt, bias, relu, skip, out, samples, sums, taps, shape, in_dtype, threads=1):
    nb, O, T, H, W = shape
    stride_b = 0 if bias is None or bias.dim() == 1 else bias.stride(0)
    _C.epilogue(
        ptr(zs), ptr(zt), ptr(bias), stride_b, relu, ptr(skip), strides(skip), ptr(out), strides(out),
        ptr(samples), nb, ptr(sums), taps, O, T, H, W, CODES[in_dtype], CODES[out.dtype], threads,
    )  # fmt: skip


@pairs
@pytest.mark.parametrize(("skip_layout", "out_layout"), layout_pairs([*LAYOUTS, None]))
def test_epilogue_values(pair, skip_layout, out_layout):
    """Every dtype pair, layout of out and skip, and operand left out; tap sums are of what is stored."""
    dtype, in_dtype = pair
    for (nb, O, *rest), taps in itertools.product(shapes_of(pair), (1, 9)):
        shape, full = (nb, O, *rest), (nb + 2, O, *rest)
        zs, zt = (torch.randn(shape, dtype=torch.float64).to(in_dtype) for _ in range(2))
        zt = zt if taps == 9 else None
        bias = torch.randn(full[:2] if taps == 9 else O, dtype=acc(dtype))
        skip = None if skip_layout is None else filled(full, dtype, skip_layout)
        samples = torch.randperm(nb + 2)[:nb]

        def run(threads):
            out = empty(full, dtype, out_layout)
            sums = torch.full((nb + 2, O, taps), torch.nan, dtype=acc(dtype))
            z = panel(zs), panel(zt)
            epilogue(*z, bias, taps == 9, skip, out, samples, sums, taps, shape, in_dtype, threads)
            return out, sums

        out, sums = check_threads(run)
        ref = zs.double() + (0 if zt is None else zt.double())
        ref = ref + bias.double().expand(full[:2])[samples][..., None, None, None]
        ref = ref.relu() if taps == 9 else ref
        ref = ref + (0 if skip is None else skip[samples].double())
        check(out[samples], ref, dtype)
        check(sums[samples], tap_sums_ref(out[samples], taps), acc(dtype), 2)
        others = [b for b in range(nb + 2) if b not in samples]
        assert out[others].isnan().all() and sums[others].isnan().all()


def test_epilogue_in_place():
    """out may be the spatial panel itself."""
    zs, zt = torch.randn(2, 3, 5, 5, 70), torch.randn(2, 3, 5, 5, 70)
    ref = (zs.double() + zt).relu()
    out = zs.permute(0, 4, 1, 2, 3)
    epilogue(zs, zt, None, True, None, out, None, None, 1, out.shape, torch.float32)
    check(zs, ref, torch.float32)


def test_epilogue_without_panels():
    """Both panels null: the bias alone is written everywhere."""
    bias, out = torch.randn(7), empty((2, 7, 2, 3, 3), torch.float32)
    epilogue(None, None, bias, False, None, out, None, None, 1, out.shape, torch.float32)
    assert torch.equal(out, bias.view(1, 7, 1, 1, 1).expand_as(out))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_epilogue_isolates(layout):
    """NaN passes the ReLU and stays in its sample and channel, in the output and in the sums."""
    z = torch.randn(3, 9, 2, 4, 4)
    z[1, 2, 0, 3, 3] = torch.nan
    out, sums = empty(z.shape, z.dtype, layout), torch.full((3, 9, 9), torch.nan)
    epilogue(panel(z), None, None, True, None, out, None, sums, 9, z.shape, z.dtype)
    assert out.isnan().nonzero().tolist() == [[1, 2, 0, 3, 3]]
    assert sums.isnan().any(-1).nonzero().tolist() == [[1, 2]]


# Gate merge


def gate_merge(dxs, pos_s, dxt, pos_t, gate, x, dx, dgate, samples, shape, panel_dtype, threads=1):
    nb, C, T, H, W = shape
    _C.gate_merge(
        ptr(dxs), ptr(pos_s), dxs.shape[-1], ptr(dxt), ptr(pos_t), dxt.shape[-1], ptr(gate), gate.stride(0),
        ptr(x), strides(x), ptr(dx), strides(dx), ptr(dgate), ptr(samples), nb, C, T, H, W,
        CODES[panel_dtype], CODES[gate.dtype], threads,
    )  # fmt: skip


def positions(channels, C):
    pos = torch.full((C,), -1, dtype=torch.int32)
    pos[channels] = torch.arange(len(channels), dtype=torch.int32)
    return pos


@pairs
@pytest.mark.parametrize(("x_layout", "dx_layout"), layout_pairs(LAYOUTS))
def test_gate_merge_values(pair, x_layout, dx_layout):
    """Every dtype pair and layout; listed, all and no channels in a panel; dx and dgate each optional."""
    dtype, panel_dtype = pair
    for (nb, C, *rest), lists in itertools.product(shapes_of(pair), ("listed", "all", "one side")):
        shape, full = (nb, C, *rest), (nb + 1, C, *rest)
        chosen = {
            "listed": (some_channels(C, C // 2), some_channels(C, C - C // 3)),
            "all": (None, None),
            "one side": (some_channels(C, 0), None),
        }[lists]
        pos = [None if c is None else positions(c, C) for c in chosen]
        panels = [
            torch.randn(nb, *rest, C if c is None else len(c), dtype=torch.float64).to(panel_dtype) for c in chosen
        ]
        gate = torch.rand(full[:2], dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1).to(dtype)
        x, samples = filled(full, dtype, x_layout), torch.randperm(nb + 1)[:nb]

        def run(threads, want_dx=True, want_dgate=True):
            dx = empty(full, dtype, dx_layout) if want_dx else None
            dgate = torch.full(full[:2], torch.nan, dtype=dtype) if want_dgate else None
            both = panels[0], pos[0], panels[1], pos[1]
            gate_merge(*both, gate, x if want_dgate else None, dx, dgate, samples, shape, panel_dtype, threads)
            return dx, dgate

        dx, dgate = check_threads(run)
        spread = []
        for c, p in zip(chosen, panels, strict=True):
            full_panel = torch.zeros(shape, dtype=torch.float64)
            full_panel[:, slice(None) if c is None else c] = p.double().permute(0, 4, 1, 2, 3)
            spread.append(full_panel)
        g = gate.double()[samples][..., None, None, None]
        check(dx[samples], g * spread[0] + (1 - g) * spread[1], dtype, 2)
        ref = (x.double()[samples] * (spread[0] - spread[1])).sum((2, 3, 4))
        check(dgate[samples], ref, dtype, 4)
        others = [b for b in range(nb + 1) if b not in samples]
        assert dx[others].isnan().all() and dgate[others].isnan().all()
        assert torch.equal(run(1, want_dgate=False)[0][samples], dx[samples])
        assert torch.equal(run(1, want_dx=False)[1][samples], dgate[samples])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gate_merge_closed_side(layout):
    """A gate of exactly 1 or 0 selects: the closed side's NaN stays out of dx; dgate keeps samples apart."""
    shape = (2, 9, 2, 3, 3)
    a, d = torch.randn(shape), torch.randn(shape)
    a[0], d[1] = torch.nan, torch.inf
    gate = torch.tensor([[0.0], [1.0]]).expand(2, 9).contiguous()
    dx, x = empty(shape, torch.float32, layout), filled(shape, torch.float32, layout)
    gate_merge(panel(a), None, panel(d), None, gate, None, dx, None, None, shape, torch.float32)
    assert torch.equal(dx[0], d[0]) and torch.equal(dx[1], a[1])
    a[0], d[1] = 1.0, 2.0
    a[0, 3, 1, 1, 1] = torch.nan
    dgate = torch.full((2, 9), torch.nan)
    gate_merge(panel(a), None, panel(d), None, gate, x, None, dgate, None, shape, torch.float32)
    assert dgate.isnan().nonzero().tolist() == [[0, 3]]


# Module


def test_large_inputs_do_not_depend_on_threads():
    """Above the single-thread threshold, where threads really run, every reduction is the same."""
    shape = (2, 70, 8, 16, 16)
    z, x, gate = torch.randn(shape), filled(shape, torch.float32, "channels_last"), torch.rand(shape[:2])
    zs = panel(z)

    def run(threads):
        out, sums = empty(shape, torch.float32), torch.full((2, 70, 9), torch.nan)
        epilogue(zs, None, None, True, x, out, None, sums, 9, shape, torch.float32, threads)
        dx, dgate = empty(shape, torch.float32), torch.full((2, 70), torch.nan)
        gate_merge(zs, None, zs, None, gate, x, dx, dgate, None, shape, torch.float32, threads)
        return out, sums, dx, dgate, tap_sums(x, 9, threads), tap_sums(z, 9, threads)

    check_threads(run)


def test_bad_arguments():
    """Unknown dtype codes, sizes, taps, threads and nulls are refused by name."""
    x, out = torch.zeros(2, 3, 1, 2, 2), torch.full((2, 3, 9), 7.0)

    def call(**change):
        arguments = dict(
            x=ptr(x), x_strides=strides(x), out=ptr(out), B=2, C=3, T=1, H=2, W=2, taps=9, dtype=0, threads=1
        )
        _C.tap_sums(**{**arguments, **change})

    for change, message in [
        (dict(dtype=4), r"tap_sums: dtype is 4; wanted 0 \(float32\)"), (dict(dtype=-1), "dtype is -1"),
        (dict(H=-2), "H is -2; wanted a size >= 0"), (dict(taps=3), "taps is 3; wanted 1 or 9"),
        (dict(threads=0), "threads is 0"), (dict(x=0), "x is null"),
        (dict(x_strides=(1, 1, 1, 1, -1)), "strides >= 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call(**change)
    with pytest.raises(ValueError, match="out_dtype is 2; wanted src_dtype"):
        _C.gather_panel(0, (0,) * 5, 0, 0, 0, 0, 0, 0, False, 0, (0,) * 5, 0, 1, 1, 1, 0, 2, 1)
    with pytest.raises(ValueError, match="nc is 4; wanted at most width"):
        _C.gather_panel(0, (0,) * 5, 0, 0, 0, 4, 0, 0, False, 0, (0,) * 5, 3, 1, 1, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="dgate needs x"):
        _C.gate_merge(1, 0, 3, 1, 0, 3, 1, 3, 0, (0,) * 5, 0, (0,) * 5, 1, 0, 1, 3, 1, 1, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="without pos_s"):
        _C.gate_merge(1, 0, 2, 1, 0, 3, 1, 3, 0, (0,) * 5, 0, (0,) * 5, 0, 0, 1, 3, 1, 1, 1, 0, 0, 1)
    assert (out == 7).all()


def test_isa_choice(isa):
    """The chosen instruction set is the one in use, and an unknown one is refused with what there is."""
    assert _C.get_isa() == isa
    with pytest.raises(ValueError, match="set_isa: name is 'sse9'; this build on this machine supports auto, portable"):
        _C.set_isa("sse9")
    _C.set_isa("auto")
    assert _C.get_isa() == _C.supported_isas()[-1]


def test_build_info():
    """build_info names compiler, flags and instruction sets, covers what the machine can run, and tells of CUDA."""
    info = _C.build_info()
    assert set(info) == {"compiler", "version", "isas", "openmp", "cuda", "flags"}
    assert set(_C.supported_isas()) <= set(info["isas"])
    built = build_record()[0] == "cuda"
    assert (info["cuda"] is not None) == built == hasattr(_C, "cuda")
    assert info["cuda"] is None or (info["cuda"]["version"] and 75 in info["cuda"]["targets"])
