"""Frozen layers in one native call: bit for bit the layers put together from kernels, and as plain PyTorch routes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS, cpu
from dsts_kernels.ops.frozen_layer import frozen_layer
from dsts_kernels.testing import assert_close

from ...support.modules import pair
from .support import _C, LAYOUTS, filled

CPU = BACKENDS["cpu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "default": {},
    "mean-1x3x3": dict(scoring_kernel=(1, 3, 3), scoring_width=2, score_reduction="mean"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1), activation=None, skip=False),
    "one-neuron": dict(num_neurons=1, skip=False),
    "one-layer": dict(num_layers=1, norm=None),
}
SIZES = [(3, 20, 3, 6, 9), (1, 16, 1, 4, 4), (5, 17, 1, 1, 1), (0, 12, 2, 3, 3), (4, 9, 9, 24, 20)]
options = pytest.mark.parametrize("name", OPTIONS)
pytestmark = pytest.mark.usefixtures("isa", "one_thread", "poisoned_scratch")


def by_pieces(monkeypatch: pytest.MonkeyPatch, call, *arguments, **named):
    """A call in which layers are put together in Python."""
    with monkeypatch.context() as patch:
        patch.setattr(CPU, "one_call", False)
        return call(*arguments, **named)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """In bits, dtype and memory; a dimension of one element has any stride."""
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (ours, theirs)]
    return torch.equal(ours, theirs) and ours.dtype == theirs.dtype and (strides[0] == strides[1] or not ours.numel())


@options
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_same_bits_as_by_pieces(monkeypatch, name, size, dtype):
    """The whole module and each layer; output, neurons and strides. Scores differ in the last bit."""
    fast = pair(size[1], dtype, **OPTIONS[name])[1].eval().freeze()
    x = torch.randn(size).to(dtype)
    y, routing = fast(x, return_routing=True)
    theirs, wanted = by_pieces(monkeypatch, fast, x, return_routing=True)
    assert same(y, theirs) and torch.equal(routing.neuron, wanted.neuron) and torch.equal(routing.gate, wanted.gate)
    assert_close(routing.scores, wanted.scores, dtype=torch.float32)
    layer, sums = fast.layers[0], torch.rand(*size[:2], fast.layers[0].taps)
    for given, skip, taps in ((None, None, 9), (sums, x, 1), (sums, None, 0)):
        call = x, given, skip, layer.weights(), layer.options(taps)
        ours, theirs = frozen_layer(*call), by_pieces(monkeypatch, frozen_layer, *call)
        assert all(map(same, ours[:3], theirs[:3]))
        assert_close(ours[3], theirs[3], dtype=torch.float32)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(monkeypatch, layout, skip):
    """Features in any strides, in inference mode and outside; the result lies as it did."""
    fast = pair(18, torch.float32, skip=skip)[1].eval().freeze()
    x = filled((2, 18, 3, 5, 7), torch.float32, layout)
    wanted = by_pieces(monkeypatch, fast, x)
    assert same(fast(x), wanted)
    with torch.inference_mode():
        assert same(fast(x), wanted)


def test_one_call(monkeypatch):
    """The module is one native call, and nothing else of the native module."""
    fast, asked = pair(16, torch.float32)[1].eval().freeze(), []

    class Spy:
        def __getattr__(self, name: str):
            asked.append(name)
            return getattr(_C, name)

    monkeypatch.setattr(cpu, "_C", Spy())
    x = torch.randn(2, 16, 3, 4, 4)
    fast(x)
    assert asked == ["FrozenLayer"] * 3 + ["frozen_layers"]
    asked.clear()
    fast(x)
    assert asked == ["frozen_layers"]


def test_threads():
    """The same bits on any number of threads, at a size where threads run."""
    fast = pair(64, torch.float32, scoring_kernel=(1, 3, 3))[1].eval().freeze()
    x, found = torch.randn(3, 64, 8, 14, 14), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fast(x, return_routing=True))
    torch.set_num_threads(1)
    for y, routing in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(routing.scores, found[0][1].scores)


def test_python_threads_have_memory_of_their_own():
    """Calls at the same time, of sizes that take turns, whose scratch memory threads keep."""
    fast = pair(24, torch.float32)[1].eval().freeze()
    xs = [torch.randn(n, 24, 4, 5 + n, 7) for n in (1, 3, 2, 1)]
    wanted = [fast(x) for x in xs]

    def calls(first: int) -> bool:
        order = [(first + i) % len(xs) for i in range(24)]
        return all(torch.equal(fast(xs[i]), wanted[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(4)))


def test_scores_are_no_worse_than_of_a_product():
    """Summed in double: at most the rounding of the result away from float64, for as many elements as there may be."""
    layer = pair(700, torch.float32, num_layers=1, num_neurons=7, scoring_kernel=(1, 3, 3))[1].eval().freeze().layers[0]
    x, sums = torch.zeros(4, 700, 1, 2, 2), torch.randn(4, 700, 9)
    scores = frozen_layer(x, sums, None, layer.weights(), layer.options(0))[3]
    exact = sums.double().flatten(1) @ layer.scoring.double().flatten(1).t()
    product = sums.flatten(1) @ layer.scoring.flatten(1).t()
    assert (scores - exact).abs().max() <= (product - exact).abs().max()
    assert ((scores - exact).abs() <= 2**-24 * exact.abs() + 1e-12).all()


@pytest.mark.parametrize(
    "scores",
    [
        [1, 3, 3, 2],
        [torch.nan, 5, torch.nan, 7],
        [5, 1, torch.nan, torch.nan],
        [torch.inf, torch.nan, 1, 2],
        [-torch.inf] * 4,
        [-torch.inf, -3, -torch.inf, -3],
        [2, torch.inf, torch.inf, -1],
    ],
    ids=str,
)
def test_the_choice_is_argmax(scores):
    """The first of the largest, NaN above all, as torch's argmax has it."""
    layer = pair(1, torch.float32, num_layers=1, num_neurons=4)[1].eval().freeze().layers[0]
    layer.scoring.copy_(torch.tensor(scores)[:, None, None])
    found = frozen_layer(torch.zeros(2, 1, 1, 2, 2), torch.ones(2, 1, 1), None, layer.weights(), layer.options(0))
    assert torch.equal(found[3], torch.tensor(scores).expand(2, 4)) or torch.tensor(scores).isnan().any()
    assert found[2].tolist() == [torch.tensor(scores).argmax().item()] * 2


