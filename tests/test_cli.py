"""The command line: it reports versions, the build and reasons, draws checkpoints, refuses what it does not know."""

from __future__ import annotations

import io
import os
import sys

import pytest
import torch

from dsts_kernels import __version__, backends, cli
from dsts_kernels.cli import main


def test_version(capsys):
    """``--version`` is the package's, and there alone in the sources."""
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"dsts_kernels {__version__}\n"


def test_info(capsys):
    """Versions, the native build and a line for every backend."""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("dsts_kernels", torch.__version__, "native build", "cpu", "eager", "gated_conv3d on"):
        assert part in text


@pytest.mark.parametrize("built", [True, False])
def test_info_gives_a_reason_once(capsys, monkeypatch, built):
    """No sentence of some length twice; the reason why there is no native module stands there in full."""
    why = "the native module is not built (c++: fatal error: no seat is free)"
    if not built:
        missing = {"cpu": f"{why}; plain PyTorch runs instead", "cuda": f"{why}; DSTS_BUILD=cuda says why"}
        for name, reason in missing.items():
            monkeypatch.setattr(type(backends.BACKENDS[name]), "missing", lambda self, reason=reason: reason)
        monkeypatch.setattr(cli, "build_details", lambda: {"native build": f"none: {why}"})
        monkeypatch.setattr(cli, "why_no_module", lambda: why)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    told = [backend.missing() or backend.remark for backend in backends.BACKENDS.values()]
    assert all(text.count(reason) <= 1 for reason in told if len(reason) > 30) and text.count(why) == (not built)
    assert all(f"\n  {name:<11} " in text for name in backends.BACKENDS)


def test_unknown_command(capsys):
    """An unknown command ends with a usage error that lists what there is."""
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2 and "info" in capsys.readouterr().err


def checkpoint(**parts):
    return {"format": "dsts_kernels checkpoint 1", "options": {}, "epoch": 0, "model": {}, **parts}


@pytest.mark.needs("matplotlib")
def test_plot(capsys, tmp_path):
    """Every figure's path and what neurons tell; beside the checkpoint, or where ``--out`` says."""
    label = torch.tensor([0, 0, 1, 1])
    routing = {"neuron": label[None], "label": label, "class_names": ["left", "right"]}
    torch.save(checkpoint(routing=routing), tmp_path / "last.pt")
    for out, options in ((tmp_path / "last-figures", []), (tmp_path / "here", ["--out", str(tmp_path / "here")])):
        assert main(["plot", str(tmp_path / "last.pt"), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [str(out / "activation.png"), str(out / "information.json"), ""]
        assert lines[4].split()[:4] == ["0", "class", "1.000", "100.0%"]
        assert {path.name for path in out.iterdir()} == {"activation.png", "information.json"}


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("kind", ["random", "one neuron", "learned"])
def test_plot_of_nothing_learned(capsys, tmp_path, kind):
    """Routing at random, or to one neuron, is told in words; routing that knows classes, in a layer, is not."""
    label = torch.randint(5, (400,))
    neuron = torch.randint(10, (3, 400))
    if kind == "one neuron":
        neuron = torch.full_like(neuron, 4)
    if kind == "learned":
        neuron[1] = torch.where(torch.rand(400) < 0.5, label, neuron[1])
    names = [str(number) for number in range(5)]
    routing = {"neuron": neuron, "label": label, "class_names": names}
    routing |= {"attributes": {"side": label % 2}, "attribute_names": {"side": ["left", "right"]}}
    torch.save(checkpoint(routing=routing), tmp_path / "last.pt")
    assert main(["plot", str(tmp_path / "last.pt")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("nothing learned yet: neurons tell no more than chance does") == (kind != "learned")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"not a checkpoint", "which torch.load cannot read"),
        (b"", "which torch.load cannot read"),
        ([1, 2], "whose format is 'list', wanted 'dsts_kernels checkpoint 1'"),
        ({"format": "another"}, "whose format is 'another'"),
        (checkpoint(), "a model without DSTS has nothing to draw"),
        (checkpoint(routing={"label": torch.zeros(2)}), "routing: got no 'neuron' and no 'class_names'"),
    ],
)
def test_plot_refuses(capsys, tmp_path, content, says):
    """A file that cannot be drawn ends with one line that says why."""
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        main(["plot", str(path)])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and says in error[-1] and error[-1].startswith("python -m dsts_kernels plot: error: ")
    assert not (tmp_path / "last-figures").exists()


@pytest.mark.needs("matplotlib")
def test_plot_into_a_file(capsys, tmp_path):
    """``--out`` that is a file is refused, not overwritten."""
    label = torch.tensor([0, 1])
    torch.save(checkpoint(routing={"neuron": label[None], "label": label, "class_names": "ab"}), tmp_path / "last.pt")
    with pytest.raises(SystemExit) as stop:
        main(["plot", str(tmp_path / "last.pt"), "--out", str(tmp_path / "last.pt")])
    assert stop.value.code == 2 and "last.pt" in capsys.readouterr().err


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command",
    ["info", "roofline", pytest.param("plot", marks=pytest.mark.needs("matplotlib")), "--help", "roofline --help"],
)
def test_a_reader_that_left(capsys, monkeypatch, tmp_path, command, buffered):
    """Output into a pipe that nobody reads any more (``| head -1``) is no error, for any command, and nothing is left
    to be written when the interpreter ends."""
    arguments = command.split()
    if command == "plot":
        routing = {"neuron": torch.tensor([[0, 1]]), "label": torch.tensor([0, 1]), "class_names": ["a", "b"]}
        torch.save(checkpoint(routing=routing), tmp_path / "last.pt")
        arguments.append(str(tmp_path / "last.pt"))
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(open(write, "wb", buffering=-1 if buffered else 0), write_through=not buffered) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        try:
            code = main(arguments)
        except SystemExit as stop:  # of --help
            code = stop.code
        pipe.flush()
    monkeypatch.undo()
    assert code == 0 and capsys.readouterr().err == ""
