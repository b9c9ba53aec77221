"""A layer in evaluation up to mixing, in one native call: bit for bit the ops of its steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsts_kernels import DSTSLayer, ops
from dsts_kernels.backends import BACKENDS, cpu
from dsts_kernels.testing import assert_close

from ...support.modules import pair
from ...support.profiling import profile
from .support import _C, LAYOUTS, filled

CPU = BACKENDS["cpu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(3, 20, 3, 6, 9), (1, 16, 1, 4, 4), (5, 17, 1, 1, 1), (0, 12, 2, 3, 3), (6, 9, 9, 24, 20)]
OPTIONS = {
    "default": {},
    "mean-1x3x3": dict(scoring_kernel=(1, 3, 3), scoring_width=2, score_reduction="mean"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "one-neuron": dict(num_neurons=1, skip=False),
}
pytestmark = pytest.mark.usefixtures("isa", "one_thread", "poisoned_scratch")


def steps(monkeypatch: pytest.MonkeyPatch, call, *arguments, **named):
    """A call in which the ops of single steps run."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(CPU, "one_call", False)
        return call(*arguments, **named)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_same_bits_as_by_steps(monkeypatch, name, size, dtype):
    """Output, neurons and gates of the module; scores but for the last bit."""
    fused = pair(size[1], dtype, **OPTIONS[name])[1].eval()
    x = torch.randn(size).to(dtype)
    with torch.no_grad():
        y, routing = fused(x, return_routing=True)
    theirs, wanted = steps(monkeypatch, fused, x, return_routing=True)
    assert torch.equal(y, theirs) and y.stride() == theirs.stride()
    assert torch.equal(routing.neuron, wanted.neuron) and torch.equal(routing.gate, wanted.gate)
    assert_close(routing.scores, wanted.scores, dtype=torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(monkeypatch, layout):
    """Features in any strides, and weights with gaps."""
    layer = DSTSLayer(18, 11, num_neurons=2).eval()
    layer.spatial.data = torch.randn(2, 11, 36, 1, 3, 3)[:, :, ::2]
    layer.gate.data = torch.randn(36, 2).t()[:, ::2]
    x = filled((2, 18, 3, 5, 7), torch.float32, layout)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, steps(monkeypatch, layer, x))


@pytest.mark.parametrize("open_gates", [0, 18])
def test_one_operator_alone(monkeypatch, open_gates):
    """All channels on one side; a gate of exactly 0, and one that is NaN, is closed."""
    layer = DSTSLayer(18, num_neurons=2).eval()
    layer.gate.data.fill_(0)[:, :open_gates] = 1
    layer.gate.data[1, 3] = torch.nan
    x = torch.randn(4, 18, 2, 5, 5)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, steps(monkeypatch, layer, x)) and y.isfinite().all()


def live(layer: DSTSLayer, x: Tensor) -> tuple | None:
    return ops.live_layer(x, layer.scoring, layer.gate, layer.spatial, layer.temporal)


def test_where_single_ops_run():
    """Where a derivative is wanted, autocast is on, something listens, or the dtype has no fast convolution."""
    layer, x = DSTSLayer(8, num_neurons=2).eval(), torch.randn(1, 8, 2, 3, 3)
    assert live(layer, x) is None
    with torch.no_grad():
        assert live(layer, x) is not None
        assert live(layer.double(), x.double()) is None
        layer.float()
        with torch.autocast("cpu"):
            assert live(layer, x) is None
        with profile():
            assert live(layer, x) is None
        assert live(layer.to("meta"), x) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temporal", torch.ones(2, 8, 7, 3, 1, 1)),
        ("spatial", torch.ones(3)),
        ("scoring", torch.ones(2, 0, 8, 1, 1, 1)),
    ],
)
def test_wrong_arguments_meet_the_checks_of_single_ops(name, value):
    """They raise as they do in training."""
    layer, x = DSTSLayer(8, num_neurons=2).eval(), torch.randn(1, 8, 2, 3, 3)
    setattr(layer, name, torch.nn.Parameter(value))
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name}: got a tensor"):
        layer(x)


def test_a_wrong_option_meets_the_checks_of_single_ops():
    layer, x = DSTSLayer(8, num_neurons=2).eval(), torch.randn(1, 8, 2, 3, 3)
    layer.score_reduction = "median"
    with torch.no_grad(), pytest.raises(ValueError, match="reduction: got 'median'"):
        layer(x)


def test_what_a_norm_gave_to_others_stays():
    """One whose ``forward`` somebody replaced may keep what it returns."""
    layer, x, seen = DSTSLayer(8, num_neurons=2).eval(), torch.randn(1, 8, 2, 3, 3), []
    own = layer.norm.forward
    layer.norm.forward = lambda z: (seen.append(own(z)), seen[0])[1]
    with torch.no_grad():
        y = layer(x)
    assert seen[0].min() < 0 and torch.equal(y, seen[0].relu())


def test_one_call(monkeypatch):
    """Of the native module, where mixing is a product of matrices."""
    layer, asked = DSTSLayer(16, num_neurons=2).eval(), []

    class Spy:
        def __getattr__(self, name: str):
            asked.append(name)
            return getattr(_C, name)

    monkeypatch.setattr(cpu, "_C", Spy())
    with torch.no_grad():
        layer(torch.randn(1, 16, 2, 4, 4))
    assert asked == ["live_layer"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=torch.zeros(2, 4, 1, 3, 3, dtype=torch.float64)), "x has dtype float64; wanted float32"),
        (dict(scoring=torch.zeros(3, 4, 2)), "scoring has 2 taps"),
        (dict(scoring=torch.zeros(2, 4, 1)), "scoring has N = 2; wanted 3"),
        (dict(logits=torch.zeros(3, 5)), "logits has C = 5; wanted 4"),
        (dict(spatial=torch.zeros(3, 6, 4, 3, 1, 1)), "spatial has taps = 3; wanted 9"),
        (dict(temporal=torch.zeros(3, 5, 4, 3, 1, 1)), "temporal has O = 5; wanted 6"),
        (dict(temporal=torch.zeros(3, 6, 4, 3, 1, 2)[..., :1]), "temporal has gaps"),
        (dict(z=torch.full((2, 6, 1, 3, 4), 7.0)), "z has W = 4; wanted 3"),
        (dict(gate=torch.zeros(2, 3)), "gate has C = 3; wanted 4"),
        (dict(neuron=torch.zeros(3, dtype=torch.int64)), "neuron has B = 3; wanted 2"),
        (dict(scores=torch.zeros(2, 2)), "scores has N = 2; wanted 3"),
        (dict(threads=0), "threads is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(changed, message):
    good = dict(
        x=torch.zeros(2, 4, 1, 3, 3), scoring=torch.zeros(3, 4, 1), divisor=1.0, logits=torch.zeros(3, 4),
        spatial=torch.zeros(3, 6, 4, 1, 3, 3), temporal=torch.zeros(3, 6, 4, 3, 1, 1),
        z=torch.full((2, 6, 1, 3, 3), 7.0),
        neuron=torch.zeros(2, dtype=torch.int64), scores=torch.zeros(2, 3), gate=torch.zeros(2, 4), threads=1,
        stage_seconds=None,
    )  # fmt: skip
    called = good | changed
    with pytest.raises(ValueError, match=message):
        _C.live_layer(**called)
    assert (called["z"] == 7).all()
