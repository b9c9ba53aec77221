"""Gated convolution against dense masked convolutions in float64, forward and every gradient, on every target."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.functional import gated_conv3d
from dsts_kernels.ops import mixing_conv3d
from dsts_kernels.ops.gated_conv import backward_op, forward_op
from dsts_kernels.testing import assert_close

from ..support.checks import GATED, assert_same_bits, check, noise_like, opcheck, opchecked
from ..support.inputs import GATES, LAYOUTS, NEURONS, every_second, gated_inputs, mixing_inputs, randn
from ..support.oracles import literal_gated, literal_gradients, literal_mixing, wide
from ..support.targets import dtypes, huge, large
from .stated import NEURON, Dispatch

pytestmark = pytest.mark.usefixtures("poison")

DISPATCH = {
    "gated_conv3d": Dispatch(
        ("x", "gate", "spatial", "temporal"),
        lambda x, gate, spatial, temporal: gated_conv3d(x, gate, NEURON, spatial, temporal),
        lambda x, gate, spatial, temporal: literal_gated(x, gate, NEURON, spatial, temporal),
    )
}

HOST_SIZES = [
    pytest.param(4, 12, 9, (3, 5, 4), id="ragged"),
    pytest.param(2, 48, 32, (8, 7, 7), id="swin-plane"),
    pytest.param(3, 17, 5, (1, 1, 1), id="one-position"),
    pytest.param(2, 8, 8, (4, 1, 6), id="one-row"),
    pytest.param(5, 1, 1, (2, 3, 1), id="one-channel"),
    pytest.param(0, 6, 4, (2, 3, 3), id="empty-batch"),
]


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("batch, channels, outputs, size", HOST_SIZES)
def test_every_gate_in_every_size(backend, batch, channels, outputs, size, gate, neuron):
    """All gates and groupings, ragged channels, planes of one row, an empty batch, in float64."""
    check(GATED, gated_inputs(batch, channels, outputs, size, torch.float64, gate, neuron), backend=backend)


@dtypes
@pytest.mark.parametrize("neuron", [(2, 0, 2), pytest.param("one", marks=large)], ids=["two", "one"])
@pytest.mark.parametrize("gate", GATES)
def test_gates(target, gate, neuron, dtype):
    """Every kind of gate over two K blocks; three neurons, one of them unrouted, or all on one."""
    channels = 72 if dtype.itemsize == 2 else 40
    inputs = gated_inputs(3, channels, 24, target.tiles, dtype, gate, neuron, device=target.device)
    check(GATED, inputs, backend=target.backend)


@dtypes
@pytest.mark.parametrize(
    "channels, outputs", [(1, 1), (5, 9), (33, 40), (40, 33), pytest.param(20, 33, marks=large)], ids=str
)
def test_ragged_channels(target, channels, outputs, dtype):
    """Channels that fill no block, and that tensor descriptors cannot describe; outputs that are not channels."""
    inputs = gated_inputs(2, channels, outputs, target.size, dtype, device=target.device)
    check(GATED, inputs, backend=target.backend)


FLAT = {"one-frame": (1, 5, 4), "one-row": (3, 1, 4), "one-column": (3, 5, 1), "one-position": (1, 1, 1)}


@pytest.mark.parametrize("size", FLAT.values(), ids=FLAT)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=large)], ids=str)
def test_sizes_of_one(target, size, dtype):
    """A single frame, row, column or position."""
    check(GATED, gated_inputs(2, 12, 20, size, dtype, device=target.device), backend=target.backend)


SIZES = [
    pytest.param(1, 33, 20, (3, 6, 5), id="batch-1"),
    pytest.param(8, 64, 64, (8, 7, 7), id="batch-8-swin-plane", marks=huge),
    pytest.param(2, 100, 100, (4, 16, 16), id="tpn-plane", marks=huge),
    pytest.param(32, 16, 24, (3, 6, 5), id="batch-32"),
    pytest.param(2, 300, 280, (3, 9, 11), id="many-blocks", marks=huge),
]


@large
@pytest.mark.parametrize("batch, channels, outputs, size", SIZES)
def test_sizes(target, batch, channels, outputs, size):
    """Batches of 1, 8 and 32, both planes of the paper, channels that no tile divides."""
    inputs = gated_inputs(batch, channels, outputs, size, target.half, device=target.device)
    check(GATED, inputs, backend=target.backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch, channels, outputs, size", [SIZES[1], SIZES[4]])
def test_sizes_in_other_dtypes(target, batch, channels, outputs, size, dtype):
    """The largest of them."""
    inputs = gated_inputs(batch, channels, outputs, size, dtype, device=target.device)
    check(GATED, inputs, backend=target.backend)


@pytest.mark.parametrize(
    "grad_layout", ["channels-first", *(pytest.param(name, marks=large) for name in ("channels-last", "expanded"))]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout, grad_layout):
    """Any stride order of the features and of the gradient that comes back; theirs is laid out like them."""
    inputs = gated_inputs(2, 12, 9, target.size, target.dtype, device=target.device)
    inputs[0] = LAYOUTS[layout](inputs[0])
    grad = noise_like(inputs[0], 9, grad_layout)
    check(GATED, inputs, backend=target.backend, grad=grad)
    dx, *_ = backward_op(grad, *inputs, [True, False, False, False], target.backend)
    assert dx.stride() == torch.empty_like(inputs[0]).stride()


SIDES = ("x", "gate", "spatial", "temporal")
NEEDS = [
    "x", "gate", "x gate", "spatial", "temporal", "spatial temporal", "x spatial temporal", "gate temporal", "nothing",
]  # fmt: skip


@pytest.mark.parametrize(
    "gate, dtype",
    [
        ("hard", torch.float32),
        ("mixed", torch.float32),
        pytest.param("mixed", torch.float16, marks=huge),
        pytest.param("mixed", torch.bfloat16, marks=huge),
    ],
    ids=str,
)
@pytest.mark.parametrize("needs", NEEDS)
def test_only_what_is_needed(target, needs, gate, dtype):
    """Each side alone: a data gradient without gates runs by lists; what nobody needs is not returned."""
    inputs = gated_inputs(2, 40, target.outputs, target.size, dtype, gate, device=target.device)
    wanted = [side in needs.split() for side in SIDES]
    check(GATED, inputs, wanted, forward=False, backend=target.backend)
    if any(wanted) and not target.stand_in:
        check(GATED, inputs, wanted, backend=target.backend)


@pytest.mark.parametrize("neuron, neurons", [([1], 2), ([0, 0, 0], 1), ([16, 3, 16, 0], 17)], ids=str)
def test_groups(target, neuron, neurons):
    """A batch of one, all samples on one neuron, more neurons than samples."""
    inputs = gated_inputs(len(neuron), 12, 8, target.size, target.dtype, "mixed", neuron, neurons, target.device)
    check(GATED, inputs, backend=target.backend)


def test_unrouted_neurons_get_zero(target):
    """Stacked weights: a neuron nobody chose has a gradient, and it is exactly zero."""
    inputs = gated_inputs(4, 40, target.outputs, target.size, target.dtype, neuron=[2, 0, 2, 2], device=target.device)
    for gradient in check(GATED, inputs, [False, False, True, True], backend=target.backend)[1:]:
        assert gradient[1].count_nonzero() == 0 and gradient[2].count_nonzero() > 0


def test_strided_operands(target):
    """Neurons, weights, gates and gradients that are slices, and a gradient that is one number."""
    inputs = gated_inputs(3, 12, 8, target.size, target.dtype, "mixed", [1, 2, 1], device=target.device)
    for index, dim in ((1, 1), (2, 0), (3, 2), (4, 2)):
        inputs[index] = every_second(inputs[index], dim)
    assert not any(inputs[index].is_contiguous() for index in (1, 2, 3, 4))
    check(GATED, inputs, backend=target.backend)
    whole = noise_like(inputs[0], 8)
    for grad in (every_second(whole, 1), whole.new_ones(()).expand(whole.shape)):
        check(GATED, inputs, forward=False, backend=target.backend, grad=grad)


@pytest.mark.parametrize("features, gates", [("float32", "float64"), ("float16", "float32"), ("float32", "float16")])
def test_gates_in_another_dtype(target, features, gates):
    """A gate's gradient comes in the gate's dtype."""
    inputs = gated_inputs(2, 12, 8, target.size, getattr(torch, features), device=target.device)
    inputs[1] = inputs[1].to(getattr(torch, gates))
    check(GATED, inputs, backend=target.backend)


def test_autocast(target):
    """float32 weights and features under autocast: products in float16, gradients of weights in float32."""
    inputs = gated_inputs(3, 12, 12, target.size, torch.float32, device=target.device)
    inputs.append(mixing_inputs(3, 12, dtype=torch.float32, device=target.device)[2])
    trained = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    with torch.autocast(target.device.type, torch.float16):
        z = gated_conv3d(*inputs[:5], backend=target.backend)
        out = mixing_conv3d(z, inputs[2], inputs[5], backend=target.backend)
    assert z.dtype == out.dtype == torch.float16
    grad = randn(*out.shape, dtype=torch.float16, device=target.device)
    ours = torch.autograd.grad(out, trained, grad)

    def literal(*t):
        return literal_mixing(literal_gated(*t[:5]), t[2], t[5])

    assert_close(out, literal(*wide(inputs)))
    for g, h, t in zip(ours, literal_gradients(literal, inputs, grad), trained, strict=True):
        assert g.dtype == t.dtype
        assert_close(g, h, dtype=torch.float16, factor=2)


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(half, marks=large) for half in (torch.float16, torch.bfloat16))], ids=str
)
@pytest.mark.parametrize("neuron", [(1, 1, 0), pytest.param((1, 1, 1), marks=large)], ids=["two-share", "all-share"])
@pytest.mark.parametrize("gate", ["hard", "mixed"])
def test_samples_stay_apart(target, gate, neuron, dtype):
    """NaN and Inf in one sample, its gate or its gradient reach no other."""
    inputs = gated_inputs(3, 40, target.outputs, target.size, dtype, gate, neuron, device=target.device)
    grad, needs = noise_like(inputs[0], target.outputs), [True, True, False, False]

    def run() -> list[torch.Tensor]:
        return [
            gated_conv3d(*inputs, backend=target.backend),
            *backward_op(grad, *inputs, needs, target.backend)[:2],
        ]

    clean = run()
    inputs[0][1, 2], inputs[0][1, 3], inputs[1][1, 4], grad[1, 0, 0] = torch.nan, torch.inf, torch.nan, torch.nan
    for before, after in zip(clean, run(), strict=True):
        # Not bit for bit: a list grows, and the work is shared otherwise.
        assert_close(after[[0, 2]], before[[0, 2]], factor=2)
        assert after[1].isnan().any()


@pytest.mark.parametrize("neuron", [[1, 3, 0], [1, -1, 0], [3, 9, -7]], ids=str)
def test_a_neuron_out_of_range(gpu_target, neuron):
    """Its sample is NaN, all of it; the others are right, and so are the gradients of their neurons' weights."""
    inputs = gated_inputs(3, 12, 12, gpu_target.size, torch.float32, "mixed", neuron, device=gpu_target.device)
    known = [b for b, n in enumerate(neuron) if 0 <= n < 3]
    strays = [b for b in range(3) if b not in known]
    z = gated_conv3d(*inputs, backend=gpu_target.backend)
    grad = noise_like(inputs[0], 12)
    gradients = backward_op(grad, *inputs, [True] * 4, gpu_target.backend)
    by_lists, *_ = backward_op(grad, *inputs, [True, False, False, False], gpu_target.backend)
    for result in (z, *gradients[:2], by_lists):
        assert result[strays].isnan().all() and result[known].isfinite().all()
    if not known:
        assert all(g.count_nonzero() == 0 for g in gradients[2:])
        return
    few = [t[known] if i < 3 else t for i, t in enumerate(inputs)]
    assert_close(z[known], literal_gated(*wide(few)))
    theirs = literal_gradients(literal_gated, few, grad[known])
    for g, h in zip((gradients[0][known], gradients[1][known], *gradients[2:]), theirs, strict=True):
        assert_close(g, h, factor=2)
    assert_close(by_lists[known], theirs[0], factor=2)