def test_a_bad_sample_stays_alone():
    """NaN in one sample leaves the others as they are, whatever that one chose."""
    fast = pair(16, torch.float32)[1].eval().freeze()
    x = torch.randn(3, 16, 2, 5, 5)
    wanted = fast(x)
    x[1, 3, 1, 2, 2] = torch.nan
    y = fast(x)
    assert torch.equal(y[[0, 2]], wanted[[0, 2]]) and not y[1].isfinite().all()


def replace(layer, name: str) -> None:
    layer._buffers[name] = layer._buffers[name].clone().mul_(2)


def data(layer, name: str) -> None:
    layer._buffers[name].data = layer._buffers[name].clone().mul_(2)


def write(layer, name: str) -> None:
    layer._buffers[name].mul_(2)


@pytest.mark.parametrize("name", ["scoring", "filters", "bias", "mixing"])
@pytest.mark.parametrize("change", [replace, data, write], ids=lambda f: f.__name__)
def test_what_is_written_to_weights_is_seen(monkeypatch, change, name):
    """In place, in other memory, and as another tensor: by a module that has run before."""
    fast = pair(12, torch.float32, num_layers=2, mixing_kernel=(1, 3, 3))[1].eval().freeze()
    x = torch.randn(2, 12, 2, 4, 4)
    before = fast(x, return_routing=True)
    change(fast.layers[1], name)
    y, routing = fast(x, return_routing=True)
    theirs, wanted = by_pieces(monkeypatch, fast, x, return_routing=True)
    assert torch.equal(y, theirs)
    assert_close(routing.scores, wanted.scores, dtype=torch.float32)
    changed = routing.scores if name == "scoring" else y
    assert not torch.equal(changed, before[1].scores if name == "scoring" else before[0])


def test_copies_share_nothing():
    """Copies and pickles of a module that has run leave what native code read behind."""
    fast = pair(12, torch.float32)[1].eval().freeze()
    x = torch.randn(1, 12, 2, 4, 4)
    y = fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert all(layer.prepared is None for layer in other.layers)
        fast.layers[0].filters.zero_()
        assert torch.equal(other(x), y)
        fast.layers[0].filters.copy_(other.layers[0].filters)
    fast.to(torch.bfloat16)
    assert all(layer.prepared is None for layer in fast.layers)
    fast.layers[0]._compiled_call_impl = lambda: None  # as of compile(): torch's own modules leave it behind
    pickle.loads(pickle.dumps(fast))


