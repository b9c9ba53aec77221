"""Mixing convolutions by neuron against one convolution a sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.ops import mixing_conv3d
from dsts_kernels.ops.mixing_conv import MIXING_KERNELS, backward_op, forward_op
from dsts_kernels.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")


def sample_inputs(size=(4, 9, 3, 5, 4), kernel=(1, 1, 1), dtype=torch.float64):
    o = size[1]
    mixing = torch.randn(3, o, o, *kernel, dtype=torch.float64) / o**0.5
    return torch.randn(size, dtype=torch.float64).to(dtype), torch.randint(3, size[:1]), mixing.to(dtype)


def literal(z, neuron, mixing):
    padding = tuple(k // 2 for k in mixing.shape[3:])
    rows = [F.conv3d(z[b : b + 1], mixing[n], padding=padding) for b, n in enumerate(neuron.tolist())]
    return torch.cat(rows) if rows else torch.empty_like(z)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kernel", MIXING_KERNELS, ids=str)
@pytest.mark.parametrize("one_neuron", [False, True], ids=["any", "one"])
def test_values_and_gradients(backend, kernel, dtype, one_neuron):
    """All kernels and dtypes, with a batch split over neurons and one that is not."""
    z, neuron, mixing = sample_inputs(kernel=kernel, dtype=dtype)
    neuron = torch.full_like(neuron, 1) if one_neuron else neuron
    wide = z.double(), mixing.double()
    for t in (z, mixing, *wide):
        t.requires_grad_()
    out, ref = mixing_conv3d(z, neuron, mixing, backend=backend), literal(wide[0], neuron, wide[1])
    assert_close(out, ref, dtype=dtype)
    grad = torch.randn(ref.shape, dtype=torch.float64).to(dtype)
    mine = torch.autograd.grad(out, (z, mixing), grad)
    for g, h in zip(mine, torch.autograd.grad(ref, wide, grad.double()), strict=True):
        assert_close(g, h, dtype=dtype, factor=2)


@pytest.mark.parametrize("size", [(0, 4, 2, 3, 3), (2, 5, 1, 1, 1), (3, 1, 2, 3, 1)], ids=str)
def test_small(backend, size):
    """An empty batch, one position, one channel."""
    z, neuron, mixing = sample_inputs(size)
    assert_close(mixing_conv3d(z, neuron, mixing, backend=backend), literal(z, neuron, mixing))


def test_frozen_sides(backend):
    """What needs no gradient gets none; what does is unchanged by it."""
    z, neuron, mixing = sample_inputs()
    both = backward_op(torch.ones_like(z), z, neuron, mixing, [True, True], backend)
    only = backward_op(torch.ones_like(z), z, neuron, mixing, [False, True], backend)
    assert only[0].numel() == 0 and torch.equal(only[1], both[1])


def test_opcheck(backend):
    """Schema, fakes and dispatch of both ops."""
    z, neuron, mixing = sample_inputs(dtype=torch.float32)
    torch.library.opcheck(forward_op.overload, (z, neuron, mixing, backend))
    torch.library.opcheck(backward_op.overload, (torch.randn_like(z), z, neuron, mixing, [True, True], backend))


@pytest.mark.parametrize("shape", [(3, 9, 8, 1, 1, 1), (3, 9, 9, 3, 3, 3), (3, 8, 9, 1, 1, 1)], ids=str)
def test_bad_input(shape):
    """Mixing kernels that are not square in channels or of another extent are named."""
    z, neuron, _ = sample_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mixing: .*wanted \(N, 9, 9, \*kernel\)"):
        mixing_conv3d(z, neuron, torch.zeros(shape))
