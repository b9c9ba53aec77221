"""Mixing convolutions by neuron against one convolution a sample in float64, on every target."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.ops import mixing_conv3d
from dsts_kernels.ops.mixing_conv import MIXING_KERNELS, backward_op, forward_op
from dsts_kernels.testing import assert_close

from ..support.checks import MIXING, assert_same_bits, check, opcheck, opchecked
from ..support.inputs import LAYOUTS, every_second, mixing_inputs, randn
from ..support.oracles import literal_gradients, literal_mixing, wide
from ..support.targets import dtypes, huge, large
from .stated import NEURON, Dispatch

pytestmark = pytest.mark.usefixtures("poison")

DISPATCH = {
    "mixing_conv3d": Dispatch(
        ("x", "mixing"),
        lambda x, mixing: mixing_conv3d(x, NEURON, mixing),
        lambda x, mixing: literal_mixing(x, NEURON, mixing),
    )
}
kernels = pytest.mark.parametrize("kernel", MIXING_KERNELS, ids=str)


@dtypes
@kernels
@pytest.mark.parametrize("outputs", [24, 33])
@pytest.mark.parametrize("neuron", [(3, 0, 3), pytest.param("one", marks=large)], ids=str)
def test_values_and_gradients(target, kernel, outputs, neuron, dtype):
    """All kernels and dtypes, whole and ragged blocks; what nobody chose has a gradient of exactly zero."""
    size = target.tiles if outputs == 24 else target.size
    inputs = mixing_inputs(3, outputs, size, kernel, dtype, neuron, 4, target.device)
    *_, gradient = check(MIXING, inputs, backend=target.backend)
    assert gradient[[1, 2]].count_nonzero() == 0 and gradient[3].count_nonzero() > 0


@huge
@dtypes
@kernels
def test_a_whole_plane(target, kernel, dtype):
    """Channels of whole tiles."""
    check(MIXING, mixing_inputs(8, 64, (8, 7, 7), kernel, dtype, device=target.device), backend=target.backend)


SIZES = [
    (1, 20, 3, 6, 5),
    (32, 24, 3, 6, 5),
    (2, 5, 1, 1, 1),
    (3, 1, 2, 3, 1),
    pytest.param((2, 280, 2, 9, 11), marks=huge),
    (0, 4, 2, 3, 3),
]


@large
@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(target, size, kernel):
    """Batches of 0, 1 and 32, one position, one channel, many blocks; every sample on one neuron."""
    inputs = mixing_inputs(*size[:2], size[2:], kernel, target.half, "one", device=target.device)
    check(MIXING, inputs, backend=target.backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 3, 3), (1, 1, 1)], ids=str)
def test_layouts(target, kernel, layout):
    """Features in any stride order, a slice of weights and a slice of neurons."""
    z, neuron, mixing = mixing_inputs(3, 12, target.size, kernel, target.dtype, [1, 2, 1], device=target.device)
    inputs = [LAYOUTS[layout](z), every_second(neuron), every_second(mixing, 2)]
    check(MIXING, inputs, [not target.stand_in] * 2, backend=target.backend)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["z", "mixing"])
@kernels
def test_only_what_is_needed(target, kernel, needs):
    """What needs no gradient gets none; what does is unchanged by it, to the bit."""
    inputs = mixing_inputs(3, 24, target.size, kernel, target.dtype, device=target.device)
    grad = randn(*inputs[0].shape, dtype=target.dtype, device=target.device)
    both = backward_op(grad, *inputs, [True, True], target.backend)
    only = backward_op(grad, *inputs, list(needs), target.backend)
    for need, one, other in zip(needs, only, both, strict=True):
        assert torch.equal(one, other) if need else not one.numel()
    if not target.stand_in:
        check(MIXING, inputs, needs, backend=target.backend)


def test_an_empty_batch(target):
    """No samples: an empty result and a gradient of zero."""
    z, neuron, mixing = mixing_inputs(0, 4, target.size, dtype=target.dtype, neuron=[], device=target.device)
    out = mixing_conv3d(z.requires_grad_(), neuron, mixing.requires_grad_(), backend=target.backend)
    assert out.shape == z.shape
    dz, dmixing = torch.autograd.grad(out.sum(), (z, mixing))
    assert dz.shape == z.shape and dmixing.shape == mixing.shape and dmixing.count_nonzero() == 0


def test_samples_stay_apart(target):
    """NaN in one sample, or Inf in its gradient, leaves the others finite."""
    inputs = mixing_inputs(4, 40, target.size, (1, 3, 3), target.dtype, "one", device=target.device)
    inputs[0][1, 3] = torch.nan
    grad = torch.randn_like(inputs[0])
    grad[1] = torch.inf
    out = mixing_conv3d(*inputs, backend=target.backend)
    for result in (out, backward_op(grad, *inputs, [True, False], target.backend)[0]):
        assert result[[0, 2, 3]].isfinite().all() and not result[1].isfinite().all()


@pytest.mark.parametrize("kernel", [(1, 3, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("neuron", [[1, 3, 0], [1, -1, 0], [3, 9, -7]], ids=str)
def test_a_neuron_out_of_range(gpu_target, neuron, kernel):
    """Its sample is NaN, all of it; the others are right, and so are the gradients of their neurons' weights."""
    inputs = mixing_inputs(3, 12, gpu_target.size, kernel, torch.float32, neuron, device=gpu_target.device)
    known = [b for b, n in enumerate(neuron) if 0 <= n < 3]
    strays = [b for b in range(3) if b not in known]
    out = mixing_conv3d(*inputs, backend=gpu_target.backend)
    grad = torch.randn_like(out)
    dz, dmixing = backward_op(grad, *inputs, [True, True], gpu_target.backend)
    assert out[strays].isnan().all() and out[known].isfinite().all()
    if not known:
        assert dmixing.count_nonzero() == 0
        return
    few = [inputs[0][known], inputs[1][known], inputs[2]]
    assert_close(out[known], literal_mixing(*wide(few)))
    wanted = literal_gradients(literal_mixing, few, grad[known])
    assert_close(dz[known], wanted[0], factor=2)
    assert_close(dmixing, wanted[1], factor=2)


