"""``graphed``: calls, samples and modules that it refuses, before any replay."""

from __future__ import annotations

import copy

import pytest
import torch

from dsts_kernels.learning import RoutingMonitor

from .support.graphs import draws, features, module, stand_in


@pytest.fixture
def graphs(monkeypatch):
    stand_in(monkeypatch)


CALLS = {
    "shape": (lambda x: ((x[:3],), {}), r"x: got a tensor of shape \(3, 6, .*, wanted the sample's shape \(4, 6, 2, 3"),
    "size": (lambda x: ((x[..., :2],), {}), r"x: got a tensor of shape \(4, 6, 2, 3, 2\), .* graphed\(sample\) again"),
    "dtype": (lambda x: ((x.float(),), {}), r"x: got .*torch.float32, wanted the sample's shape .*, torch.float64"),
    "device": (lambda x: ((x.to("meta"),), {}), "x: got a tensor on meta, wanted cpu, where the graphs are"),
    "no-tensor": (lambda x: ((None,), {}), "x: got NoneType None, wanted the sample's shape"),
    "routing": (
        lambda x: ((x,), {"return_routing": True}),
        "return_routing: got True, wanted False for graphs without",
    ),
    "draws": (lambda x: ((x, draws()), {}), "draws: got some for graphs that draw by themselves, wanted None"),
}


@pytest.mark.parametrize("call, match", CALLS.values(), ids=CALLS)
def test_bad_calls(graphs, call, match):
    dsts, x = module(), features()
    graphed = dsts.graphed(x)
    args, kwargs = call(x)
    with pytest.raises(ValueError, match=match):
        graphed(*args, **kwargs)


def test_bad_draws(graphs):
    """Draws of another shape, as the module says it."""
    dsts, x = module(), features()
    graphed = dsts.graphed(x, draws=draws())
    with pytest.raises(ValueError, match=r"draws.noise: got .*, wanted shape \(2, 4, 6\)"):
        graphed(x, draws()._replace(noise=torch.zeros(2, 3, 6, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"draws.gumbel: got .*, wanted shape \(2, 4, 3\)"):
        dsts.graphed(x, draws=draws()._replace(gumbel=torch.zeros(2, 4, 5, dtype=torch.float64)))


SAMPLES = {
    "four-dimensions": (lambda x: x[0], ValueError, "sample: got .*, wanted 5 dimensions"),
    "channels": (lambda x: x[:, :5], ValueError, "sample: got .*, wanted 6 channels in dimension 1"),
    "empty": (lambda x: x[:0], ValueError, r"sample: got .*\(0, 6, .*, wanted a batch of at least 1"),
    "dtype": (lambda x: x.float(), TypeError, "sample: got .*float32, wanted torch.float64, the module's dtype"),
    "device": (lambda x: x.to("meta"), ValueError, "sample: got a tensor on meta, wanted cpu, where the module is"),
    "no-tensor": (lambda x: None, TypeError, "sample: got NoneType None, wanted a floating tensor"),
}


@pytest.mark.parametrize("change, error, match", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_bad_samples(graphs, change, error, match, frozen):
    dsts = module().eval()
    with pytest.raises(error, match=match):
        (dsts.freeze() if frozen else dsts).graphed(change(features()))


@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_on_a_cpu(frozen):
    """Nothing stood in for: there are no CUDA graphs here."""
    dsts = module().eval()
    with pytest.raises(RuntimeError, match=r"graphed\(sample\): got a module on cpu, wanted one on a CUDA device"):
        (dsts.freeze() if frozen else dsts).graphed(features())


def test_backend_that_waits(graphs, monkeypatch):
    """Plain PyTorch asks the device how samples group: no graph holds that."""
    monkeypatch.undo()
    monkeypatch.setattr("dsts_kernels.graphed.no_graphs", lambda device: None)
    with pytest.raises(RuntimeError, match=r"graphed\(sample\): got the backend 'eager', which waits for the device"):
        module(backend="eager").graphed(features())


def test_hooks(graphs):
    """A hook on a layer would be called at the capture alone; one on the module is called by the module."""
    dsts, x = module(), features()
    with RoutingMonitor(dsts):
        with pytest.raises(RuntimeError, match=r"graphed\(sample\): got hooks on 'layers.0', which graphs would not"):
            dsts.graphed(x)
    seen = []
    dsts.register_forward_hook(lambda *args: seen.append(args))
    dsts.forward = dsts.graphed(x)
    dsts(x)
    assert len(seen) == 1


def test_momentum_of_none(graphs):
    dsts = module()
    dsts.layers[1].norm.momentum = None
    with pytest.raises(RuntimeError, match=r"got layers.1.norm with momentum None, .*, wanted a number"):
        dsts.graphed(features())
    dsts.eval().graphed(features())


def test_neither_copied_nor_compiled(graphs):
    """Graphs are of this process: a copy says what to do, and so does torch.compile."""
    dsts, x = module().eval(), features()
    dsts.forward = dsts.graphed(x)
    with pytest.raises(TypeError, match="graphed: got a copy or a pickle of CUDA graphs, wanted the module: del"):
        copy.deepcopy(dsts)
    # torch 2.6 leaves out the words of what was raised in the code that it compiles.
    old = torch.__version__ < (2, 7)
    with pytest.raises(Exception, match="Observed" if old else "mode='reduce-overhead' makes CUDA graphs of its own"):
        torch.compile(dsts.forward, backend="eager", fullgraph=True)(x)
