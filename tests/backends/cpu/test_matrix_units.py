"""Half types on processors that multiply them: which way runs and why, filters reordered once, and their copies."""

from __future__ import annotations

import copy
import gc
import io
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsts_kernels import FrozenDSTS, cli
from dsts_kernels.backends import BACKENDS, convolution, explain, kept, processor, use_algorithm
from dsts_kernels.backends.convolution import SPATIAL, TEMPORAL, panel_width
from dsts_kernels.backends.packing import PACKINGS
from dsts_kernels.backends.processor import UNITS
from dsts_kernels.functional import gated_conv3d
from dsts_kernels.testing import TOLERANCES, assert_close, relative_error

from ...support import units
from ...support.checks import GATED, check
from ...support.inputs import gated_inputs
from ...support.modules import draws_for, features_for, pair, reference_output, reference_step, training_step
from .support import _C

CPU = BACKENDS["cpu"]
HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
TPN, SWIN, SMALL = (1, 1024, 8, 16, 16), (1, 1024, 16, 7, 7), (1, 16, 1, 4, 4)


def way(shape: tuple[int, ...], dtype: torch.dtype, step: str = "forward") -> str:
    """How ``"auto"`` convolves such features, which take no memory here."""
    x = torch.empty(1, dtype=dtype).expand(shape)
    return {id(CPU.fast): "winograd", id(CPU.matrix): "direct"}[id(CPU.convolution(x, shape[1], step))]


@halves
def test_large_layers_are_direct_on_matrix_units(monkeypatch, dtype):
    """By what both cost; small calls, float32 and every other processor stay with fast convolution."""
    units.pretend(monkeypatch)
    assert [way(shape, dtype) for shape in (TPN, SWIN, SMALL)] == ["direct", "direct", "winograd"]
    assert way(TPN, torch.float32) == "winograd"
    assert way((64, 16, 1, 4, 4), dtype) == "winograd", "a batch may be 64 calls"
    assert way((1, 1024, 200, 1, 1), dtype) == "winograd", "fast convolution reads one tap of nine there"
    assert "direct convolution" in explain("gated_conv3d", "cpu", dtype)


@pytest.mark.parametrize(
    "has, speedup, refused, said",
    [
        ((), 7.0, "", "nothing that multiplies it faster than float32"),
        ((), 7.0, "Operation not supported", r"Linux refused AMX tiles \(Operation not supported\)"),
        (("amx_bf16", "amx_fp16"), 1.4, "", "AMX is there, but oneDNN was 1.4 times as fast with it as in float32"),
        (("avx512_bf16",), 2.0, "", "AVX512_BF16, measured at 2.0 times float32's rate"),
    ],
    ids=["none", "refused", "slow", "vectors"],
)
def test_elsewhere_fast_convolution_stays(monkeypatch, has, speedup, refused, said):
    """Without tiles, without permission, where oneDNN does not use them, and where products are only twice as fast."""
    units.pretend(monkeypatch, has, speedup, refused)
    assert way(TPN, torch.bfloat16) == "winograd"
    assert re.search(said, processor.describe(torch.bfloat16))
    with use_algorithm("direct"):  # whose products are half where that gains anything
        x = torch.empty(1, dtype=torch.bfloat16).expand(TPN)
        assert CPU.product_dtype(x) == (torch.bfloat16 if "avx512_bf16" in has else torch.float32)
        assert CPU.convolution(x, 1024) in (CPU.direct, CPU.matrix)


def test_each_pass_is_measured(monkeypatch):
    """A pass that oneDNN has no good kernel for stays with fast convolution; the others do not wait for it."""
    for slow in processor.PASSES:
        units.pretend(monkeypatch, slow=(slow,))
        found = {step: way(TPN, torch.bfloat16, step) for step in processor.PASSES}
        expected = {step: "winograd" if slow in (step, "forward") else "direct" for step in processor.PASSES}
        assert found == expected, slow
    units.pretend(monkeypatch, slow=("weights",))
    monkeypatch.setattr("dsts_kernels.backends.cpu.matrix_is_cheaper", lambda *size: True)
    learned, inputs = [], gated_inputs(2, 24, 12, (2, 3, 4), torch.bfloat16)
    own = CPU.fast.weight_gradient
    monkeypatch.setitem(vars(CPU.fast), "weight_gradient", lambda *a, **k: (learned.append(1), own(*a, **k))[1])
    for method in ("gated_conv", "data_gradient"):
        monkeypatch.setitem(vars(CPU.fast), method, None)
    check(GATED, inputs, backend="cpu")
    assert learned


