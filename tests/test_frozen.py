"""FrozenDSTS on every target: the reference's evaluation from packed weights alone, in every dtype and layout."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from dsts_kernels import FrozenDSTS, FusedDSTS
from dsts_kernels.backends import convolution, groups
from dsts_kernels.testing import assert_close

from .support import modules
from .support.checks import assert_same_bits
from .support.inputs import FORMATS, LAYOUTS
from .support.modules import assert_same_routing, features_for, reference_output
from .support.targets import Target, dtypes, huge, large

pytestmark = pytest.mark.usefixtures("poison")

OPTIONS = {
    "default": dict(num_layers=3, score_reduction="sum"),
    "wide-3x3-scoring": dict(num_layers=3, scoring_kernel=(1, 3, 3), scoring_width=2),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "no-skip": dict(skip=False),
}
IN_ONE_DTYPE = {  # where a GPU is stood in for
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1), scoring_kernel=(1, 3, 3)),
    "mixing-bare": dict(mixing_kernel=(1, 3, 3), norm=None, activation=None, skip=False),
    "bare": dict(norm=None, activation=None),
    "no-norm": dict(norm=None),
    "no-activation": dict(activation=None),
    "one-neuron": dict(num_neurons=1),
    "many-neurons": dict(num_neurons=17),
    "one-layer": dict(num_layers=1),
}


def pair(target: Target, channels: int, dtype: torch.dtype, **options) -> tuple[torch.nn.Module, FusedDSTS]:
    """:func:`.support.modules.pair` on the target."""
    given = dict(num_layers=2 if target.stand_in else 3, score_reduction="mean") | options
    return modules.pair(channels, dtype, target.backend, target.device, **given)


def check(
    target: Target, dtype: torch.dtype, options: dict, size: tuple[int, ...], layout: str = "channels-first"
) -> None:
    """Output and routing of the reference on features that rounding cannot reroute; laid out as they are."""
    ref, fused = pair(target, size[1], dtype, **options)
    check_frozen(ref, fused.eval().freeze(), target.randn(*size, dtype=dtype), layout)


def check_frozen(ref: torch.nn.Module, fast: FrozenDSTS, x: torch.Tensor, layout: str = "channels-first") -> None:
    x = LAYOUTS[layout](features_for(ref, x))
    theirs, their_routing = reference_output(ref, x)
    y, routing = fast(x, return_routing=True)
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=FORMATS[layout])
    assert_close(y, theirs, factor=2)
    assert_same_routing(routing, their_routing, x.dtype)


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_reference(target, options, dtype):
    """Every option, output and routing, from packed weights alone."""
    grid = target.tiles if options == OPTIONS["default"] else target.size
    check(target, dtype, options, (3, 40, *grid))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        pytest.param(torch.float16, marks=large),
        pytest.param(torch.bfloat16, marks=large),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", IN_ONE_DTYPE.values(), ids=IN_ONE_DTYPE)
def test_more_options(target, options, dtype):
    """The other options."""
    check(target, dtype, options, (3, 40, *target.size))


@pytest.mark.parametrize("channels, neurons", [(1, 1), (33, 2)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 1, 4), (1, 5, 1)], ids=str)
def test_ragged(target, channels, neurons, grid):
    """Channels that descriptors cannot describe, sides of one, channels-last features in and out."""
    check(target, target.dtype, dict(num_neurons=neurons), (2, channels, *grid), "channels-last")


@large
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("channels", [20, 33, pytest.param(100, marks=huge)])
def test_batches_and_ragged_channels(target, batch, channels):
    """Batches of 1, 8, 32; channels that are not multiples of 8."""
    check(target, target.half, {}, (batch, channels, *target.size))


@large
@pytest.mark.parametrize("grid", [(2, 7, 7), (3, 16, 16), (2, 13, 9)], ids=str)
def test_grids(target, grid):
    """Both planes of the paper, and one that no tile divides."""
    check(target, target.half, {}, (3, 72, *grid))


@pytest.mark.parametrize("side", [-1.0, 1.0], ids=["all-temporal", "all-spatial"])
@pytest.mark.parametrize(
    "layers, mixing_kernel",
    [(1, (1, 1, 1)), pytest.param(2, (1, 3, 3), marks=large)],
    ids=["one-layer", "two-that-do-not-fold"],
)
def test_one_sided(target, side, layers, mixing_kernel):
    """Neurons whose panels of one side are empty, one whose sides are both full; mixing folded, and by a kernel."""
    ref, fused = pair(target, 40, target.dtype, num_layers=layers, num_neurons=2, mixing_kernel=mixing_kernel)
    with torch.no_grad():
        for module in (ref, fused):
            for layer in module.layers:
                layer.gate[0] = side
    check_frozen(ref, fused.eval().freeze(), target.randn(3, 40, *target.size))


@large
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout, skip):
    """Any stride order in, without a copy first; the memory format of the input out."""
    fast = pair(target, 40, target.dtype, skip=skip)[1].eval().freeze()
    x = LAYOUTS[layout](target.randn(5, 40, *target.size))
    y = fast(x)
    if layout in FORMATS:
        assert y.is_contiguous(memory_format=FORMATS[layout])
    assert_close(y, fast(x.contiguous()))


@large
def test_samples_do_not_depend_on_their_batch(target):
    """Each sample alone gives what it gave among others."""
    ref, fused = pair(target, 72, target.dtype)
    x = features_for(ref, target.randn(8, 72, 8, 7, 7))
    fast = fused.eval().freeze()
    assert_close(torch.cat([fast(x[i : i + 1]) for i in range(8)]), fast(x))


def test_samples_stay_apart(target):
    """NaN and Inf in a sample leave the others as they are, and every neuron valid; so does the size of the batch."""
    _, fused = pair(target, 24, target.dtype, skip=False)  # or a ReLU that swallows NaN would not show
    fast, x = fused.eval().freeze(), target.randn(4, 24, *target.size)
    clean = fast(x)
    x[1], x[3, 0, 0, 0, 0] = torch.nan, torch.inf
    y, routing = fast(x, return_routing=True)
    assert_close(y[[0, 2]], clean[[0, 2]])  # another split of the work may round otherwise
    assert y[1].isnan().all()
    assert ((routing.neuron >= 0) & (routing.neuron < 3)).all()
    assert_close(fast(x[2:3]), clean[2:3])
    y, routing = fast(x[:0], return_routing=True)
    assert y.shape == (0, 24, *target.size) and routing.scores.shape == (len(fast.layers), 0, 3)


@large
@dtypes
def test_repeats_bit_for_bit(target, dtype):
    """The same bits, ten times over."""
    _, fused = pair(target, 96, dtype)
    fast, x = fused.eval().freeze(), target.randn(8, 96, 8, 7, 7, dtype=dtype)
    assert_same_bits([[fast(x)] for _ in range(3 if target.device.type == "cpu" else 10)])


@large
def test_freeze_to_half(target):
    """A float32 module frozen to half precision takes and returns that and keeps scores in float32."""
    ref, fused = pair(target, 40, torch.float32, num_layers=1)
    x = features_for(ref, target.randn(5, 40, *target.size, dtype=target.half))
    y, routing = fused.eval().freeze(dtype=target.half)(x, return_routing=True)
    assert y.dtype == target.half and routing.scores.dtype == torch.float32
    assert_close(y, reference_output(ref, x)[0])


@large
def test_cast_with_its_model(target):
    """A model cast to half precision takes its frozen module along, packed anew."""
    ref, fused = pair(target, 40, torch.float32, num_layers=1, mixing_kernel=(1, 3, 3))
    x = features_for(ref, target.randn(5, 40, *target.size, dtype=target.half))
    model = torch.nn.Sequential(torch.nn.Identity(), fused.eval().freeze()).to(target.half)
    assert_close(model(x), reference_output(ref, x)[0])


@large
def test_copies(target):
    """deepcopy, torch.save and a state_dict round trip give the same bits."""
    fast = pair(target, 40, target.dtype)[1].eval().freeze()
    x = target.randn(2, 40, *target.size)
    y, buffer = fast(x), io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert isinstance(other, FrozenDSTS) and torch.equal(other(x), y)
        other.load_state_dict(fast.state_dict())
        assert torch.equal(other(x), y)


def test_a_large_batch_in_several_calls(backend, monkeypatch):
    """A batch on one neuron gives the same answers when it is cut into calls; so does the live module."""
    _, fused = modules.pair(8, torch.float64, backend, num_neurons=1, mixing_kernel=(1, 3, 3))
    x = torch.randn(5, 8, 3, 4, 5, dtype=torch.float64)
    whole = fused.eval()(x)
    monkeypatch.setattr(groups, "CALL_POSITIONS", 2 * 60)
    assert_close(fused(x), whole)
    assert_close(fused.freeze()(x), whole)


def test_strided_and_smallest_inputs(backend):
    """Slices, an empty batch, planes of one."""
    ref, fused = modules.pair(6, torch.float64, backend, scoring_kernel=(1, 3, 3))
    fast = fused.eval().freeze()
    ref.eval()
    x = torch.randn(4, 12, 3, 8, 5, dtype=torch.float64)[::2, ::2, :, ::2]
    assert_close(fast(x), ref(x))
    for size in ((0, 6, 2, 3, 3), (1, 6, 1, 1, 1), (2, 6, 4, 1, 3)):
        x = torch.randn(size, dtype=torch.float64)
        assert_close(fast(x), ref(x))


def test_one_gated_convolution_a_layer(backend, monkeypatch):
    """Mixing and norm are folded away: the taps of the open channels are all that is computed."""
    macs = []
    original = convolution.forward
    monkeypatch.setattr(
        convolution, "forward", lambda a, b, k: macs.append(a[..., 0].numel() * b.numel()) or original(a, b, k)
    )
    dsts = FusedDSTS(16, num_layers=1, num_neurons=3, backend=backend).eval()
    _, routing = dsts.freeze(algorithm="direct")(torch.randn(1, 16, 2, 4, 4), return_routing=True)
    spatial = int(routing.gate.sum())
    assert sum(macs) == (9 * spatial + 3 * (16 - spatial)) * 16 * 32
