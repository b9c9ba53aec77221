"""Weight gradients of fast convolution against autograd on the formula in float64, on poisoned scratch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends import BACKENDS, cpu
from dsts_kernels.testing import assert_close

from .winograd_support import DTYPES, LAYOUTS, SHAPES, every_tile, formula, half_gate, laid, lists_of, operators_of

pytestmark = pytest.mark.usefixtures("poisoned_scratch")


def gradient_formula(x, grad, gate, shapes):
    """Gradients of both filters by autograd on the formula, in float64."""
    filters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return torch.autograd.grad(formula(x, gate, *filters), filters, grad.double())


def weight_gradients(
    x: Tensor,
    grad: Tensor,
    gate: Tensor,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    add: list[Tensor] | None = None,
    samples: Tensor | None = None,
) -> list[Tensor]:
    """Both gradients; hard gates write their listed channels only. ``add``: what to start from."""
    totals = [torch.full(shape, torch.nan, dtype=dtype) for shape in shapes] if add is None else add
    BACKENDS["cpu"].winograd_weight_gradient(x, grad, samples, *operators_of(gate, totals), add is not None)
    return totals


def shapes_of(outputs, channels):
    return (outputs, channels, 1, 3, 3), (outputs, channels, 3, 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa, shape, layout):
    """Listed channels (the others left alone) and scaled channels, in any layout; then added to what is there."""
    batch, channels, outputs, grid = shape
    x, grad = (laid(torch.randn(batch, c, *grid), layout) for c in (channels, outputs))
    sizes = shapes_of(outputs, channels)
    for gate in (half_gate(x), torch.rand(batch, channels), torch.ones(batch, channels)):
        refs = gradient_formula(x, grad, gate, sizes)
        gradients = weight_gradients(x, grad, gate, sizes)
        for gradient, ref, listed in zip(gradients, refs, lists_of(gate), strict=True):
            written = torch.full((channels,), listed is None)
            if listed is not None:
                written[listed.long()] = True
            if written.any():
                assert_close(gradient[:, written], ref[:, written])
            assert torch.isnan(gradient[:, ~written]).all()
        start = [torch.randn_like(gradient) for gradient in gradients]
        added = weight_gradients(x, grad, gate, sizes, add=[s.clone() for s in start])
        for gradient, before, ref in zip(added, start, refs, strict=True):
            assert_close(gradient, before.double() + ref)


@every_tile
def test_every_tile(isa, tiles, monkeypatch):
    """Each tile gives the same gradient, also where it does not divide the size."""
    monkeypatch.setattr(cpu, "tile_sizes", lambda *sizes: tiles)
    x, grad, gate = torch.randn(1, 24, 5, 6, 7), torch.randn(1, 17, 5, 6, 7), torch.rand(1, 24)
    gradients = weight_gradients(x, grad, gate, shapes_of(17, 24))
    for gradient, ref in zip(gradients, gradient_formula(x, grad, gate, shapes_of(17, 24)), strict=True):
        assert_close(gradient, ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(isa, dtype):
    """Half features and gradients; the result in their dtype or in float32."""
    x, grad = torch.randn(3, 20, 4, 9, 9).to(dtype), torch.randn(3, 18, 4, 9, 9).to(dtype)
    gate, samples = torch.rand(3, 20).to(dtype), torch.tensor([2, 0])
    refs = gradient_formula(x[samples], grad[samples], gate[samples], shapes_of(18, 20))
    for result in (dtype, torch.float32):
        gradients = weight_gradients(x, grad, gate, shapes_of(18, 20), result, samples=samples)
        for gradient, ref in zip(gradients, refs, strict=True):
            # In half precision 1 - gate is rounded before it multiplies.
            assert_close(gradient, ref, dtype=dtype)


def test_does_not_depend_on_threads(isa):
    """1, 2, 3 and 5 threads: equal bit for bit, over several chunks."""
    x, grad = torch.randn(6, 40, 8, 16, 16), torch.randn(6, 96, 8, 16, 16)
    gate, results, before = half_gate(x), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            zeros = [torch.zeros(shape) for shape in shapes_of(96, 40)]
            results.append(weight_gradients(x, grad, gate, shapes_of(96, 40), add=zeros))
    finally:
        torch.set_num_threads(before)
    for gradients in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0], strict=True))


def test_full_width():
    """The shapes of the paper: within what float32 is allowed."""
    x, grad, gate = torch.randn(1, 1024, 8, 16, 16).relu(), torch.randn(1, 32, 8, 16, 16), torch.rand(1, 1024)
    gradients = weight_gradients(x, grad, gate, shapes_of(32, 1024))
    for gradient, ref in zip(gradients, gradient_formula(x, grad, gate, shapes_of(32, 1024)), strict=True):
        assert_close(gradient, ref)
