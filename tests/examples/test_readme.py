"""README's commands that train with a backbone and classify a real clip, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.features import default_clip
from dsts_kernels.cli import main as cli
from examples import train

pytestmark = [pytest.mark.needs("torchmetrics", "tensorboard", "tqdm", "av", "skvideo", "matplotlib"), pytest.mark.slow]
README = Path(__file__).parents[2] / "README.md"
SECTION = "Classify a clip"


def commands() -> list[list[str]]:
    """Those of the section's first block, a list of words each."""
    section = re.search(rf"^## {SECTION}\n(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section is not None, f"README.md has no section {SECTION!r}"
    block = re.search(r"^```\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in block[1].replace("\\\n", "").splitlines()]


def test_train_and_classify(tmp_path, monkeypatch, capsys):
    """Two epochs of a small TPN, then ``bikes.mp4`` through it, with a picture."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    _, training, classifying = commands()
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
    torch.set_num_threads(before)
