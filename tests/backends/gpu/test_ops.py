"""The ops' kernels against literal formulas in float64: values, gradients, every layout and size.

Memory that nobody wrote is NaN throughout, so a mask that lets padding through fails here.
"""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.backends import BACKENDS
from dsts_kernels.functional import gated_conv3d
from dsts_kernels.ops import mixing_conv3d
from dsts_kernels.testing import assert_close

from .support import (
    BACKEND,
    GATES,
    LAYOUTS,
    SIZE,
    TILES,
    check_gated,
    dtypes,
    emulated,
    gated_inputs,
    literal_gated,
    literal_gradients,
    literal_mixing,
    wide,
)

pytestmark = emulated
EAGER = BACKENDS["eager"]


@dtypes
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, dtype):
    """Every kind of gate, forward and backward, over two K blocks and three neurons, one of them unrouted."""
    check_gated(gated_inputs(3, 40 if dtype == torch.float32 else 72, 24, TILES, dtype, gate, [2, 0, 2]))


@pytest.mark.parametrize("size", [(1, 5, 4), (3, 1, 4), (3, 5, 1), (1, 1, 1)], ids=str)
def test_sizes_of_one(size):
    """A single frame, row, column or position."""
    check_gated(gated_inputs(2, 12, 20, size))


@dtypes
@pytest.mark.parametrize("channels, outputs", [(1, 1), (5, 9), (33, 40), (40, 33)], ids=str)
def test_ragged_channels(channels, outputs, dtype):
    """Channels that fill no block, and that tensor descriptors cannot describe; outputs that are not channels."""
    check_gated(gated_inputs(2, channels, outputs, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Any stride order of the features, in and out of the backward pass; the gradient is laid out like them."""
    inputs = gated_inputs(2, 12, 8)
    inputs[0] = LAYOUTS[layout](inputs[0])
    check_gated(inputs)
    dx, *_ = BACKEND.gated_conv3d_backward(torch.randn(2, 8, *SIZE), *inputs, [True, False, False, False])
    assert dx.stride() == torch.empty_like(inputs[0]).stride()


NEEDS = {
    "x": (True, False, False, False),
    "gate": (False, True, False, False),
    "x-gate": (True, True, False, False),
    "spatial": (False, False, True, False),
    "temporal": (False, False, False, True),
    "operators": (False, False, True, True),
    "x-operators": (True, False, True, True),
    "nothing": (False, False, False, False),
}


@pytest.mark.parametrize("gate", ["hard", "mixed"])
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_only_what_is_needed(needs, gate):
    """Each side alone: a data gradient without gates runs by lists; what nobody needs is not returned."""
    check_gated(gated_inputs(2, 40, 12, gate=gate), needs, forward=False)


@pytest.mark.parametrize("neuron, neurons", [([1], 2), ([0, 0, 0], 1), ([16, 3, 16, 0], 17)], ids=str)
def test_groups(neuron, neurons):
    """A batch of one, all samples on one neuron, more neurons than samples."""
    check_gated(gated_inputs(len(neuron), 12, 8, neuron=neuron, neurons=neurons))


def test_strided_operands():
    """Neurons, weights, gates and gradients that are slices, and a gradient that is one number."""
    x, gate, _, spatial, temporal = gated_inputs(3, 12, 8)
    neuron = torch.tensor([1, 99, 2, 99, 1, 99])[::2]
    spatial, gate = torch.randn(3, 8, 24, 1, 3, 3)[:, :, ::2], torch.rand(3, 24)[:, ::2]
    inputs = [x, gate, neuron, spatial, temporal]
    check_gated(inputs)
    for grad in (torch.randn(3, 16, *SIZE)[:, ::2], torch.ones(()).expand(3, 8, *SIZE)):
        found = BACKEND.gated_conv3d_backward(grad, *inputs, [True] * 4)
        for mine, theirs in zip(found, literal_gradients(literal_gated, inputs, grad), strict=True):
            assert_close(mine, theirs, factor=2)


@pytest.mark.parametrize("features, gates", [("float32", "float64"), ("float16", "float32"), ("float32", "float16")])
def test_gates_in_another_dtype(features, gates):
    """A gate's gradient comes in the gate's dtype."""
    inputs = gated_inputs(2, 12, 8, dtype=getattr(torch, features))
    inputs[1] = inputs[1].to(getattr(torch, gates))
    check_gated(inputs)


def test_autocast():
    """float32 weights and features under autocast: products in float16, gradients of weights in float32."""
    inputs = gated_inputs(3, 12, 12)
    mixing = torch.randn(3, 12, 12, 1, 1, 1) / 4
    trained = [t.requires_grad_() for t in (*inputs, mixing) if t.is_floating_point()]
    with torch.autocast("cpu", torch.float16):
        z = gated_conv3d(*inputs, backend=BACKEND.name)
        out = mixing_conv3d(z, inputs[2], mixing, backend=BACKEND.name)
    assert z.dtype == out.dtype == torch.float16
    grad = torch.randn(out.shape)
    mine = torch.autograd.grad(out, trained, grad.half())
    ref = [t.requires_grad_() if t.is_floating_point() else t for t in wide([*inputs, mixing])]
    theirs_out = literal_mixing(literal_gated(*ref[:5]), ref[2], ref[5])
    theirs = torch.autograd.grad(theirs_out, [t for t in ref if t.is_floating_point()], grad.double())
    assert_close(out, theirs_out)
    for g, h, t in zip(mine, theirs, trained, strict=True):
        assert g.dtype == t.dtype
        assert_close(g, h, dtype=torch.float16, factor=2)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("gate", ["hard", "mixed"])
def test_samples_stay_apart(gate):
    """NaN and Inf in one sample, its gate or its gradient reach no other."""
    inputs = gated_inputs(3, 40, 12, gate=gate, neuron=[1, 1, 0])
    grad = torch.randn(3, 12, *SIZE)
    needs = [True, True, False, False]
    clean = [BACKEND.gated_conv3d(*inputs), *BACKEND.gated_conv3d_backward(grad, *inputs, needs)[:2]]
    inputs[0][1, 2], inputs[0][1, 3], inputs[1][1, 4], grad[1, 0, 0] = float("nan"), float("inf"), torch.nan, torch.nan
    dirty = [BACKEND.gated_conv3d(*inputs), *BACKEND.gated_conv3d_backward(grad, *inputs, needs)[:2]]
    for before, after in zip(clean, dirty, strict=True):
        assert_close(after[[0, 2]], before[[0, 2]])  # not bit for bit: its lists grow, and the work is shared otherwise
        assert after[1].isnan().any()


@pytest.mark.parametrize("neuron", [[1, 3, 0], [1, -1, 0], [3, 9, -7]], ids=str)
def test_a_neuron_out_of_range(neuron):
    """Its sample is NaN, all of it; the others are right, and so are the gradients of their neurons' weights."""
    inputs = gated_inputs(3, 12, 12, neuron=neuron)
    mixing, known = torch.randn(3, 12, 12, 1, 3, 3) / 10, [b for b, n in enumerate(neuron) if 0 <= n < 3]
    other = [b for b in range(3) if b not in known]
    z = BACKEND.gated_conv3d(*inputs)
    zero = torch.where(z.isnan(), 0.0, z)
    mixed = BACKEND.mixing_conv3d(zero, inputs[2], mixing)
    straight = BACKEND.mixing_conv3d(zero, inputs[2], mixing[..., :1, :1].contiguous())
    for out in (z, mixed, straight):
        assert out[other].isnan().all() and out[known].isfinite().all()
    grad = torch.randn(z.shape)
    found = BACKEND.gated_conv3d_backward(grad, *inputs, [True] * 4)
    frozen = BACKEND.gated_conv3d_backward(grad, *inputs, [True, False, False, False])[0]
    for gradient in (*found[:2], frozen):
        assert gradient[other].isnan().all() and gradient[known].isfinite().all()
    filters = BACKEND.mixing_conv3d_backward(grad, zero, inputs[2], mixing, [True, True])
    few = [t[known] if i < 3 else t for i, t in enumerate(inputs)]
    if known:
        assert_close(z[known], literal_gated(*wide(few)))
        theirs = literal_gradients(literal_gated, few, grad[known])
        for index, mine in enumerate((found[0][known], found[1][known], *found[2:])):
            assert_close(mine, theirs[index], factor=2)
        theirs = literal_gradients(literal_mixing, [zero[known], few[2], mixing], grad[known])
        assert_close(filters[0][known], theirs[0], factor=2)
        assert_close(filters[1], theirs[1], factor=2)
    else:
        assert all(g.count_nonzero() == 0 for g in (*found[2:], filters[1]))


def test_an_empty_batch():
    """Nothing comes out of nothing, and weights have gradients of zero."""
    inputs = gated_inputs(0, 6, 4, neuron=[])
    out = BACKEND.gated_conv3d(*inputs)
    assert out.shape == (0, 4, *SIZE)
    for mine, like in zip(
        BACKEND.gated_conv3d_backward(out, *inputs, [True] * 4),
        (t for i, t in enumerate(inputs) if i != 2),
        strict=True,
    ):
        assert mine.shape == like.shape and mine.count_nonzero() == 0
    mixing = torch.randn(3, 4, 4, 1, 1, 1)
    dz, dmixing = BACKEND.mixing_conv3d_backward(out, out, inputs[2], mixing, [True, True])
    assert dz.shape == out.shape and dmixing.count_nonzero() == 0
    assert BACKEND.mixing_conv3d(out, inputs[2], mixing).shape == out.shape
    assert BACKEND.tap_sums(inputs[0], 9).shape == (0, 6, 9)
    assert BACKEND.semhash_gate(torch.randn(3, 6), inputs[2], None, None).shape == (0, 6)
    assert BACKEND.semhash_gate_backward(torch.randn(0, 6), torch.randn(3, 6), inputs[2], None).count_nonzero() == 0


def test_repeats_bit_for_bit(in_any_order):
    """The same bits again, with the programs of every launch in another order."""
    inputs, runs = gated_inputs(3, 40, 12, (2, 4, 5)), []
    mixing, grad = torch.randn(3, 12, 12, 1, 3, 3), torch.randn(3, 12, 2, 4, 5)
    for again in range(2):
        if again:
            in_any_order()
        z = BACKEND.gated_conv3d(*inputs)
        gradients = BACKEND.gated_conv3d_backward(grad, *inputs, [True] * 4)
        more = BACKEND.mixing_conv3d_backward(grad, z, inputs[2], mixing, [True, True])
        runs.append([z, *gradients, BACKEND.mixing_conv3d(z, inputs[2], mixing), *more, BACKEND.tap_sums(z, 9)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@dtypes
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("outputs", [24, 33])
def test_mixing(kernel, outputs, dtype):
    """All three mixing kernels, forward and backward, with and without descriptors; each gradient alone too."""
    size = TILES if outputs == 24 else SIZE
    z, neuron = torch.randn(3, outputs, *size).to(dtype), torch.tensor([3, 0, 3])
    mixing = (torch.randn(4, outputs, outputs, *kernel) / (outputs * sum(kernel)) ** 0.5).to(dtype)
    out = BACKEND.mixing_conv3d(z, neuron, mixing)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(out, literal_mixing(*wide([z, neuron, mixing])))
    grad = torch.randn(out.shape).to(dtype)
    theirs = literal_gradients(literal_mixing, [z, neuron, mixing], grad)
    mine = BACKEND.mixing_conv3d_backward(grad, z, neuron, mixing, [True, True])
    for g, h in zip(mine, theirs, strict=True):
        assert g.dtype == dtype
        assert_close(g, h, factor=2)
    assert mine[1][[1, 2]].count_nonzero() == 0
    if outputs == 24 and dtype == torch.float32:
        for need in ([True, False], [False, True]):
            found = BACKEND.mixing_conv3d_backward(grad, z, neuron, mixing, need)
            assert [g is not None for g in found] == need
            assert all(torch.equal(g, h) for g, h in zip(found, mine, strict=True) if g is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixing_layouts(layout):
    """Features in any stride order, a slice of weights and a slice of neurons."""
    z, mixing = LAYOUTS[layout](torch.randn(3, 12, *SIZE)), torch.randn(3, 12, 24, 1, 3, 3)[:, :, ::2]
    neuron = torch.tensor([1, 9, 2, 9, 1, 9])[::2]
    for own in (mixing, mixing[..., :1, :1]):
        assert_close(BACKEND.mixing_conv3d(z, neuron, own), literal_mixing(*wide([z, neuron, own])))


@dtypes
@pytest.mark.parametrize("channels", [1, 70, 1100])
def test_semhash(channels, dtype):
    """Hard, soft and mixed batches, with and without neurons and noise; the gradient into shared rows."""
    logits, noise = torch.randn(5, channels).to(dtype) * 2, torch.randn(4, channels).to(dtype)
    neuron, hard = torch.tensor([0, 4, 4, 1]), torch.tensor([True, False, False, True])
    for n, e, h in ((neuron, noise, hard), (neuron, None, None), (neuron, noise, ~hard)):
        ref = EAGER.semhash_gate(*(None if t is None else wide([t])[0] for t in (logits, n, e, h)))
        assert_close(BACKEND.semhash_gate(logits, n, e, h), ref, dtype=dtype)
    plain = BACKEND.semhash_gate(logits, None, None, torch.zeros(5, dtype=torch.bool))
    assert_close(plain, EAGER.semhash_gate(logits.double(), None, None, torch.zeros(5, dtype=torch.bool)), dtype=dtype)
    grad = torch.randn(4, channels).to(dtype)
    for n, e, logits_, g in (
        (neuron, noise, logits, grad),
        (None, None, logits[:4], grad),
        (neuron, None, logits, grad),
    ):
        ref = EAGER.semhash_gate_backward(g.double(), logits_.double(), n, None if e is None else e.double())
        assert_close(BACKEND.semhash_gate_backward(g, logits_, n, e), ref, dtype=dtype)


def test_semhash_strided():
    """Slices of everything; a neuron out of range gives NaN for its sample and no gradient."""
    logits, noise = torch.randn(5, 40)[:, ::2], torch.randn(3, 40)[:, ::2]
    neuron, hard = torch.tensor([0, 9, 4, 9, 1, 9])[::2], torch.tensor([True, False, False, True, True, False])[::2]
    wanted = EAGER.semhash_gate(logits, neuron, noise, hard)
    assert_close(BACKEND.semhash_gate(logits, neuron, noise, hard), wanted)
    grad = torch.randn(3, 40)[:, ::2]
    gradient = EAGER.semhash_gate_backward(grad, logits, neuron, noise)
    assert_close(BACKEND.semhash_gate_backward(grad, logits, neuron, noise), gradient)
    far = torch.tensor([0, 5, -1])
    for h in (None, hard, ~hard):
        gate = BACKEND.semhash_gate(logits, far, noise, h)
        assert gate[0].isfinite().all() and gate[1:].isnan().all()
    only = EAGER.semhash_gate_backward(grad[:1], logits, far[:1], noise[:1])
    assert_close(BACKEND.semhash_gate_backward(grad, logits, far, noise), only)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 5, 4), (1, 1, 1), (2, 1, 70), (5, 9, 1)], ids=str)
def test_tap_sums(size, layout, dtype):
    """One and nine taps over any layout and size, in float32 whatever the features are; the same bits again."""
    x = LAYOUTS[layout](torch.randn(2, 37, *size).to(dtype))
    for taps in (1, 9):
        found = BACKEND.tap_sums(x, taps)
        assert found.dtype == torch.float32
        assert_close(found, EAGER.tap_sums(x.double(), taps))
        assert torch.equal(found, BACKEND.tap_sums(x, taps))