def test_an_empty_batch(target):
    """Nothing comes out of nothing, and weights have gradients of zero."""
    inputs = gated_inputs(0, 6, 4, target.size, target.dtype, neuron=[], device=target.device)
    for i in GATED.trained.values():
        inputs[i].requires_grad_()
    out = gated_conv3d(*inputs, backend=target.backend)
    assert out.shape == (0, 4, *target.size)
    leaves = [inputs[i] for i in GATED.trained.values()]
    for gradient, like in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert gradient.shape == like.shape and gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(half, marks=large) for half in (torch.float16, torch.bfloat16))], ids=str
)
def test_repeats_bit_for_bit(target, dtype, in_any_order):
    """The same bits again: five times on a large batch, or twice with blocks of every launch in another order."""
    batch, channels, outputs, size = (3, 40, 12, (2, 4, 5)) if target.stand_in else (8, 96, 80, (8, 7, 7))
    inputs = gated_inputs(batch, channels, outputs, size, dtype, device=target.device)
    grad, runs = noise_like(inputs[0], outputs), []
    for again in range(2 if target.device.type == "cpu" else 5):
        if again:
            in_any_order()
        out = gated_conv3d(*inputs, backend=target.backend)
        runs.append([out, *backward_op(grad, *inputs, [True] * 4, target.backend)])
    assert_same_bits(runs)


