"""Mixing by neuron on the GPU against one product a sample in float64."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.ops import mixing_conv3d
from dsts_kernels.ops.mixing_conv import MIXING_KERNELS
from dsts_kernels.testing import assert_close

from .support import DEVICE, DTYPES, HALF, LAYOUTS, gpu_only, mixing_conv, randn

pytestmark = [*gpu_only, pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore")]


def sample_inputs(size, kernel, dtype, one_neuron=False):
    o, taps = size[1], kernel[0] * kernel[1] * kernel[2]
    neuron = torch.full(size[:1], 1) if one_neuron else torch.randint(3, size[:1])
    mixing = randn(3, o, o, *kernel, dtype=dtype, scale=(o * taps) ** -0.5)
    return randn(*size, dtype=dtype), neuron.to(DEVICE), mixing


def check(gpu_backend, z, neuron, mixing, trained=("z", "mixing")):
    dtype, wide = z.dtype, (z.detach().double(), mixing.double())
    mine = [t.requires_grad_() for t, name in ((z, "z"), (mixing, "mixing")) if name in trained]
    theirs = [t.requires_grad_() for t, name in ((wide[0], "z"), (wide[1], "mixing")) if name in trained]
    out, ref = mixing_conv3d(z, neuron, mixing, backend=gpu_backend), mixing_conv(wide[0], neuron, wide[1])
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(out, ref, dtype=dtype)
    grad = randn(*ref.shape, dtype=dtype)
    found, wanted = torch.autograd.grad(out, mine, grad), torch.autograd.grad(ref, theirs, grad.double())
    for name, g, h in zip(trained, found, wanted, strict=True):
        assert_close(g, h, dtype=dtype, name=f"gradient of {name}", factor=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", MIXING_KERNELS, ids=str)
@pytest.mark.parametrize("size", [(4, 33, 3, 6, 5), (8, 64, 8, 7, 7)], ids=str)
def test_values_and_gradients(gpu_backend, size, kernel, dtype):
    """All kernels and dtypes, ragged channels and whole tiles."""
    check(gpu_backend, *sample_inputs(size, kernel, dtype))


@pytest.mark.parametrize("kernel", MIXING_KERNELS, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 20, 3, 6, 5), (32, 24, 3, 6, 5), (2, 5, 1, 1, 1), (3, 1, 2, 3, 1), (2, 280, 2, 9, 11)], ids=str
)
def test_sizes(gpu_backend, size, kernel):
    """Batches of 1 and 32, one position, one channel, many blocks; every sample on one neuron."""
    check(gpu_backend, *sample_inputs(size, kernel, HALF, one_neuron=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(gpu_backend, layout):
    """Any stride order of the features."""
    z, neuron, mixing = sample_inputs((4, 33, 3, 6, 5), (1, 3, 3), HALF)
    check(gpu_backend, LAYOUTS[layout](z).detach(), neuron, mixing)


@pytest.mark.parametrize("trained", ["z", "mixing"])
def test_what_needs_no_gradient(gpu_backend, trained):
    """One side alone."""
    check(gpu_backend, *sample_inputs((4, 33, 3, 6, 5), (1, 1, 1), HALF), trained=(trained,))


def test_unrouted_neurons_get_zero(gpu_backend):
    """A neuron that nobody chose has a gradient of exactly zero."""
    z, _, mixing = sample_inputs((4, 33, 3, 6, 5), (1, 1, 1), HALF)
    neuron = torch.tensor([2, 0, 2, 2], device=DEVICE)
    out = mixing_conv3d(z, neuron, mixing.requires_grad_(), backend=gpu_backend)
    (gradient,) = torch.autograd.grad(out.float().sum(), mixing)
    assert gradient[1].count_nonzero() == 0 and gradient[2].count_nonzero() > 0


def test_empty_batch(gpu_backend):
    """No samples: an empty result and a gradient of zero."""
    z, neuron, mixing = sample_inputs((0, 16, 2, 3, 3), (1, 1, 1), HALF)
    out = mixing_conv3d(z, neuron, mixing.requires_grad_(), backend=gpu_backend)
    assert out.shape == z.shape
    assert torch.autograd.grad(out.sum(), mixing)[0].count_nonzero() == 0


def test_samples_stay_apart(gpu_backend):
    """NaN in one sample leaves the others finite."""
    z, neuron, mixing = sample_inputs((4, 40, 3, 6, 5), (1, 3, 3), HALF, one_neuron=True)
    z[1, 3] = float("nan")
    out = mixing_conv3d(z.requires_grad_(), neuron, mixing, backend=gpu_backend)
    grad = torch.randn_like(out)
    grad[1] = float("inf")
    for result in (out, torch.autograd.grad(out, z, grad)[0]):
        assert torch.isfinite(result[[0, 2, 3]]).all()
