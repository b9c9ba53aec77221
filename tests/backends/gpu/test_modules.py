"""Whole modules on a GPU backend: training and frozen, against the literal reference."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks.margins import separate_draws, separate_features
from dsts_kernels import Draws, reference
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import features
from dsts_kernels.ops import gated_conv, mixing_conv, semhash
from dsts_kernels.ops.frozen_layer import frozen_layer_op
from dsts_kernels.ops.tap_sums import tap_sums_op
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from .support import BACKEND, HALF, SIZE, TILES, emulated, everything, gated_inputs, pair

pytestmark = emulated


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
IN_HALF = ("default", "wide-3x3-scoring", "mixing-1x3x3", "no-skip")


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
        *(pytest.param(FROZEN[name], half, id=f"{name}-{str(half)[6:]}") for half in HALF for name in IN_HALF),
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
    fast.backend = BACKEND.name
    assert torch.equal(fast(x), y)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_packed_for_another_backend(backend):
    """A module frozen for another backend is refused with what to do; one frozen for this runs there."""
    if BACKENDS[backend].missing() is not None:
        pytest.skip(BACKENDS[backend].missing())
    _, fused = pair(20, num_layers=1)
    x, fast = torch.randn(2, 20, *SIZE), fused.eval().freeze(backend=backend)
    y, fast.backend = fast(x), BACKEND.name
    with pytest.raises(RuntimeError, match=f"backend: got a module packed .*, wanted one frozen for '{BACKEND.name}'"):
        fast(x)
    tiled = fused.freeze()
    tiled.backend = backend
    assert_close(tiled(x), y, factor=2)


def test_opcheck():
    """Schema, fake and dispatch of every op on this backend."""
    x, gate, neuron, spatial, temporal = gated_inputs(2, 8, 4, (1, 2, 3), neurons=2)
    grad, w = torch.randn(2, 4, 1, 2, 3), torch.randn(2, 8, 8, 3, 1, 1)
    _, fused = pair(8, num_layers=1, num_neurons=2)
    layer = fused.eval().freeze().layers[0]
    for op, arguments in (
        (gated_conv.forward_op, (x, gate, neuron, spatial, temporal)),
        (gated_conv.backward_op, (grad, x, gate, neuron, spatial, temporal, [True, True, False, True])),
        (mixing_conv.forward_op, (x, neuron, w)),
        (mixing_conv.backward_op, (x, x, neuron, w, [True, False])),
        (semhash.gate_op, (gate, neuron, torch.randn(2, 8), torch.tensor([True, False]))),
        (semhash.backward_op, (gate, gate, neuron, None)),
        (tap_sums_op, (x, 9)),
        (frozen_layer_op, (x, None, x, *layer.weights(), *layer.options(0))),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.overload, (*arguments, BACKEND.name), test_utils=tests)


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
    assert features.needs_int64(far) and not features.needs_int64(inputs[0])
    for mine, theirs in zip(everything(far, inputs, fast), everything(inputs[0], inputs, fast), strict=True):
        # Sums over positions may be taken in another order where features lie otherwise.
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
