"""Frozen layers in the packing of GPU kernels, on CPU tensors: moved between packings, and counted in 64 bits."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import features
from dsts_kernels.testing import assert_close

from ...support.inputs import SIZE, gated_inputs
from ...support.stand_ins import BACKEND, emulated, everything, pair

pytestmark = emulated


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
