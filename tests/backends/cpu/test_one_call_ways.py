"""Layers in one native call where several ways convolve: only fast convolution is in the call, and all else is left to
the single ops, whichever way the processor, the size, a packing or :class:`use_algorithm` chooses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsts_kernels import DSTSLayer, ops
from dsts_kernels.backends import BACKENDS, cpu, explain, use_algorithm
from dsts_kernels.backends.algorithm import wanted_algorithm
from dsts_kernels.backends.base import FrozenOptions, FrozenWeights
from dsts_kernels.frozen_layer import FrozenLayer
from dsts_kernels.testing import assert_close

from ...support import units
from ...support.modules import pair
from .support import _C

CPU = BACKENDS["cpu"]
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
WHOLE, LIVE = "frozen_layers", "live_layer"  # of the native module
pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_scratch")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of the native module that holds layers, in order."""
    calls: list[str] = []

    class Spy:
        def __getattr__(self, name: str):
            if name in (WHOLE, LIVE):
                calls.append(name)
            return getattr(_C, name)

    monkeypatch.setattr(cpu, "_C", Spy())
    return calls


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with matrix units, on which every layer counts as large enough for them."""
    units.pretend(monkeypatch)
    monkeypatch.setattr(cpu, "matrix_is_cheaper", lambda *size: True)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which convolutions ran, of those that Python calls."""
    seen: list[str] = []

    def spied(way: object, label: str, method: str) -> Callable:
        own = getattr(way, method)
        return lambda *args, **named: (seen.append(f"{label}.{method}"), own(*args, **named))[1]

    methods = ("gated_conv", "frozen_neuron", "mix", "mix_data_gradient", "mix_weight_gradient")
    for label, way in (("fast", CPU.fast), ("direct", CPU.direct), ("matrix", CPU.matrix)):
        for method in methods:
            monkeypatch.setitem(vars(way), method, spied(way, label, method))
    return seen


def by_pieces(call: Callable, *arguments: object) -> Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(CPU, "one_call", False)
        return call(*arguments)


def features(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 20, 2, 5, 4).to(dtype)


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
def test_a_matrix_unit_takes_its_layers(asked, large, ways, mixing_kernel):
    """Frozen modules and live layers decline; the same bits come as from single ops, by the matrix unit."""
    _, fused = pair(20, BFLOAT16, num_layers=2, mixing_kernel=mixing_kernel)
    x, fast = features(BFLOAT16), fused.eval().freeze()
    assert torch.equal(fast(x), by_pieces(fast, x))
    assert set(ways) == {"matrix.frozen_neuron"}
    ways.clear()
    with torch.no_grad():
        assert torch.equal(fused(x), by_pieces(fused, x))
    assert "matrix.gated_conv" in ways and not any(way.startswith("fast") for way in ways)
    assert asked == []


def test_what_is_small_or_wide_stays_one_call(monkeypatch, asked):
    """On the same processor: samples that are too small for a matrix unit, and float32."""
    units.pretend(monkeypatch)
    for dtype in (BFLOAT16, FLOAT32):
        _, fused = pair(20, dtype, num_layers=2)
        fused.eval().freeze()(features(dtype))
        with torch.no_grad():
            fused(features(dtype))
        assert asked == [WHOLE, LIVE, LIVE], dtype
        asked.clear()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd"])
def test_a_block_is_obeyed(asked, ways, large, algorithm, dtype):
    """By frozen modules that were packed for either way, and by live layers."""
    _, fused = pair(20, dtype, num_layers=2)
    x, fast = features(dtype), fused.eval().freeze()
    direct = algorithm == "direct" or (algorithm == "auto" and dtype == BFLOAT16)
    with use_algorithm(algorithm), torch.no_grad():
        frozen, live = fast(x), fused(x)
        assert asked == ([] if direct else [WHOLE, LIVE, LIVE])
        convolutions = [way for way in ways if "mix" not in way]
        assert all(not way.startswith("fast") for way in convolutions) and bool(convolutions) == direct
        assert torch.equal(frozen, by_pieces(fast, x)) and torch.equal(live, by_pieces(fused, x))


