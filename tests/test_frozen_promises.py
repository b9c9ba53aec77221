"""What a frozen module promises besides its numbers: packing, algorithms, export, threads, what it refuses."""

from __future__ import annotations

import io

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_algorithms_agree(backend, dtype, mixing_kernel):
    """Direct and fast convolution are the same layer; "auto" is fast where the backend is."""
    dsts = FusedDSTS(20, num_neurons=3, mixing_kernel=mixing_kernel, backend=backend).eval()
    x = torch.randn(3, 20, 4, 7, 9).to(dtype)
    results = {"auto": dsts.freeze(dtype=dtype)(x), "direct": dsts.freeze(dtype=dtype, algorithm="direct")(x)}
    if BACKENDS[backend].why_not_fast(x.device, dtype) is None:
        results["winograd"] = dsts.freeze(dtype=dtype, algorithm="winograd")(x)
        assert torch.equal(results["winograd"], results["auto"])
    else:
        assert torch.equal(results["direct"], results["auto"])
    assert_close(results["auto"], results["direct"], factor=2)


def test_packed_filters_run_anywhere(monkeypatch):
    """A module packed for fast convolution also runs on a backend that has none."""
    dsts = FusedDSTS(20, num_neurons=2, mixing_kernel=(3, 1, 1)).eval()
    fast, x = dsts.freeze(), torch.randn(2, 20, 4, 5, 5)
    wanted = fast(x)
    fast.backend = "eager"
    assert_close(fast(x), wanted)


def test_refuses_algorithms():
    """An unknown name, and fast convolution where there is none."""
    dsts = FusedDSTS(8, num_layers=1, num_neurons=2).eval()
    with pytest.raises(ValueError, match="algorithm: got 'fft', wanted 'auto' or 'direct' or 'winograd'"):
        dsts.freeze(algorithm="fft")
    with pytest.raises(ValueError, match=r"algorithm: got 'winograd', wanted 'auto' or 'direct' for torch.float64"):
        dsts.freeze(dtype=torch.float64, algorithm="winograd")
    with pytest.raises(ValueError, match="the 'eager' backend has none"):
        dsts.freeze(algorithm="winograd", backend="eager")


def test_is_independent_of_its_source():
    """Later changes of the source do not show, and only packed weights are held."""
    dsts = FusedDSTS(16, num_layers=1, num_neurons=3).eval()
    fast = dsts.freeze()
    x = torch.randn(2, 16, 2, 4, 4)
    before = fast(x)
    with torch.no_grad():
        for p in dsts.parameters():
            p.zero_()
    assert torch.equal(fast(x), before)
    assert not list(fast.parameters())
    weights = sum(b.numel() for name, b in fast.named_buffers() if name.endswith(".filters"))
    spatial = int(fast.layers[0].gate.sum())
    assert weights == (9 * spatial + 3 * (48 - spatial)) * 16


def test_export():
    """torch.export keeps one op a layer, with a dynamic batch, and survives a save."""
    fast = FusedDSTS(8, num_neurons=3).eval().freeze()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (torch.randn(3, 8, 2, 4, 4),), dynamic_shapes=({0: batch},))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert sum("dsts_kernels.frozen_layer" in target for target in targets) == 3
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(5, 8, 2, 4, 4)
    assert torch.equal(torch.export.load(buffer).module()(x), fast(x))


def test_refuses_training():
    """Training mode is an error that says what to do; eval() is fine."""
    fast = FusedDSTS(4, num_neurons=2).eval().freeze()
    assert not fast.training and fast.eval() is fast
    with pytest.raises(RuntimeError, match=r"train\(mode\): got True, wanted False"):
        fast.train()
    assert not fast(torch.randn(1, 4, 2, 3, 3, requires_grad=True)).requires_grad


def test_does_not_depend_on_threads():
    """A float32 module gives the same bits on any number of threads, routing included."""
    dsts = FusedDSTS(48, num_neurons=3).eval().freeze()
    x, before, found = torch.randn(3, 48, 8, 16, 16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(dsts(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
