"""``python -m dsts_kernels classify``: output, files that are whole or not there, exit codes, errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dsts_kernels.classify import command
from dsts_kernels.cli import main
from dsts_kernels.data import decode
from tests.data.videos import write_video

from .models import CLASSES, write_checkpoint

pytestmark = pytest.mark.needs("av")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and three videos, of which one is none; the current one."""
    write_checkpoint(tmp_path / "last.pt")
    (tmp_path / "clips" / "more").mkdir(parents=True)
    write_video(tmp_path / "clips" / "b.mp4", 40)
    write_video(tmp_path / "clips" / "more" / "a.MKV", 10)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "clips" / "notes.txt").write_text("no video either")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return main(["classify", *arguments])


def refused(capsys, *arguments: str) -> str:
    """The last line of what is said of arguments that cannot be; nothing is printed beside it."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    return said.err.splitlines()[-1]


def test_text(here, capsys):
    """Classes, neurons by layer, spatial channels, times; and with windows where there are several."""
    assert run("clips/b.mp4", "--model", "last.pt", "--top", "2") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "clips/b.mp4: 2.0 s" and said.err == ""
    assert [any(name in line for name in CLASSES) for line in lines[1:3]] == [True, True]
    assert "layer 0: neuron " in lines[3] and "% of its channels spatial" in lines[4]
    assert [part.split()[0] for part in lines[5].partition(": ")[2].split(", ")] == ["decode", "backbone", "DSTS"]
    assert len(lines) == 6
    assert run("clips/b.mp4", "--model", "last.pt", "--window", "0.5", "--per-window") == 0
    said = capsys.readouterr()
    assert "2.0 s in 4 windows" in said.out and "of 4 windows" in said.out
    rows = [line for line in said.out.splitlines() if line.split()[:1] in (["0.0"], ["0.5"], ["1.0"], ["1.5"])]
    assert len(rows) == 4 and all(any(name in row for name in CLASSES) for row in rows)
    (line,) = said.err.splitlines()
    assert line.startswith("4 windows of 1 video in ")


def test_folder(here, capsys):
    """All videos at any depth; what is unreadable, or not there, is named, counted, and in the exit code."""
    assert run("clips", "clips/b.mp4", "none.mp4", "--model", "last.pt", "--json") == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [clip["path"] for clip in found["clips"]] == ["clips/b.mp4", "clips/more/a.MKV"]
    assert [clip["path"] for clip in found["unreadable"]] == ["none.mp4", "clips/broken.mp4"]
    errors = said.err.splitlines()
    assert errors[-1] == "2 of 4 videos could not be read"
    assert errors[-3].startswith("error: none.mp4: ") and errors[-2].startswith("error: clips/broken.mp4: ")
    assert run("clips/b.mp4", "clips/more", "--model", "last.pt") == 0
    assert capsys.readouterr().out.count("layer 0") == 2


def test_json(here, capsys):
    """One document with all that the text has, by window too; into a file as a whole."""
    assert run("clips/b.mp4", "--model", "last.pt", "--json", "--window", "1", "--out", "deep/found.json") == 0
    said = capsys.readouterr()
    assert said.out == ""
    found = json.loads((here / "deep" / "found.json").read_text())
    assert [path.name for path in (here / "deep").iterdir()] == ["found.json"]
    assert found["model"]["backbone"] == "tiny" and found["model"]["sampling"]["frames"] == 4
    (clip,) = found["clips"]
    assert {top["class"] for top in clip["top"]} == set(CLASSES)
    assert sum(top["probability"] for top in clip["top"]) == pytest.approx(1, abs=1e-5)
    assert [(w["start"], w["end"]) for w in clip["windows"]] == [(0, 1), (1, 2)]
    assert all(len(w["neurons"]) == len(w["spatial_shares"]) == 2 for w in clip["windows"])
    assert [sum(layer["neurons"].values()) for layer in clip["layers"]] == [2, 2]
    assert set(clip["seconds"]) == {"decode", "backbone", "dsts"} and min(clip["seconds"].values()) > 0
    assert found["unreadable"] == [] and clip["left_out"] == []


@pytest.mark.needs("matplotlib")
def test_figure(here, capsys):
    """A picture; for several videos a folder, in which two of one name keep apart."""
    assert run("clips/b.mp4", "--model", "last.pt", "--figure", "one.png") == 0
    assert (here / "one.png").read_bytes()[:4] == b"\x89PNG"
    write_video(here / "clips" / "more" / "b.mp4", 10)
    assert run("clips", "--model", "last.pt", "--figure", "all") == 1
    assert sorted(path.name for path in (here / "all").iterdir()) == ["a.MKV.png", "b.mp4-2.png", "b.mp4.png"]
    assert run("clips/b.mp4", "--model", "last.pt", "--figure", "all.svg") == 0
    assert "<svg" in (here / "all.svg").read_text()


def test_one_video_without_an_answer_keeps_the_others(here, capsys, monkeypatch):
    """A model whose logits are not finite for a video, say."""
    whole = command.Classifier.__call__

    def answer(self, path, **options):
        if path.name == "a.MKV":
            raise ValueError(f"model: got logits that are not finite for {str(path)!r}, wanted finite ones")
        return whole(self, path, **options)

    monkeypatch.setattr(command.Classifier, "__call__", answer)
    assert run("clips", "--model", "last.pt") == 1
    said = capsys.readouterr()
    assert "clips/b.mp4: " in said.out and "error: model: got logits that are not finite for" in said.err
    assert "2 of 3 videos could not be read" in said.err


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("what", ["--figure", "--out"])
def test_nothing_half_written(here, capsys, monkeypatch, what):
    """What fails while it is written leaves the old file, and nothing beside it."""
    name = {"--figure": "old.png", "--out": "old.json"}[what]
    (here / name).write_text("old")

    if what == "--out":
        monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: self.write_bytes(b"half") and fail_out())
    else:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(b"half") and fail_out())
    assert "no space left" in refused(capsys, "clips/b.mp4", "--model", "last.pt", what, name)
    assert (here / name).read_bytes() == b"old" and not list(here.glob(".*"))


def fail_out() -> None:
    raise OSError("no space left")


def test_random_weights(here, capsys):
    assert run("clips/b.mp4", "--backbone", "tiny") == 0
    assert "weights are random: classes and neurons mean nothing" in capsys.readouterr().out
    assert run("clips/b.mp4", "--backbone", "tiny", "--json", "--no-freeze") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["trained"] is False and found["clips"][0]["top"] == [] and not found["model"]["frozen"]


def test_progress(here, capsys, monkeypatch):
    """A bar for whoever watches; videos, and windows of a long one."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run("clips/b.mp4", "clips/more", "--model", "last.pt", "--window", "0.5") == 0
    said = capsys.readouterr().err
    assert "videos:" in said and "b.mp4:" in said and "windows of" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["clips/b.mp4"], "one of the arguments --model --backbone is required"),
        (["clips/b.mp4", "--backbone", "tiny", "--model", "last.pt"], "not allowed with argument"),
        (["--model", "last.pt"], "the following arguments are required: CLIP"),
        (["clips/b.mp4", "--model", "none.pt"], "path: got 'none.pt', wanted a checkpoint; there is no such file"),
        (["clips/b.mp4", "--model", "clips/b.mp4"], "path: got 'clips/b.mp4', which torch.load cannot read"),
        (["clips/b.mp4", "--backbone", "tnp"], "invalid choice: 'tnp'"),
        (["empty", "--model", "last.pt"], "CLIP: got the folder 'empty', wanted videos in it: .mp4"),
        (["clips/b.mp4", "--model", "last.pt", "--window", "0"], "argument --window: got '0', wanted seconds above 0"),
        (["clips/b.mp4", "--model", "last.pt", "--window", "nan"], "argument --window: got 'nan'"),
        (["clips/b.mp4", "--model", "last.pt", "--top", "0"], "argument --top: got '0', wanted a whole number"),
        (["clips/b.mp4", "--model", "last.pt", "--device", "no"], "device: got 'no', wanted a device of this machine"),
        (
            ["clips/b.mp4", "--model", "last.pt", "--figure", "a.txt"],
            "--figure: got 'a.txt', wanted a name that ends in",
        ),
        (["clips", "--model", "last.pt", "--figure", "last.pt"], "--figure: got the file 'last.pt' for 3 videos"),
        (["clips/b.mp4", "--model", "clips"], "path: got 'clips', wanted a checkpoint; it is a folder"),
        (
            ["clips/b.mp4", "--model", "last.pt", "--figure", "a.png", "--out", "clips"],
            "--out: got the folder 'clips', wanted the name of a file",
        ),
    ],
)
def test_arguments_that_cannot_be(here, capsys, arguments, says):
    (here / "empty").mkdir()
    before = sorted(here.rglob("*"))
    assert says in refused(capsys, *arguments)
    assert sorted(here.rglob("*")) == before