def test_threads_may_share_a_block():
    """Each comes out of it to where it was, and so does who leaves blocks in another order."""
    shared, entered, leave, found = use_algorithm("direct"), threading.Event(), threading.Event(), []

    def first() -> None:
        with shared:
            entered.set()
            leave.wait(60)
        found.append(wanted_algorithm())

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(60)
    with use_algorithm("winograd") as outer:
        with shared:
            leave.set()
            thread.join()
            outer.__exit__()
            assert wanted_algorithm() == "direct"
        assert wanted_algorithm() == "auto"
    assert found == ["auto"]


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_what_was_packed_for_one_way_stays(asked, ways, large, algorithm):
    """Whatever a block says, and however large the layer is."""
    fast = pair(20, BFLOAT16, num_layers=2)[1].eval().freeze(algorithm=algorithm)
    x, found = features(BFLOAT16), []
    for other in ("auto", "direct", "winograd"):
        with use_algorithm(other):
            found.append(fast(x))
    assert all(torch.equal(y, found[0]) for y in found)
    assert asked == ([] if algorithm == "direct" else [WHOLE] * 3)
    assert not any(way.startswith("fast") for way in ways) and bool(ways) == (algorithm == "direct")


def test_layers_of_several_packings(asked, ways):
    """A module with one layer that is packed for the library: each layer goes its own way."""
    fused = pair(20, FLOAT32, num_layers=3)[1].eval()
    fast, direct = fused.freeze(), fused.freeze(algorithm="direct")
    x = features(FLOAT32)
    wanted = fast(x)
    fast.layers[1] = direct.layers[1]
    asked.clear()
    assert_close(fast(x), wanted.double(), dtype=FLOAT32, factor=2)
    assert asked == [WHOLE] * 2 and set(ways) == {"direct.frozen_neuron"}


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("given", [True, False], ids=["given sums", "own sums"])
def test_scoring_with_a_centre(asked, taps, given):
    """One more tap of the first channel is added to scores; those of other channels are not read."""
    layer: FrozenLayer = pair(20, FLOAT32, num_layers=1)[1].eval().freeze().layers[0]
    scoring = torch.full((3, 20, taps + 1), torch.nan)
    scoring[..., :taps], scoring[:, 0, taps] = torch.randn(3, 20, taps), 100 * torch.randn(3)
    weights: FrozenWeights = layer.weights()._replace(scoring=scoring)
    x, options = features(FLOAT32), layer.options(0)
    sums = torch.randn(3, 20, taps) if given else CPU.tap_sums(x, taps)
    y, _, neuron, scores = CPU.frozen_layer(x, sums if given else None, None, weights, options)
    wanted = sums.double().flatten(1) @ scoring[..., :taps].double().flatten(1).t() / options.score_divisor(x)
    assert_close(scores, wanted + scoring[:, 0, taps].double(), dtype=FLOAT32)
    assert torch.equal(neuron, scores.argmax(1))
    theirs = layer.weights()._replace(scoring=scores_for(neuron))
    one = torch.ones(3, 20, 1)
    one[torch.arange(3), torch.arange(3)] = 100.0
    assert torch.equal(CPU.frozen_layer(x, one, None, theirs, options)[0], y) and asked == [WHOLE] * 2


def scores_for(neuron: Tensor) -> Tensor:
    """Scoring kernels ``(N, C, 1)`` by which sample ``b`` with a large sum of channel ``b`` chooses ``neuron[b]``."""
    scoring = torch.zeros(3, 20, 1)
    scoring[neuron, torch.arange(3), 0] = 1.0
    return scoring