def test_opcheck(target):
    """Schema, fakes and dispatch of both ops."""
    dtype, size = opchecked(target)
    inputs = gated_inputs(2, 8, 4, size, dtype, neurons=2, device=target.device)
    opcheck(target, forward_op, *inputs)
    grad = noise_like(inputs[0], 4)
    for needs in ([True, True, False, True],) if target.stand_in else ([True] * 4, [True, False, False, True]):
        opcheck(target, backward_op, grad, *inputs, needs)


def test_gradcheck(backend):
    """Finite differences on soft gates, which are smooth."""
    x, _, neuron, spatial, temporal = gated_inputs(2, 3, 2, (2, 3, 2), torch.float64)
    gate = torch.rand(2, 3, dtype=torch.float64) * 0.8 + 0.1
    tensors = [t.requires_grad_() for t in (x, gate, spatial, temporal)]
    assert torch.autograd.gradcheck(
        lambda x, g, s, t: gated_conv3d(x, g, neuron, s, t, backend=backend), tensors, fast_mode=True
    )


def test_double_backward_is_refused(backend):
    """A second derivative is an error, not a silent zero."""
    inputs = gated_inputs(1, 3, 2, (2, 3, 2), torch.float64)
    inputs[0].requires_grad_()
    (dx,) = torch.autograd.grad(gated_conv3d(*inputs, backend=backend).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_conv3d_backward has no derivative"):
        dx.sum().backward()


BAD = {
    "x-type": ("x", 3, TypeError, "x: got int 3"),
    "x-sparse": ("x", torch.zeros(1, 2, 1, 2, 2).to_sparse(), TypeError, "x: .*sparse_coo"),
    "x-integer": ("x", torch.zeros(2, 4, 1, 2, 2, dtype=torch.int32), TypeError, "x: .*int32"),
    "x-dims": ("x", torch.zeros(2, 4, 2, 2), ValueError, "x: .* wanted 5 dimensions"),
    "x-empty": ("x", torch.zeros(2, 4, 1, 0, 2), ValueError, "x: .* at least 1"),
    "gate": ("gate", torch.zeros(2, 5), ValueError, r"gate: .*wanted shape \(2, 4\)"),
    "neuron-shape": ("neuron", torch.zeros(3, dtype=torch.int64), ValueError, r"neuron: .*wanted shape \(2,\)"),
    "neuron-dtype": ("neuron", torch.zeros(2, dtype=torch.int32), TypeError, "neuron: .*wanted torch.int64"),
    "neuron-high": ("neuron", torch.tensor([0, 3]), ValueError, "neuron: got index 3, wanted 0 <= index < 3"),
    "neuron-low": ("neuron", torch.tensor([-1, 0]), ValueError, "neuron: got index -1"),
    "spatial": ("spatial", torch.zeros(3, 5, 4, 1, 3, 1), ValueError, r"spatial: .*wanted shape \(3, 5, 4, 1, 3, 3\)"),
    "temporal": ("temporal", torch.zeros(3, 6, 4, 3, 1, 1), ValueError, r"temporal: .*wanted shape \(3, 5, 4"),
    "dtype": ("temporal", torch.zeros(3, 5, 4, 3, 1, 1).double(), TypeError, "temporal: .*wanted torch.float32"),
    "device": ("gate", torch.zeros(2, 4, device="meta"), ValueError, "gate: got a tensor on meta, wanted cpu"),
}


@pytest.mark.parametrize("name, value, error, message", BAD.values(), ids=BAD)
def test_bad_input(name, value, error, message):
    """A wrong argument is named, with what came and what was wanted."""
    arguments = dict(
        x=torch.zeros(2, 4, 1, 2, 2),
        gate=torch.zeros(2, 4),
        neuron=torch.zeros(2, dtype=torch.int64),
        spatial=torch.zeros(3, 5, 4, 1, 3, 3),
        temporal=torch.zeros(3, 5, 4, 3, 1, 1),
    )
    with pytest.raises(error, match=message):
        gated_conv3d(**arguments | {name: value})