def test_a_stride_has_windows_of_its_own(here, capsys):
    from dsts_kernels.data import ClipSampling

    half = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    write_checkpoint(here / "dense.pt", sampling=ClipSampling(frames=4, size=32, stride=2, **half))
    assert "window: got 1.0 s for a model whose clips are 4 frames at a stride of 2" in refused(
        capsys, "clips/b.mp4", "--model", "dense.pt", "--window", "1"
    )
    assert run("clips/b.mp4", "--model", "dense.pt") == 0
    assert "2.0 s in 5 windows" in capsys.readouterr().out  # of 8 frames of 40


def test_interrupted(here, capsys, monkeypatch):
    """In the middle: a word, no file."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Classifier, "__call__", stop)
    assert run("clips/b.mp4", "--model", "last.pt", "--out", "found.txt") == 130
    assert capsys.readouterr().err == "interrupted\n" and not (here / "found.txt").exists()


def test_left_out_windows_are_an_exit_code(here, capsys, monkeypatch):
    from dsts_kernels.data import VideoError, sampling

    def some(path, *args, start=None, **options):
        if start == 1.0:
            raise VideoError(f"{path}: damaged")
        return decode(path, *args, start=start, **options)

    monkeypatch.setattr(sampling, "decode", some)
    assert run("clips/b.mp4", "--model", "last.pt", "--window", "1") == 1
    assert "clips/b.mp4: 1.0 to 2.0 s left out: clips/b.mp4: damaged" in capsys.readouterr().err.splitlines()