def test_layers_whose_weights_one_call_cannot_read(asked):
    """A whole module declines as well where only one layer has a weight whose memory holds its negative."""
    fast = pair(20, FLOAT32, num_layers=2)[1].eval().freeze()
    x, (first, second) = features(FLOAT32), fast.layers
    negated = second.weights()._replace(scoring=torch._neg_view(second.scoring.neg()))
    other = SimpleNamespace(
        packing=second.packing, prepared=None, num_neurons=3, settled=object, weights=lambda: negated,
        options=second.options,
    )  # fmt: skip
    assert CPU.frozen_layers(x, None, torch.empty_like(x), [first, second], False) == (None, None)
    assert CPU.frozen_layers(x, None, torch.empty_like(x), [first, other], False) is None
    assert asked == [WHOLE]


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_mixing_goes_the_way_of_its_layer(monkeypatch, large, ways, kernel, dtype):
    """Forward and back, each pass for itself; a kernel of 1x1x1 is direct everywhere."""
    expected = {"forward": "mix", "data": "mix_data_gradient", "weights": "mix_weight_gradient"}
    z, neuron = torch.randn(3, 20, 2, 5, 4).to(dtype), torch.tensor([0, 2, 0])
    mixing = torch.randn(3, 20, 20, *kernel).to(dtype)
    for slow in (None, "weights"):
        if slow:
            units.pretend(monkeypatch, slow=(slow,))
        ways.clear()
        leaves = [t.clone().requires_grad_() for t in (z, mixing)]
        ops.mixing_conv3d(leaves[0], neuron, leaves[1]).float().sum().backward()
        for step, method in expected.items():
            way = "direct" if kernel == (1, 1, 1) else "matrix" if dtype == BFLOAT16 and step != slow else "fast"
            assert {w for w in ways if w.endswith(f".{method}")} == {f"{way}.{method}"}
        wide = [t.double().requires_grad_() for t in (z, mixing)]
        ops.mixing_conv3d(wide[0], neuron, wide[1]).sum().backward()
        for ours, theirs in zip(leaves, wide, strict=True):
            assert_close(ours.grad, theirs.grad, dtype=dtype)


@pytest.mark.parametrize("op", ["gated_conv3d", "mixing_conv3d", "frozen_layer"])
def test_explain_says_what_a_block_asks(large, op):
    """And in which dtype products are made; outside a block, what the processor has."""
    said = {
        ("direct", BFLOAT16): "direct convolution, computed in bfloat16, as use_algorithm asks",
        ("direct", FLOAT32): "direct convolution, computed in float32, as use_algorithm asks",
        ("direct", torch.float64): "direct convolution, computed in float64, as use_algorithm asks",
        ("winograd", BFLOAT16): "winograd convolution, computed in float32, as use_algorithm asks",
        ("winograd", torch.float64): "use_algorithm='winograd' is an error: float64 is convolved directly",
        ("auto", BFLOAT16): "direct convolution in bfloat16 where it costs less than fast convolution; AMX, measured",
        ("auto", FLOAT32): CPU.remark,
    }
    for (algorithm, dtype), text in said.items():
        with use_algorithm(algorithm):
            assert text in explain(op, "cpu", dtype)
    with use_algorithm("direct"):
        assert "use_algorithm" not in explain("tap_sums", "cpu", FLOAT32)


def test_a_live_layer_of_several_outputs(asked, large):
    """The way is chosen by inputs and outputs of the layer, as in the single op."""
    layer = DSTSLayer(20, 33, num_neurons=2).to(BFLOAT16).eval()
    x = features(BFLOAT16)
    with torch.no_grad():
        assert torch.equal(layer(x), by_pieces(layer, x))
    assert asked == []


def test_options_say_how_a_layer_is_packed():
    """The op takes both packings of fast convolution: a file may hold either."""
    layer = pair(20, FLOAT32, num_layers=1)[1].eval().freeze(algorithm="winograd").layers[0]
    options: FrozenOptions = layer.options(0)
    x = features(FLOAT32)
    ours = CPU.frozen_layer(x, None, None, layer.weights(), options)
    theirs = CPU.frozen_layer(x, None, None, layer.weights(), options._replace(packing="blocked"))
    assert options.packing == "winograd" and torch.equal(ours[0], theirs[0])
