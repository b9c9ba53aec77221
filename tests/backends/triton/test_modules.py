"""Whole modules on the Triton backend, in the interpreter: training and frozen, against the literal reference."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks.margins import separate_draws, separate_features
from dsts_kernels import Draws, FusedDSTS, functional, reference
from dsts_kernels.backends import BACKENDS
from dsts_kernels.ops import frozen, gated_conv, mixing, mixing_conv3d, semhash, tap_sums
from dsts_kernels.ops.tap_sums import tap_sums_op
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from .support import KERNELS, SIZE, TILES, TRITON, gated_inputs, interpreted, launch, spy_on

pytestmark = interpreted


@torch.no_grad()
def pair(channels: int, dtype: torch.dtype = torch.float32, **options) -> tuple[reference.DSTS, FusedDSTS]:
    """A reference in float64 and a module with the same rounded weights; gates, scores and statistics are lively."""
    options = dict(num_neurons=3, num_layers=2, score_reduction="mean") | options
    ref = reference.DSTS(channels, dtype=torch.float64, **options)
    fused = FusedDSTS(channels, dtype=dtype, backend="triton", **options)
    for layer in ref.layers:
        layer.gate.normal_()
        layer.scoring.mul_(8 if options["score_reduction"] == "mean" else 8 / (layer.scoring.shape[1] * 60))
        if layer.norm is not None:
            layer.norm.running_mean.normal_(std=0.2)
            layer.norm.running_var.uniform_(0.1, 0.4)
            layer.norm.weight.uniform_(0.5, 1.5)
            layer.norm.bias.normal_(std=0.3)
    fused.load_state_dict(ref.state_dict())
    ref.load_state_dict(fused.state_dict())
    return ref, fused


@contextlib.contextmanager
def kept(module: torch.nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were before."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    yield
    module.load_state_dict(before)


TRAINING = {
    "default": dict(num_layers=3, score_reduction="sum"),
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1), skip=False),
    "all-neurons-gradient": dict(num_layers=1, routing_gradient="all"),
    "bare": dict(norm=None, activation=None),
    "one-neuron": dict(num_neurons=1),
    "many-neurons": dict(num_neurons=17, num_layers=1, hard_fraction=0.0),
}


@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
def test_training_step(options):
    """Output, routing, running statistics and every gradient of the reference, given the same draws."""
    ref, fused = pair(20, **options)
    draws = sample_draws(3, 20, fused.layers[0].num_neurons, len(fused.layers), hard_fraction=0.5)

    def routing(draws: Draws):
        with torch.no_grad(), kept(ref):
            return ref(x, Draws(draws.noise.double(), draws.hard, draws.gumbel.double()), return_routing=True)[1]

    x = torch.randn(3, 20, *SIZE).double()
    draws = separate_draws(routing, draws)
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    inputs[0].data.copy_(inputs[1].data)
    wide = Draws(draws.noise.double(), draws.hard, draws.gumbel.double())
    theirs, their_routing = ref(inputs[0], wide, return_routing=True)
    mine, routing = fused(inputs[1], draws, return_routing=True)
    assert_close(mine, theirs, factor=2)
    assert torch.equal(routing.neuron, their_routing.neuron)
    assert_close(routing.scores, their_routing.scores, name="scores")
    assert_close(routing.gate, their_routing.gate, name="gate")
    grad = torch.randn_like(theirs)
    theirs.backward(grad)
    mine.backward(grad.float())
    assert_close(inputs[1].grad, inputs[0].grad, name="gradient of x", factor=50)
    for (name, p), q in zip(ref.named_parameters(), fused.parameters(), strict=True):
        assert_close(q.grad, p.grad, name=f"gradient of {name}", factor=50)
    for (name, p), q in zip(ref.named_buffers(), fused.buffers(), strict=True):
        assert_close(q.double(), p.double(), dtype=torch.float32, name=name)


FROZEN = {
    "default": dict(num_layers=3, score_reduction="sum"),
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2, num_layers=3),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1), scoring_kernel=(1, 3, 3)),
    "mixing-bare": dict(mixing_kernel=(1, 3, 3), norm=None, activation=None, skip=False),
    "no-skip": dict(skip=False),
    "no-norm": dict(norm=None),
    "no-activation": dict(activation=None),
    "one-neuron": dict(num_neurons=1),
    "many-neurons": dict(num_neurons=17),
    "one-layer": dict(num_layers=1),
}
HALF = ("wide-3x3-scoring", "mixing-1x3x3", "no-skip")


def check_frozen(ref: reference.DSTS, fast: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output and routing of the reference in evaluation, on features that rounding cannot reroute."""

    def routing(x: torch.Tensor):
        with torch.no_grad():
            return ref.eval()(x.double(), return_routing=True)[1]

    x = separate_features(routing, x)
    theirs, their_routing = ref(x.double(), return_routing=True)
    mine, found = fast(x, return_routing=True)
    assert mine.dtype == x.dtype and found.scores.dtype == torch.float32
    assert_close(mine, theirs, factor=2)
    assert torch.equal(found.neuron, their_routing.neuron)
    assert_close(found.scores, their_routing.scores, dtype=x.dtype, name="scores", factor=2)
    assert_close(found.gate, their_routing.gate, name="gate")
    return mine


