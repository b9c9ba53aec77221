"""Commands that train, plot and classify a real clip, as README.md, docs/train.md and docs/classify.md have them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.features import default_clip
from dsts_kernels.cli import main as cli
from dsts_kernels.probe import CHANGES
from examples import train

pytestmark = [pytest.mark.needs("torchmetrics", "tensorboard", "tqdm", "av", "skvideo", "matplotlib"), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
README, PAGE, TRAIN = ROOT / "README.md", ROOT / "docs/classify.md", ROOT / "docs/train.md"
TOY = ["--epochs", "1", "--clips", "48", "--test-clips", "32", "--size", "16", "--frames", "4", "--width", "4"]
TOY += ["--batch", "8", "--neurons", "2", "--threads", "1", "--quiet"]


def block(page: Path, language: str) -> str:
    """The one block of the page that this file runs."""
    found = rf'^```{language} run-by="tests/examples/test_readme.py"\n(.*?)^```'
    texts = re.findall(found, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(texts) == 1, f"{page}: {len(texts)} blocks in {language}"
    return texts[0]


def commands(page: Path) -> list[list[str]]:
    """A list of words for each command."""
    lines = block(page, "bash").replace("\\\n", "").replace(" && ", "\n").splitlines()
    return [shlex.split(line) for line in lines]


def test_train_plot_and_probe(tmp_path, monkeypatch, capsys):
    """README's recipe and the page's probe, made small."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    training, plotting = commands(README)
    assert training[:2] == ["python", "examples/train.py"] and plotting[:4] == ["python", "-m", "dsts_kernels", "plot"]
    assert train.main([*training[2:], *TOY]) == 0
    assert cli(plotting[3:]) == 0
    assert list((tmp_path / "runs/synthetic").rglob("*.png"))
    ((*start, checkpoint),) = commands(TRAIN)
    assert start == ["python", "-m", "dsts_kernels", "probe"] and checkpoint == plotting[-1]
    capsys.readouterr()
    assert cli([*start[3:], checkpoint]) == 0
    said = capsys.readouterr().out
    assert all(change in said for change in CHANGES)
    torch.set_num_threads(before)


def test_train_and_classify(tmp_path, monkeypatch, capsys):
    """Two epochs of a small TPN, then ``bikes.mp4`` through it, with a picture."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    _, training, classifying = commands(PAGE)
    assert training[:2] == ["python", "examples/train.py"] and "--epochs 2" in " ".join(training)
    assert train.main(training[2:]) == 0
    assert classifying[:4] == ["python", "-m", "dsts_kernels", "classify"]
    clip = "$(python -m benchmarks.features)"
    assert clip in classifying
    capsys.readouterr()
    assert cli([str(default_clip()) if word == clip else word for word in classifying[3:]]) == 0
    said = capsys.readouterr().out
    assert "bikes.mp4: 10.0 s" in said and said.count("% of its channels spatial") == 3
    assert (tmp_path / "runs" / "bikes.png").stat().st_size > 10_000
    shutil.copy(default_clip(), tmp_path / "bikes.mp4")
    names: dict[str, object] = {}
    exec(compile(block(PAGE, "python"), str(PAGE), "exec"), names)
    assert len(names["found"].top(3)) == 3 and len(names["found"].windows) > 1
    torch.set_num_threads(before)
