"""Figures of a checkpoint, all that it has data for."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dsts_kernels import FusedDSTS, viz
from dsts_kernels.learning import load_checkpoint
from dsts_kernels.learning.checkpoint import FORMAT
from dsts_kernels.viz import checkpoint as files

L, N = 2, 3  # layers and neurons of the checkpoint that conftest.py makes


def test_find_gates():
    """Every DSTS module by its name, layers in order of their numbers; a gate without scoring is another module's."""
    inner = FusedDSTS(4, num_layers=11, num_neurons=2)
    state = {f"head.dsts.{key}": value for key, value in reversed(inner.state_dict().items())}
    state |= FusedDSTS(3, num_layers=1, num_neurons=5).state_dict()
    state["moe.layers.0.gate"] = torch.zeros(2, 2)
    found = viz.find_gates(state)
    assert {name: len(gates) for name, gates in found.items()} == {"head.dsts": 11, "": 1}
    assert all(torch.equal(gate, layer.gate) for gate, layer in zip(found["head.dsts"], inner.layers, strict=True))


@pytest.mark.needs("matplotlib")
def test_draw(matplotlib, tmp_path, checkpoint, routing):
    """All figures, and the information as JSON, from a file as training saves it."""
    torch.save(checkpoint, tmp_path / "last.pt")
    written = viz.draw(load_checkpoint(tmp_path / "last.pt"), tmp_path / "a" / "b")
    names = ["gates.png", "examples.png", "activation.png", "usage.png", "saturation.png", "information.json"]
    assert [path.relative_to(tmp_path / "a" / "b").as_posix() for path in written] == names
    for path in written[:-1]:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200 and image.std() > 0.02
    assert json.loads(written[-1].read_text()) == viz.information_table(routing)


@pytest.mark.needs("matplotlib")
def test_draw_what_there_is(matplotlib, tmp_path, checkpoint):
    """Parts may be absent; several DSTS modules get a figure each."""
    del checkpoint["routing"], checkpoint["history"]
    checkpoint["model"] |= FusedDSTS(4, num_layers=1, num_neurons=2).state_dict()
    assert {path.name for path in viz.draw(checkpoint, tmp_path)} == {"gates-dsts.png", "gates-model.png"}


@pytest.mark.needs("matplotlib")
def test_draw_passes_gates_on(matplotlib, tmp_path, checkpoint, monkeypatch):
    """Figures get the checkpoint's own gates, their start and channels, and its number of neurons, not that of the
    neurons chosen."""
    seen = {}
    real = viz.plot_gates, viz.plot_activation

    def plot_gates(shares, channels, start):
        seen.update(shares=shares, channels=channels, start=start)
        return real[0](shares, channels, start)

    monkeypatch.setattr(files, "plot_gates", plot_gates)
    monkeypatch.setattr(files, "plot_activation", lambda r, n: seen.update(neurons=n) or real[1](r, n))
    start = [torch.randn(N, 4) for _ in range(L)]
    checkpoint["gates_at_start"] = {f"dsts.layers.{layer}": gate for layer, gate in enumerate(start)}
    viz.draw(checkpoint, tmp_path)
    gates = [checkpoint["model"][f"dsts.layers.{layer}.gate"] for layer in range(L)]
    assert torch.equal(seen["shares"], viz.gate_shares(gates)) and seen["neurons"] == N
    assert torch.equal(seen["start"], viz.gate_shares(start)) and seen["channels"] == [4] * L
    checkpoint["gates_at_start"].popitem()
    with pytest.raises(ValueError, match="other layers in 'gates_at_start'"):
        viz.draw(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, "no DSTS gates in 'model', no 'routing' and no 'usage'"),
        ({}, "a model without DSTS has nothing to draw"),
        ({"model": [1]}, "got list in 'model'"),
        ({"history": [1]}, "got list in 'history'"),
        ({"routing": [1]}, "routing: got list"),
    ],
)
def test_nothing_to_draw(tmp_path, parts, says):
    with pytest.raises(ValueError, match=says):
        viz.draw({"format": FORMAT, **parts}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib(monkeypatch):
    """Numbers do without matplotlib; a figure says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shares = viz.gate_shares([torch.ones(2, 3)])
    with pytest.raises(ImportError, match=r"pip install 'dsts_kernels\[train\]'"):
        viz.plot_gates(shares)


def test_import_leaves_matplotlib_alone():
    """The package, its command line and its measures do not import matplotlib."""
    import subprocess

    code = "import sys, dsts_kernels.cli, dsts_kernels.viz; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