def test_layers_of_several_widths():
    """Memory between layers holds the widest, wherever it comes: bit for bit the layers one by one."""
    x, prepared = torch.randn(2, 8, 2, 7, 7), []
    for channels, outputs in ((8, 8), (8, 8), (8, 96), (96, 16), (16, 8)):
        weights = FusedDSTS(channels, num_layers=1, num_neurons=2).eval().freeze().layers[0].weights()
        spatial = weights.starts.diff()
        size = sum(-(-outputs // 16) * 16 * (9 * s + 3 * (channels - s)) for s in spatial.tolist())
        weights = weights._replace(filters=0.1 * torch.randn(size), bias=torch.randn(2, outputs))
        prepared.append((_C.FrozenLayer(*weights, 0, [1, 1, 1], True), outputs))
    y, h = torch.empty_like(x), x
    _C.frozen_layers([layer for layer, _ in prepared], x, None, None, y, None, None, None, 1, None)
    for layer, outputs in prepared:
        h, given = torch.empty(2, outputs, 2, 7, 7), h
        _C.frozen_layers([layer], given, None, None, h, None, None, None, 1, None)
    assert torch.equal(y, h)


def test_where_somebody_listens_layers_are_ops():
    """A mode sees the registered op, once a layer."""
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    fast = pair(12, torch.float32)[1].eval().freeze()
    x = torch.randn(1, 12, 2, 4, 4)
    y = fast(x)
    with Mode():
        assert torch.equal(fast(x), y)
    assert sum("frozen_layer" in name for name in seen) == 3


def arguments() -> dict[str, object]:
    """Good ones, of one layer of 8 channels and 3 neurons."""
    dsts = FusedDSTS(8, num_layers=1, num_neurons=3).eval()
    weights, x = dsts.freeze().layers[0].weights(), torch.randn(2, 8, 1, 3, 3)
    return dict(
        layers=[_C.FrozenLayer(*weights, 0, [1, 1, 1], True)], x=x, sums=None, skip=None, y=torch.full_like(x, 7.0),
        next_sums=None, neuron=torch.zeros(1, 2, dtype=torch.int64), scores=torch.zeros(1, 2, 3), threads=1,
        stage_seconds=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(layers=[]), "layers is empty"),
        (dict(layers=[None]), "layers has a None"),
        (dict(x=torch.zeros(2, 9, 1, 3, 3)), "layers has C = 8; wanted 9"),
        (dict(x=torch.zeros(2, 8, 1, 3, 3, dtype=torch.bfloat16)), "x has dtype bfloat16; wanted float32"),
        (dict(y=torch.full((2, 8, 1, 3, 4), 7.0)), "y has W = 4; wanted 3"),
        (dict(skip=torch.zeros(1, 8, 1, 3, 3)), "skip has B = 1; wanted 2"),
        (dict(sums=torch.zeros(2, 8, 9)), "sums has taps = 9; wanted 1"),
        (dict(next_sums=torch.zeros(2, 8, 2)), "next_sums has 2 taps; wanted 1 or 9"),
        (dict(neuron=torch.zeros(2, 2, dtype=torch.int64)), "neuron has L = 2; wanted 1"),
        (dict(scores=torch.zeros(1, 2, 4)), "scores has N = 4; wanted 3"),
        (dict(scores=None), "neuron or scores is None; wanted both"),
        (dict(threads=0), "threads is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(changed, message):
    called = arguments() | changed
    with pytest.raises(ValueError, match=message):
        _C.frozen_layers(**called)
    assert (called["y"] == 7).all()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 8, 3), "scoring has 3 taps"),
        (1, torch.full((3, 8), 8, dtype=torch.int32), "channels lists channel 8; wanted 0 <= channel < 8"),
        (2, torch.tensor([0, 9, 9, 9]), "starts gives a neuron 9 spatial channels"),
        (3, torch.zeros(5), "filters has elements = 5"),
        (4, torch.zeros(2, 8), "bias has N = 2; wanted 3"),
        (5, torch.zeros(3, 4), "mixing_kernel is none of"),
    ],
    ids=["scoring", "channels", "starts", "filters", "bias", "mixing"],
)
def test_bad_weights(position, value, message):
    weights = list(FusedDSTS(8, num_layers=1, num_neurons=3).eval().freeze().layers[0].weights())
    weights[position] = value
    with pytest.raises(ValueError, match=message):
        _C.FrozenLayer(*weights, 0, [1, 1, 1], True)