@pytest.mark.parametrize(
    "options, dtype",
    [
        *(pytest.param(options, torch.float32, id=f"{name}-float32") for name, options in FROZEN.items()),
        *(pytest.param(FROZEN[name], torch.float16, id=f"{name}-float16") for name in ("default", *HALF)),
    ],
)
def test_frozen(options, dtype):
    """Every option, output and routing, from packed weights alone."""
    ref, fused = pair(40, dtype, **options)
    x = torch.randn(3, 40, *(TILES if options == FROZEN["default"] else SIZE)).to(dtype)
    y = check_frozen(ref, fused.eval().freeze(), x)
    assert y.is_contiguous()


@pytest.mark.parametrize("channels, neurons", [(1, 1), (33, 2)])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 4), (1, 5, 1)], ids=str)
def test_frozen_ragged(channels, neurons, size):
    """Channels that descriptors cannot describe, sides of one, channels-last features in and out."""
    ref, fused = pair(channels, num_neurons=neurons)
    x = torch.randn(2, channels, *size)
    y = check_frozen(ref, fused.eval().freeze(), x.contiguous(memory_format=torch.channels_last_3d))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("side", [-1.0, 1.0], ids=["all-temporal", "all-spatial"])
def test_frozen_one_sided(side):
    """Neurons whose panels of one side are empty, one whose sides are both full."""
    ref, fused = pair(40, num_layers=1, num_neurons=2)
    with torch.no_grad():
        for module in (ref, fused):
            module.layers[0].gate[0] = side
    check_frozen(ref, fused.eval().freeze(), torch.randn(3, 40, *SIZE))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_frozen_samples_stay_apart():
    """NaN and Inf in a sample leave the others as they are, and every neuron valid; so does the size of the batch."""
    _, fused = pair(24, skip=False)  # or a ReLU that swallows NaN would not show
    fast, x = fused.eval().freeze(), torch.randn(4, 24, *SIZE)
    clean = fast(x)
    x[1], x[3, 0, 0, 0, 0] = torch.nan, torch.inf
    y, routing = fast(x, return_routing=True)
    assert_close(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().all()
    assert ((routing.neuron >= 0) & (routing.neuron < 3)).all()
    assert fast(x[:0]).shape == (0, 24, *SIZE)
    assert_close(fast(x[2:3]), clean[2:3])


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
def test_repacked_and_back(mixing_kernel):
    """Filters moved to another backend's packing and back are the same to the bit, and run there."""
    _, fused = pair(20, mixing_kernel=mixing_kernel, num_layers=1)
    fast, x = fused.eval().freeze(), torch.randn(2, 20, *SIZE)
    layer, y = fast.layers[0], fast(x)
    before = [layer.filters, layer.mixing]
    for packing in ("plain", "blocked"):
        layer.repack(packing)
        assert layer.packing == packing
        fast.backend = "eager"
        assert_close(fast(x), y, factor=2)
        layer.repack("tiled")
        assert all(a is b or torch.equal(a, b) for a, b in zip(before, (layer.filters, layer.mixing), strict=True))
    fast.backend = "triton"
    assert torch.equal(fast(x), y)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_packed_for_another_backend(backend):
    """A module frozen for another backend is refused with what to do; one frozen for this runs there."""
    if BACKENDS[backend].missing() is not None:
        pytest.skip(BACKENDS[backend].missing())
    _, fused = pair(20, num_layers=1)
    x, fast = torch.randn(2, 20, *SIZE), fused.eval().freeze(backend=backend)
    y, fast.backend = fast(x), "triton"
    with pytest.raises(RuntimeError, match=r"backend: got a module packed .*, wanted one frozen for 'triton'"):
        fast(x)
    tiled = fused.freeze()
    tiled.backend = backend
    assert_close(tiled(x), y, factor=2)


OPS = {
    "tap_sums": lambda x, gate, neuron: tap_sums(x, 9, backend="triton"),
    "semhash_gate": lambda x, gate, neuron: functional.semhash_gate(
        gate, torch.zeros(2, 8), torch.tensor([True, False]), neuron=neuron, backend="triton"
    ),
    "gated_conv3d": lambda x, gate, neuron: functional.gated_conv3d(
        x, gate, neuron, torch.ones(2, 4, 8, 1, 3, 3), torch.ones(2, 4, 8, 3, 1, 1), backend="triton"
    ),
    "mixing_conv3d": lambda x, gate, neuron: mixing_conv3d(x, neuron, torch.ones(2, 8, 8, 1, 3, 3), backend="triton"),
}
LAUNCHED = {
    "tap_sums": ["tap_sums_kernel"],
    "semhash_gate": ["semhash_kernel", "semhash_backward_kernel"],
    "gated_conv3d": ["conv_kernel", "data_gradient_kernel"],
    "mixing_conv3d": ["conv_kernel"],
}


@pytest.mark.parametrize("name", OPS)
def test_compiled(name, monkeypatch):
    """One graph with the kernels in it, forward and backward: the launchers really run, with the same bits."""
    torch._dynamo.reset()
    x, gate = torch.randn(2, 8, *SIZE, requires_grad=True), torch.rand(2, 8).round().requires_grad_()
    neuron, results = torch.tensor([1, 0]), []
    for function in (OPS[name], torch.compile(OPS[name], fullgraph=True, backend="eager")):
        spies = [spy_on(monkeypatch, kernel) for kernel in LAUNCHED[name]]
        y = function(x, gate, neuron)
        found = torch.autograd.grad(y.square().sum(), (x, gate), allow_unused=True)
        assert all(spy.launches for spy in spies)
        results.append([y, *(g for g in found if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_compiles(monkeypatch):
    """A frozen module is one graph, of two launches a layer and one for the first layer's sums."""
    torch._dynamo.reset()
    _, fused = pair(8)
    fast, x = fused.eval().freeze(), torch.randn(2, 8, *SIZE)
    y, spies = fast(x), [spy_on(monkeypatch, name) for name in KERNELS]
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="eager")(x), y)
    assert sum(len(spy.launches) for spy in spies) == 2 * 2 + 1


def test_opcheck():
    """Schema, fake and dispatch of every op on this backend."""
    x, gate, neuron, spatial, temporal = gated_inputs(2, 8, 4, (1, 2, 3), neurons=2)
    grad, w = torch.randn(2, 4, 1, 2, 3), torch.randn(2, 8, 8, 3, 1, 1)
    _, fused = pair(8, num_layers=1, num_neurons=2)
    layer = fused.eval().freeze().layers[0]
    for op, arguments in (
        (gated_conv.forward_op, (x, gate, neuron, spatial, temporal)),
        (gated_conv.backward_op, (grad, x, gate, neuron, spatial, temporal, [True, True, False, True])),
        (mixing.forward_op, (x, neuron, w)),
        (mixing.backward_op, (x, x, neuron, w, [True, False])),
        (semhash.gate_op, (gate, neuron, torch.randn(2, 8), torch.tensor([True, False]))),
        (semhash.backward_op, (gate, gate, neuron, None)),
        (tap_sums_op, (x, 9)),
        (frozen.frozen_layer_op, (x, None, x, *layer.weights(), *layer.options(x, 0))),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.overload, (*arguments, "triton"), test_utils=tests)


def everything(x: torch.Tensor, inputs: list[torch.Tensor], fast: torch.nn.Module) -> list[torch.Tensor]:
    """What every kernel that counts within a sample makes of ``x``."""
    operands, grad = [x, *inputs[1:]], torch.ones(len(x), 12, *SIZE, dtype=x.dtype)
    found = [*TRITON.gated_conv3d_backward(grad, *operands, [True] * 4)]
    found += TRITON.gated_conv3d_backward(grad, *operands, [True, False, False, False])[:1]
    found += TRITON.gated_conv3d_backward(grad, *operands, [False, True, False, False])[1:2]
    return [*found, TRITON.gated_conv3d(*operands), TRITON.tap_sums(x, 1), TRITON.tap_sums(x, 9), fast(x)]


def test_counting_in_64_bits(monkeypatch):
    """Kernels compiled for samples of more than 2^31 elements do the same."""
    inputs = gated_inputs(2, 12, 12)
    _, fused = pair(12)
    fast = fused.eval().freeze()
    wanted = everything(inputs[0], inputs, fast)
    monkeypatch.setattr(launch, "wide", lambda *features: True)
    spies = [spy_on(monkeypatch, "weight_gradient_kernel", WIDE=True)]
    spies += [spy_on(monkeypatch, name) for name in ("conv_kernel", "data_gradient_kernel", "pack_kernel")]
    spies += [spy_on(monkeypatch, name) for name in ("tap_sums_kernel", "route_and_pack_kernel")]
    for mine, theirs in zip(everything(inputs[0], inputs, fast), wanted, strict=True):
        assert torch.equal(mine, theirs)
    for spy in spies:
        assert spy.launches
        assert all(constants["WIDE"] or "WIDE" in spy.constants for _, constants in spy.launches)


FAR = {
    "channels": (2**28, 12, 4, 1),
    "positions": (1, 12 * 2**27, 4 * 2**27, 2**27),
    "frames": (12, 2**31 + 2**10, 4, 1),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space")
@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_a_sample_beyond_2_31_elements(strides):
    """Elements so far apart that 32 bits cannot count to them; offsets that wrap find other numbers."""
    first = 2**31  # what wraps lands before it, in memory that is there
    room = mmap.mmap(-1, (first + 12 * 2**28) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    inputs = gated_inputs(1, 12, 12, dtype=torch.float16)
    _, fused = pair(12, torch.float16, num_layers=1)
    fast = fused.eval().freeze()
    far = torch.frombuffer(room, dtype=torch.float16).as_strided((1, 12, *SIZE), (1, *strides), first)
    far.copy_(inputs[0])
    assert launch.wide(far) and not launch.wide(inputs[0])
    for mine, theirs in zip(everything(far, inputs, fast), everything(inputs[0], inputs, fast), strict=True):
        assert torch.equal(mine, theirs)
