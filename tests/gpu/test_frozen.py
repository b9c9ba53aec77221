"""FrozenDSTS on the GPU: the reference's evaluation from packed weights alone, in every dtype and layout."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from dsts_kernels import FrozenDSTS, FusedDSTS
from dsts_kernels.testing import assert_close

from ..support.inputs import FORMATS, LAYOUTS
from ..support.modules import assert_same_routing, enliven, features_for, reference_output
from .support import DEVICE, DTYPES, HALF, pair, randn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]

SIZE = (5, 40, 3, 6, 5)
OPTIONS = {
    "default": {},
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2),
    "summed-scores": dict(score_reduction="sum"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "no-skip": dict(skip=False),
    "bare": dict(norm=None, activation=None),
    "one-neuron": dict(num_neurons=1),
    "one-layer": dict(num_layers=1),
}


def check(gpu_backend, dtype, options, size=SIZE) -> None:
    """Output and routing of the reference on features that rounding cannot reroute."""
    ref, fused = pair(gpu_backend, size[1], dtype, **options)
    x = features_for(ref, randn(*size, dtype=dtype))
    theirs, their_routing = reference_output(ref, x)
    mine, routing = fused.eval().freeze()(x, return_routing=True)
    assert mine.dtype == dtype
    assert_close(mine, theirs, factor=2)
    assert_same_routing(routing, their_routing, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(gpu_backend, dtype, options):
    """Every option in every dtype: the mixing kernels that do not fold, and 1x3x3 scoring, too."""
    check(gpu_backend, dtype, options)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("channels", [20, 33, 100])
def test_batches_and_ragged_channels(gpu_backend, batch, channels):
    """Batches of 1, 8, 32; channels that are not multiples of 8."""
    check(gpu_backend, HALF, {}, (batch, channels, 3, 6, 5))


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 1, 3), (2, 7, 7), (3, 16, 16), (2, 13, 9)], ids=str)
def test_grids(gpu_backend, grid):
    """Planes of one position, one row, both of the paper's, and one that no tile divides."""
    check(gpu_backend, HALF, {}, (3, 72, *grid))


@pytest.mark.parametrize("side", [-1.0, 1.0], ids=["all-temporal", "all-spatial"])
@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
def test_one_sided_gates(gpu_backend, side, mixing_kernel):
    """A neuron whose panels of one side are empty."""
    ref, fused = pair(gpu_backend, 40, HALF, mixing_kernel=mixing_kernel)
    with torch.no_grad():
        for module in (ref, fused):
            for layer in module.layers:
                layer.gate[::2] = side
                layer.gate[1::2].abs_().mul_(-side)
    x = features_for(ref, randn(*SIZE, dtype=HALF))
    assert_close(fused.eval().freeze()(x), reference_output(ref, x)[0], factor=2)


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(gpu_backend, layout, skip):
    """Any stride order in, the same values out, in the memory format of the input."""
    _, fused = pair(gpu_backend, 40, HALF, skip=skip)
    fast, x = fused.eval().freeze(), LAYOUTS[layout](randn(*SIZE, dtype=HALF))
    y = fast(x)
    if layout in FORMATS:
        assert y.is_contiguous(memory_format=FORMATS[layout])
    assert_close(y, fast(x.contiguous()))


def test_samples_do_not_depend_on_their_batch(gpu_backend):
    """Each sample alone gives what it gave among others."""
    ref, fused = pair(gpu_backend, 72, HALF)
    x = features_for(ref, randn(8, 72, 8, 7, 7, dtype=HALF))
    fast = fused.eval().freeze()
    assert_close(torch.cat([fast(x[i : i + 1]) for i in range(8)]), fast(x))


