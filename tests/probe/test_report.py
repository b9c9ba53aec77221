"""The report on a model whose answer is known, and the command on a checkpoint of the recipe."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dsts_kernels.backbones import TinyNet
from dsts_kernels.classify import ClassifierConfig
from dsts_kernels.classify.config import CLASSIFIER
from dsts_kernels.cli import main
from dsts_kernels.data import ClipSampling, SyntheticCells
from dsts_kernels.learning import save_checkpoint
from dsts_kernels.probe import probe, report_text

from .models import Solved


@pytest.fixture(scope="module")
def data() -> SyntheticCells:
    return SyntheticCells(96, size=16, noise=0.0, seed=3)


@pytest.fixture(scope="module")
def report(data):
    model = Solved().eval()
    gate = model.dsts.layers[0].gate.detach()
    start = {"dsts.layers.0": torch.cat((gate[:1], -gate[1:]))}  # the second neuron's gates have all crossed
    clips = torch.stack([clip for clip, _ in data])
    batches = [(clips, data.labels)]
    names = {"attributes": data.attributes, "attribute_names": data.attribute_names}
    return probe(model, batches, class_names=data.class_names, start=start, draws=2, **names)


def test_what_is_known(report, data):
    """Half of the clips each, one bit of group and class, gates all on one side, one neuron's since the start."""
    assert report.layers == ("dsts.layers.0",) and report.measured.accuracy == 1.0
    assert report.usage == ((0.5, 0.5),) and report.entropy == (1.0,)
    assert report.spatial == ((1.0, 0.0),) and report.flipped == ((0.0, 1.0),)
    low, high = report.band[0]
    assert 0 < low < 0.5 < high < 1 and low + high == pytest.approx(1)
    bits = {row["attribute"]: row for row in report.information}
    assert set(bits) == {"class", "group", "space", "time", "glyph"}
    for name in ("class", "group"):
        assert bits[name]["bits"] == pytest.approx(1) and bits[name]["p"] == pytest.approx(1 / 101)
        assert bits[name]["chance_bits"] < 0.2
    assert bits["glyph"]["bits"] < 3 * bits["glyph"]["chance_bits"] and bits["glyph"]["p"] > 0.001


def test_text(report):
    text = report_text(report)
    for part in (
        "top-1 100.0% of 96 clips",
        "gates flipped",
        "costs",
        "chance",
        "since the start",
        "1.00 of 1.00 bits",
    ):
        assert part in text
    assert all(len(line) < 121 for line in text.splitlines())


def test_dict_is_json(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert found["accuracy"] == 1.0 and found["clips"] == 96 and len(found["counterfactuals"]) == 7
    assert found["counterfactuals"][3]["name"] == "gates flipped" and found["counterfactuals"][3]["costs"]


def test_start_of_another_model(data):
    with pytest.raises(ValueError, match=r"start: got layers other, wanted dsts\.layers\.0"):
        probe(Solved().eval(), [], start={"other": torch.zeros(2, 12)})


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run at toy size, as the recipe saves it."""
    torch.manual_seed(0)
    sampling = ClipSampling(frames=8, size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    names = tuple(SyntheticCells.class_names)
    dsts = {"num_layers": 2, "num_neurons": 3, "score_reduction": "mean"}
    config = ClassifierConfig(backbone="tiny", class_names=names, sampling=sampling, options={"width": 2}, dsts=dsts)
    model = config.build()
    assert isinstance(model, TinyNet)
    options = {"data": "cells", "test_clips": 48, "noise": 0.1, "frames": 8, "size": 16, "mean": [0.5] * 3}
    layers = {name: part for name, part in model.named_modules() if hasattr(part, "scoring")}
    state = {
        "options": options | {"std": [0.25] * 3, "videos": None},
        "model": model.state_dict(),
        CLASSIFIER: config.to_dict(),
        "gates_at_start": {name: part.gate.detach().clone() for name, part in layers.items()},
    }
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    return tmp_path / "checkpoint.pt"


def test_command(checkpoint, tmp_path, capsys):
    """Text of every part, with the clips that the run had; JSON of the same; a file instead of the terminal."""
    assert main(["probe", str(checkpoint), "--draws", "1", "--by-layer"]) == 0
    text = capsys.readouterr().out
    for part in ("of 48 clips", "dsts.layers.1 alone", "gates that crossed %    0    0    0   since the start"):
        assert part in text
    out = tmp_path / "found.json"
    few = ["--draws", "1", "--test-clips", "16", "--json", "--out", str(out)]
    assert main(["probe", str(checkpoint), *few]) == 0
    assert capsys.readouterr().out == ""
    found = json.loads(out.read_text())
    assert found["clips"] == 16 and len(found["usage"]) == 2 and math.isclose(sum(found["usage"][0]), 1)


@pytest.mark.needs("matplotlib")
def test_command_draws(checkpoint, tmp_path, capsys):
    """``--figure`` writes a picture; another kind of file is refused."""
    few = ["probe", str(checkpoint), "--draws", "1", "--test-clips", "16"]
    assert main([*few, "--figure", str(tmp_path / "costs.svg")]) == 0
    assert "<svg" in (tmp_path / "costs.svg").read_text()
    with pytest.raises(SystemExit):
        main([*few, "--figure", str(tmp_path / "costs.txt")])
    assert "--figure: got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classifier": None}, "a checkpoint without 'classifier'"),
        ({"options": {"data": "diving48"}}, "--test-annotation"),
        ({"dsts": None}, "without a FusedDSTS"),
    ],
)
def test_command_refuses(checkpoint, capsys, change, says):
    """What cannot be probed ends with one line that says why."""
    state = torch.load(checkpoint, weights_only=True)
    if "dsts" in change:
        state["classifier"]["dsts"] = None
        state["model"] = {k: v for k, v in state["model"].items() if ".dsts." not in f".{k}"}
    elif "options" in change:
        state["options"] |= change["options"] | {"test_annotation": None, "classes": None, "stride": None, "seed": 0}
    else:
        del state["classifier"]
    del state["format"]
    save_checkpoint(checkpoint, state)
    with pytest.raises(SystemExit) as stop:
        main(["probe", str(checkpoint)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and says in error