def test_repeats_bit_for_bit(target, in_any_order):
    """The same bits again: five times, or twice with blocks of every launch in another order."""
    size = (2, 4, 5) if target.stand_in else (8, 7, 7)
    inputs = mixing_inputs(3, 12 if target.stand_in else 80, size, (1, 3, 3), target.dtype, device=target.device)
    grad, runs = torch.randn_like(inputs[0]), []
    for again in range(2 if target.device.type == "cpu" else 5):
        if again:
            in_any_order()
        out = mixing_conv3d(*inputs, backend=target.backend)
        runs.append([out, *backward_op(grad, *inputs, [True, True], target.backend)])
    assert_same_bits(runs)


def test_opcheck(target):
    """Schema, fakes and dispatch of both ops."""
    dtype, size = opchecked(target)
    z, neuron, mixing = mixing_inputs(2, 8, size, (3, 1, 1), dtype, neurons=2, device=target.device)
    opcheck(target, forward_op, z, neuron, mixing)
    for needs in ([True, False], *([] if target.stand_in else ([True, True],))):
        opcheck(target, backward_op, torch.randn_like(z), z, neuron, mixing, needs)


@pytest.mark.parametrize("shape", [(3, 9, 8, 1, 1, 1), (3, 9, 9, 3, 3, 3), (3, 8, 9, 1, 1, 1)], ids=str)
def test_bad_input(shape):
    """Mixing kernels that are not square in channels or of another extent are named."""
    z, neuron, _ = mixing_inputs(4, 9)
    with pytest.raises(ValueError, match=r"mixing: .*wanted \(N, 9, 9, \*kernel\)"):
        mixing_conv3d(z, neuron, torch.zeros(shape))