def test_samples_stay_apart(gpu_backend):
    """NaN and Inf in one sample leave the others and the routing alone."""
    _, fused = pair(gpu_backend, 40, HALF)
    fast, x = fused.eval().freeze(), randn(*SIZE, dtype=HALF)
    clean = fast(x)
    x[1], x[3, 2] = float("nan"), float("inf")
    y, routing = fast(x, return_routing=True)
    assert_close(y[[0, 2, 4]], clean[[0, 2, 4]])  # another split of the work may round otherwise
    assert ((routing.neuron >= 0) & (routing.neuron < 4)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(gpu_backend, dtype):
    """The same bits, ten times over."""
    _, fused = pair(gpu_backend, 96, dtype)
    fast, x = fused.eval().freeze(), randn(8, 96, 8, 7, 7, dtype=dtype)
    first = fast(x)
    assert all(torch.equal(fast(x), first) for _ in range(10))


def test_freeze_to_half(gpu_backend):
    """A float32 module frozen to half precision takes and returns that and keeps scores in float32."""
    ref, fused = pair(gpu_backend, 40, torch.float32, num_layers=1)
    x = features_for(ref, randn(*SIZE, dtype=HALF))
    y, routing = fused.eval().freeze(dtype=HALF)(x, return_routing=True)
    assert y.dtype == HALF and routing.scores.dtype == torch.float32
    assert_close(y, reference_output(ref, x)[0])


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_moves_between_devices(mixing_kernel):
    """Frozen on one device and moved to the other, either way: packed weights run wherever they are."""
    options = dict(num_neurons=3, mixing_kernel=mixing_kernel, score_reduction="mean")
    dsts = FusedDSTS(40, **options)
    enliven(dsts)
    dsts.eval()
    x = torch.randn(SIZE)
    here = dsts.freeze()
    wanted = here(x)
    assert_close(copy.deepcopy(here).to(DEVICE)(x.to(DEVICE)).cpu(), wanted)
    there = dsts.to(DEVICE).freeze()
    assert_close(there(x.to(DEVICE)).cpu(), wanted)
    assert_close(there.cpu()(x), wanted)


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_files_and_states_of_the_other_device(mixing_kernel, tmp_path):
    """A file or a state from one device is packed for the other, bit for bit, either way."""
    dsts = FusedDSTS(40, num_neurons=3, mixing_kernel=mixing_kernel, score_reduction="mean")
    enliven(dsts)
    x, here = torch.randn(SIZE), dsts.eval().freeze()
    wanted = here(x)
    here.save(tmp_path / "here.pt")
    there = FrozenDSTS.load(tmp_path / "here.pt", DEVICE)
    assert {layer.packing for layer in there.layers} == {"tiled"}
    assert_close(there(x.to(DEVICE)).cpu(), wanted)
    there.save(tmp_path / "there.pt")
    back = FrozenDSTS.load(tmp_path / "there.pt")
    assert torch.equal(back(x), wanted)
    enliven(dsts)
    other = dsts.freeze()
    back.load_state_dict(there.state_dict())
    there.load_state_dict(other.state_dict())
    assert torch.equal(back(x), wanted)
    assert_close(there(x.to(DEVICE)).cpu(), other(x))


def test_cast_with_its_model(gpu_backend):
    """A model cast to half precision on the GPU takes its frozen module along, tiles laid out anew."""
    ref, fused = pair(gpu_backend, 40, torch.float32, num_layers=1, mixing_kernel=(1, 3, 3))
    x = features_for(ref, randn(*SIZE, dtype=HALF))
    model = torch.nn.Sequential(torch.nn.Identity(), fused.eval().freeze()).to(HALF)
    assert_close(model(x), reference_output(ref, x)[0])


def test_refuses_layers_on_two_devices():
    """A layer elsewhere than the first is named."""
    dsts = FusedDSTS(40, num_neurons=3).eval()
    dsts.layers[1].to(DEVICE)
    with pytest.raises(ValueError, match=r"layers.1.gate: got a tensor on cuda:0, wanted cpu"):
        dsts.freeze()


def test_copies(gpu_backend):
    """deepcopy, torch.save and a state_dict round trip give the same bits."""
    _, fused = pair(gpu_backend, 40, HALF)
    fast, x = fused.eval().freeze(), randn(*SIZE, dtype=HALF)
    y = fast(x)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), y)
        other.load_state_dict(fast.state_dict())
        assert torch.equal(other(x), y)


def test_empty_batch(gpu_backend):
    """No samples pass through."""
    fast = FusedDSTS(24, num_neurons=3, device=DEVICE, dtype=HALF, backend=gpu_backend).eval().freeze()
    x = torch.empty(0, 24, 2, 3, 3, device=DEVICE, dtype=HALF)
    y, routing = fast(x, return_routing=True)
    assert y.shape == x.shape and routing.scores.shape == (3, 0, 3)