def test_no_library_no_half_products(monkeypatch):
    """A torch without oneDNN has no convolution for them, whatever the chip has."""
    units.pretend(monkeypatch, library=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert processor.unit_of(torch.bfloat16) is None
    assert processor.describe(torch.bfloat16) == "torch runs without oneDNN"


def test_half_types_alone(monkeypatch):
    units.pretend(monkeypatch, ("amx_bf16",))
    assert processor.unit_of(torch.bfloat16) == UNITS[torch.bfloat16][0] and processor.unit_of(torch.float16) is None
    assert processor.unit_of(torch.float32) is None and processor.unit_of(torch.float64) is None


def test_what_this_processor_says():
    """Every unit that we look for is one that the native module asks for; the answer is torch's where torch has one."""
    found = _C.units()
    assert {unit.name for kinds in UNITS.values() for unit in kinds} < set(found)
    for name, theirs in (("avx512_bf16", "_is_avx512_bf16_supported"), ("avx512_vnni", "_is_vnni_supported")):
        if hasattr(torch.cpu, theirs):
            assert found[name] == getattr(torch.cpu, theirs)()
    tiles = found["amx_bf16"] or found["amx_int8"] or found["refused"] != ""
    if hasattr(torch.cpu, "_is_amx_tile_supported"):
        assert tiles == torch.cpu._is_amx_tile_supported()
    assert _C.units() == found


def test_measures_what_it_measures():
    """The probe convolves: some time, no zero, and the same answer ever after."""
    processor.speedup.cache_clear()
    for step in processor.PASSES:
        first = processor.speedup(torch.bfloat16, step)
        assert 0 < first < 1000 and processor.speedup(torch.bfloat16, step) == first


def test_measures_against_float32(monkeypatch):
    """Whatever the default dtype is."""
    seen = []
    monkeypatch.setitem(processor.PASSES, "forward", lambda x, w: seen.append({x.dtype, w.dtype}))
    monkeypatch.setattr(torch, "ones", lambda *a, own=torch.ones, **k: own(*a, **({"dtype": torch.float64} | k)))
    processor.speedup.__wrapped__(torch.bfloat16)
    assert seen == [{torch.float32}, {torch.bfloat16}] * (1 + processor.PROBE_ROUNDS)


def test_info_says_what_runs(monkeypatch):
    units.pretend(monkeypatch)
    assert "bfloat16      AMX, measured at 7.0 times float32's rate" in cli.info()
    units.pretend(monkeypatch, ())
    assert "float16       this processor has nothing that multiplies it faster than float32" in cli.info()


@halves
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_each_way_forced(monkeypatch, algorithm, dtype):
    """On a processor with matrix units and on this one, forward and backward, and only in the block."""
    inputs = gated_inputs(3, 40, 33, (3, 5, 4), dtype)
    for has in ((), units.MATRIX):
        units.pretend(monkeypatch, has)
        called = []
        for name, some in (("winograd", CPU.fast), ("direct", CPU.direct), ("direct", CPU.matrix)):
            for method in ("gated_conv", "data_gradient", "weight_gradient"):
                own = getattr(some, method)
                monkeypatch.setattr(
                    some, method, lambda *a, own=own, name=name, **k: (called.append(name), own(*a, **k))[1]
                )
        with use_algorithm(algorithm):
            check(GATED, inputs, backend="cpu")
        assert set(called) == {algorithm}
        monkeypatch.undo()
    with pytest.raises(ValueError, match="use_algorithm"):
        use_algorithm("fft")
    wide = gated_inputs(1, 4, 4, (1, 2, 2), torch.float64)
    with use_algorithm("winograd"), pytest.raises(RuntimeError, match="float64 is convolved directly"):
        gated_conv3d(*wide, backend="cpu")


@pytest.mark.parametrize("kernel", [SPATIAL, TEMPORAL, (1, 1, 1)], ids=str)
@pytest.mark.parametrize("outputs, channels", [(33, 40), (16, 64), (5, 1)], ids=str)
def test_prepared_filters(kernel, outputs, channels):
    """Reordered for one size of panels, and right on others; in every dtype that this oneDNN reorders or not."""
    taps = kernel[0] * kernel[1] * kernel[2]
    for dtype in (torch.float32, *HALVES):
        panel = torch.randn(2, 3, 5, 4, channels).to(dtype)
        weight = torch.randn(outputs, taps, channels).to(dtype)
        prepared = convolution.prepare(weight, panel, kernel)
        assert (prepared.filters.layout == torch._mkldnn) == convolution.reorders(dtype)
        for like in (panel, torch.randn(1, 4, 3, 7, channels).to(dtype)):
            found = convolution.forward(like, prepared, kernel)
            wanted = convolution.forward(like.double(), weight.double(), kernel)
            assert_close(found, wanted)


def test_oneDNN_reorders_float32():
    """What stands in for half types below is the opaque filter that they have on such processors."""
    assert convolution.reorders(torch.float32)


def test_panels_are_whole_tiles():
    assert [panel_width(n, True) for n in (0, 1, 32, 33)] == [0, 32, 32, 64] and panel_width(33, False) == 33
    x = torch.randn(2, 40, 3, 4, 5).to(torch.bfloat16)
    for backend in ("cpu", "eager"):
        panel = BACKENDS[backend].gather_panel(x, None, torch.arange(0, 40, 2, dtype=torch.int32), width=32)
        assert torch.equal(panel[..., :20], x[:, ::2].permute(0, 2, 3, 4, 1)) and not panel[..., 20:].any()


def count_prepared(patch: pytest.MonkeyPatch) -> list[int]:
    made, prepare = [], convolution.prepare
    patch.setattr(convolution, "prepare", lambda *a: (made.append(1), prepare(*a))[1])
    return made


MIXINGS = [(1, 1, 1), (1, 3, 3), (3, 1, 1)]


@pytest.mark.parametrize("stands_in", ["float32", "halves"])
@pytest.mark.parametrize("mixing_kernel", MIXINGS, ids=str)
def test_filters_are_reordered_once(monkeypatch, tmp_path: Path, mixing_kernel, stands_in):
    """One for each operator of each neuron that was chosen; copies, pickles, states and moves make their own."""
    dtype = torch.float32 if stands_in == "float32" else torch.bfloat16
    units.pretend_float32(monkeypatch) if stands_in == "float32" else units.pretend(monkeypatch)
    monkeypatch.setattr("dsts_kernels.backends.direct.KEPT_ITEMSIZE", 4 if stands_in == "float32" else 2)
    ref, fused = pair(40, dtype, "cpu", num_layers=2, mixing_kernel=mixing_kernel)
    x = features_for(ref, torch.randn(3, 40, 3, 5, 4).to(dtype))
    wanted, routing = reference_output(ref, x)
    fast, made = fused.eval().freeze(), count_prepared(monkeypatch)
    chosen = sum(len(set(neurons)) for neurons in routing.neuron.tolist())
    filters = 2 + (mixing_kernel != (1, 1, 1))
    with use_algorithm("direct"):
        assert_close(fast(x), wanted, factor=2)
        assert len(made) == chosen * filters
        first = fast(x)
        assert len(made) == chosen * filters
        buffer, path = io.BytesIO(), tmp_path / "fast.pt"
        fast.save(path)
        torch.save(fast, buffer)
        buffer.seek(0)
        others = {
            "deepcopy": copy.deepcopy(fast),
            "pickle": torch.load(buffer, weights_only=False),
            "file": FrozenDSTS.load(path),
            "cast": copy.deepcopy(fast).double().to(dtype),
        }
        state = copy.deepcopy(fast)
        for layer in state.layers:
            layer.filters.zero_()
        state.load_state_dict(fast.state_dict())
        for name, other in {**others, "state": state}.items():
            before = len(made)
            assert torch.equal(other(x), first), name
            assert len(made) == before + chosen * filters, name


def test_kept_things_follow_their_tensor():
    """A write, a view's write, an uncounted write and other memory make them anew; they go with their tensor."""
    source, made = torch.zeros(4, 8), []

    def get(values: Tensor, key: str = "a", **how: bool) -> int | None:
        return kept.kept(values, key, lambda: made.append(key) or len(made), **how)

    assert [get(source[1]), get(source[1]), get(source[1], "b"), get(source[1]), get(source[2])] == [1, 1, 2, 1, 3]
    source[0, :2].add_(1)
    assert [get(source[1]), get(source[1])] == [4, 4]
    source.data[1].add_(1)
    assert [get(source[1]), get(source[1])] == [5, 5]
    source.data = torch.ones(4, 8)
    assert get(source[1]) == 6
    with torch.inference_mode():
        hidden = torch.zeros(1)
        assert get(source[1]) == 6, "a view that inference mode made"
    assert [get(hidden), get(hidden), get(source[:, 1]), get(source[:, 1])] == [7, 8, 9, 10]
    assert [get(source[3], again=True) for _ in range(3)] == [None, 11, 11]
    source.add_(1)
    assert [get(source[3], again=True) for _ in range(3)] == [None, 12, 12]
    for index in range(3 * kept.MOST):  # lists of channels that never come again
        assert get(source[3], str(index), again=True) is None
    before = len(kept._beside)
    assert len(kept._beside[source.untyped_storage()]) <= kept.MOST
    del source
    gc.collect()
    assert len(kept._beside) == before - 1


@pytest.mark.parametrize(
    "what", [(..., 0, 1, 1), (..., 0, 0, 1), (slice(None), 5), (7,)], ids=["centre", "tap", "channel", "output"]
)
@pytest.mark.parametrize("channels", [64, 60, 256])
def test_an_uncounted_write_to_a_part_of_a_filter_is_seen(channels, what):
    """To one tap, one input channel or one output through ``.data``, as pruning does: samples lie everywhere."""
    weight = torch.nn.Parameter(torch.randn(2, channels, channels, 1, 3, 3))
    made = [kept.kept(weight[1], "a", object)]
    weight.data[1][what] = 0
    made.append(kept.kept(weight[1], "a", object))
    assert made[0] is not made[1] and kept.kept(weight[1], "a", object) is made[1]


def test_tensors_whose_filters_are_kept_can_be_swapped():
    """As a module's conversion does in torch's new way; what was kept goes with the values."""
    one, other = (torch.nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    made = kept.kept(one[0], "a", object)
    torch.utils.swap_tensors(one, other)
    assert kept.kept(other[0], "a", object) is made and kept.kept(one[0], "a", object) is not made


@pytest.mark.parametrize("autocast", [False, True])
def test_evaluation_reorders_what_comes_again(monkeypatch, autocast):
    """A module that evaluates twice keeps its filters; a step of an optimizer, counted or not, is seen at once."""
    units.pretend(monkeypatch)
    monkeypatch.setattr(convolution, "SMALL_PRODUCT", 0)  # small ones are products of matrices, which reorder nothing
    own = torch.float32 if autocast else torch.bfloat16
    _, fused = pair(40, own, "cpu", num_layers=1)
    fused.eval()
    x, made = torch.randn(2, 40, 3, 5, 4).to(own), count_prepared(monkeypatch)
    with use_algorithm("direct"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, routing = fused(x, return_routing=True)
        assert not made
        again = [fused(x) for _ in range(2)]
        assert len(made) == 3 * len(set(routing.neuron[0].tolist())), "mixing too"
        assert all(torch.equal(y, first) for y in again) or not convolution.reorders(torch.bfloat16)
        assert_close(again[0], first.double(), dtype=torch.bfloat16)
        for write in (lambda p: p.mul_(2), lambda p: p.data.mul_(2)):
            for p in (fused.layers[0].spatial, fused.layers[0].temporal):
                write(p)
            fresh = copy.deepcopy(fused)(x)
            assert torch.equal(fused(x), fresh) and not torch.equal(fresh, first)
            fused(x)


def test_a_frozen_module_takes_the_cheaper_way(monkeypatch):
    """``"auto"`` decides by size at the call, ``"winograd"`` and ``"direct"`` do not; packings say which it was."""
    units.pretend(monkeypatch)
    _, fused = pair(16, torch.bfloat16, "cpu", num_layers=1)
    ways = {"auto": None, "direct": "direct", "winograd": "winograd"}
    seen = []
    for name, some in (("winograd", CPU.fast), ("direct", CPU.direct), ("direct", CPU.matrix)):
        own = some.frozen_neuron
        monkeypatch.setattr(
            some, "frozen_neuron", lambda *a, own=own, name=name: (seen.append(name), own(*a))[1], raising=True
        )
    call = CPU._run_frozen
    monkeypatch.setitem(vars(CPU), "_run_frozen", lambda *a: (seen.append("winograd"), call(*a))[1])
    x, outputs = torch.randn(1, 16, 1, 4, 4).to(torch.bfloat16), {}
    for algorithm in ways:
        fast = fused.eval().freeze(algorithm=algorithm)
        assert fast.layers[0].packing in PACKINGS
        outputs[algorithm] = fast(x)
    assert seen == ["winograd", "direct", "winograd"]
    assert torch.equal(outputs["auto"], outputs["winograd"])
    assert relative_error(outputs["direct"], outputs["winograd"]) < TOLERANCES[torch.bfloat16]
    monkeypatch.setattr("dsts_kernels.backends.cpu.matrix_is_cheaper", lambda *size: True)
    fused.freeze()(x)
    assert seen[-1] == "direct"


@halves
@pytest.mark.parametrize("mixing_kernel", MIXINGS, ids=str)
def test_training_and_autocast(monkeypatch, dtype, mixing_kernel):
    """A step of the whole module in a half type, and under autocast on float32 weights, against float64."""
    units.pretend(monkeypatch)
    options = dict(num_layers=2, mixing_kernel=mixing_kernel, activation=None, score_reduction="mean")
    for own in (dtype, torch.float32):
        ref, fused = pair(40, own, "cpu", **options)
        x = torch.randn(4, 40, 3, 5, 4).to(dtype).to(own)
        draws, grad = draws_for(ref, x, own), torch.randn(4, 40, 3, 5, 4).to(dtype).float()
        wanted, _, gradients = reference_step(ref, x, draws, grad)
        with use_algorithm("direct"), torch.autocast("cpu", dtype, enabled=own != dtype):
            found, _, ours = training_step(fused.train(), x, draws, grad)
        assert_close(found, wanted, dtype=dtype, factor=3)
        for name, value in ours.items():
            assert_close(value, gradients[name], dtype=dtype, factor=10, name=name)


def each_error(dtype: torch.dtype, shape: tuple[int, ...], outputs: int) -> dict[str, float]:
    """Relative errors of one gated convolution by each way against float64, on inputs after a ReLU."""
    x, gate, neuron, spatial, temporal = gated_inputs(
        shape[0], shape[1], outputs, shape[2:], dtype, "hard", "one", neurons=1
    )
    inputs = [x.relu(), gate, neuron, spatial, temporal]
    wanted = GATED.literal(*(t.double() if t.is_floating_point() else t for t in inputs))
    errors = {}
    for algorithm in ("direct", "winograd"):
        with use_algorithm(algorithm):
            errors[algorithm] = relative_error(gated_conv3d(*inputs, backend="cpu"), wanted)
    return errors


@halves
def test_errors_of_both_ways(monkeypatch, dtype):
    """Direct convolution rounds each operator's result and their sum, fast convolution the sum alone."""
    units.pretend(monkeypatch)
    errors = each_error(dtype, (1, 128, 2, 7, 7), 16)
    rounding = torch.finfo(dtype).eps / 2
    assert errors["winograd"] < rounding and errors["direct"] < 2 * rounding, errors


def test_nan_of_a_padded_channel_stays_out(monkeypatch, poison: None):
    """Channels that fill no tile: zeros behind them, in panels and in filters, whatever memory held."""
    units.pretend(monkeypatch)
    inputs: list[Tensor] = gated_inputs(2, 33, 9, (2, 3, 4), torch.bfloat16, "hard")
    with use_algorithm("direct"):
        check(GATED, inputs, backend="cpu")
        inputs[0] = inputs[0].clone()
        inputs[0][1] = torch.nan
        assert not gated_conv3d(*inputs, backend="cpu")[0].isnan().any()
