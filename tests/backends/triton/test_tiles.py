"""Every tile that ships, run once for correctness in the interpreter: more than one of them each way, ragged."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.triton import tuning
from dsts_kernels.ops.frozen_layer import frozen_layer
from dsts_kernels.testing import assert_close

from ...support.inputs import gated_inputs
from ...support.oracles import literal_mixing, wide
from ...support.stand_ins import BACKEND, check_gated
from .support import interpreted, launch, spy_on

pytestmark = interpreted
KINDS = {"half": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


def tiles_of(kernel: str) -> list:
    """Tiles with the dtype they run on; warps and stages make no difference to the interpreter."""
    found = {}
    for kind, dtype in KINDS.items():
        shipped = [own[kernel] for own in tuning.CANDIDATES[kind].values()]
        for tile in sum(shipped, tuning.candidates(kernel, tuning.INTERPRETER, kind)):
            name = f"{'half' if kind == 'half' else 'float'}-{tile.m}x{tile.n}x{tile.k}{'-tma' * tile.tma}"
            found.setdefault(name, pytest.param(tile, dtype, id=name))
    return list(found.values())


def size_for(rows: int, columns: int) -> tuple[int, int, int]:
    """Just more positions than a narrow tile has rows; wide ones have several tiles in columns only."""
    return {(128, 64): (3, 7, 8), (64, 64): (2, 5, 7)}.get((rows, columns), (2, 3, 4))


def launched_with(spy, tile: tuning.Tile) -> bool:
    """Whether the kernel's last launch had this tile."""
    constants = spy.launches[-1][1]
    return (constants["BN"], constants["num_warps"]) == (tile.n, tile.warps)


@pytest.mark.parametrize("tile, dtype", tiles_of("conv"))
def test_conv(tile, dtype, monkeypatch, multiprocessors):
    """Filters by list, a mixing kernel as stored and turned round; packed filters in whole tiles with sums and skip."""
    outputs, size, spy = tile.n + 8, size_for(tile.m, tile.n), spy_on(monkeypatch, "conv_kernel")
    z, neuron = torch.randn(1, outputs, *size).to(dtype), torch.tensor([1])
    mixing = (torch.randn(2, outputs, outputs, 1, 1, 1) / outputs**0.5).to(dtype)
    dsts = FusedDSTS(outputs, num_layers=1, num_neurons=1, backend="eager").eval().to(dtype)
    with torch.no_grad():
        dsts.layers[0].gate.fill_(-1)[:, ::9] = 1  # few channels cost nine taps
    layer = dsts.freeze(backend="triton").layers[0]
    taps = 9 if tile.n == 128 else 1
    with tuning.forced(conv=tile):
        check_gated(gated_inputs(1, 24, outputs, size, dtype), needs=[False] * 4)
        assert launched_with(spy, tile) and spy.launches[-1][1]["TMA_PANEL"] == tile.tma
        assert_close(BACKEND.mixing_conv3d(z, neuron, mixing), literal_mixing(*wide([z, neuron, mixing])))
        assert spy.launches[-1][1]["TMA_FILTERS"] == tile.tma
        dz, _ = BACKEND.mixing_conv3d_backward(z, z, neuron, mixing, [True, False])
        assert_close(dz, literal_mixing(*wide([z, neuron, mixing.transpose(1, 2)])))
        multiprocessors(1)
        y, sums, *_ = frozen_layer(z, None, z, layer.weights(), layer.options(taps), backend="triton")
    assert_close(y, dsts.double()(z.double()))
    assert_close(sums, BACKENDS["eager"].tap_sums(y.double(), taps), dtype=torch.float32)


@pytest.mark.parametrize("tile, dtype", tiles_of("data_gradient"))
def test_data_gradient(tile, dtype, monkeypatch):
    """With the gates' gradient, and by lists without."""
    size, spy = size_for(tile.m, tile.n), spy_on(monkeypatch, "data_gradient_kernel")
    inputs = gated_inputs(1, tile.n + 8, 24, size, dtype)
    with tuning.forced(data_gradient=tile):
        for needs in ((True, True, False, False), (True, False, False, False)):
            check_gated(inputs, needs, forward=False)
            assert launched_with(spy, tile)
            assert spy.launches[-1][1]["TMA_FILTERS"] == (tile.tma and needs[1])


@pytest.mark.parametrize("tile, dtype", tiles_of("weight_gradient"))
def test_weight_gradient(tile, dtype, monkeypatch):
    """Of both operators by lists, and of a mixing kernel in place."""
    size, spy = size_for(tile.k, 64), spy_on(monkeypatch, "weight_gradient_kernel")
    inputs = gated_inputs(1, tile.m + 8 if tile.n < 128 else 24, tile.n + 8, size, dtype, "hard", [1])
    z, neuron = torch.randn(2, tile.n + 8, *size).to(dtype), torch.tensor([0, 2])
    mixing = torch.randn(3, tile.n + 8, tile.n + 8, 1, 1, 1).to(dtype)
    with tuning.forced(weight_gradient=tile):
        check_gated(inputs, (False, False, True, True), forward=False)
        assert launched_with(spy, tile) and spy.launches[-1][1]["TMA_RIGHT"] == tile.tma
        _, found = BACKEND.mixing_conv3d_backward(z, z.flip(0), neuron, mixing, [False, True])
    for b, n in enumerate(neuron):
        rows, columns = z[b].flatten(1).double(), z[1 - b].flatten(1).double()
        assert_close(found[n].flatten(1), rows @ columns.t(), dtype=dtype)
    assert found[1].count_nonzero() == 0


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates_of_the_interpreter(kernel):
    """What runs here by default is one of its candidates, and descriptors are among them."""
    shipped = tuning.candidates(kernel, launch.chip(torch.device("cpu"))[0], "ieee")
    assert {tile.tma for tile in shipped} == {True, False}
