"""The float64 oracles are convolutions, and the reference computes with them what it computes with torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels import reference
from dsts_kernels.testing import assert_close

from .oracles import conv3d, products


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
def test_products_are_convolutions(kernel):
    """Values and both gradients of torch's own convolution, padded as the reference pads."""
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, *kernel, dtype=torch.float64, requires_grad=True)
    padding = tuple(k // 2 for k in kernel)
    mine, theirs = conv3d(x, weight, padding), F.conv3d(x, weight, padding=padding)
    assert_close(mine, theirs)
    grad = torch.randn_like(theirs)
    for g, h in zip(
        torch.autograd.grad(mine, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True
    ):
        assert_close(g, h)


def test_the_reference_is_left_as_it_was():
    """Inside the block the reference gives what it gives outside, and outside it convolves as before."""
    ref = reference.DSTS(6, num_neurons=2, scoring_kernel=(1, 3, 3), dtype=torch.float64).eval()
    x = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    with products():
        assert reference.F is not F
        inside = ref(x)
    assert reference.F is F
    assert_close(inside, ref(x))
