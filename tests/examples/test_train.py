"""The training recipe at toy size: every variant, interrupted and resumed, two processes, figures, bad options."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsts_kernels import DSTSLayer
from dsts_kernels.backbones import BACKBONES, create
from dsts_kernels.classify import Classifier, ClassifierConfig
from dsts_kernels.cli import main as cli
from dsts_kernels.data import Symmetries, SyntheticDives
from dsts_kernels.data.named import DATA, SYNTHETIC
from dsts_kernels.learning import load_checkpoint, save_checkpoint
from dsts_kernels.viz import information_table
from examples import train
from tests.data.videos import write_video

pytestmark = pytest.mark.needs("torchmetrics")
ROOT = Path(__file__).resolve().parents[2]
TOY = ["--clips", "48", "--test-clips", "32", "--size", "16", "--frames", "4", "--width", "4", "--batch", "8"]
TOY += ["--neurons", "2", "--layers", "2", "--threads", "1", "--quiet"]
TPN = ["--backbone", "tpn", "--width", "2", "--size", "32"]


@pytest.fixture(autouse=True)
def threads():
    """``--threads`` is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out: Path, *options: str) -> dict:
    assert train.main([*TOY, "--out", str(out), *options]) == 0
    return load_checkpoint(out / "checkpoint.pt")


def comparable(state: dict) -> dict:
    """What must be the same in two runs: all but times, and where they were written."""
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in state["history"]]
    history = [{"start": state.get("gates_at_start")}, *history]
    return {"history": history, **{k: state[k] for k in ("epoch", "model", "optimizers", "generators", "routing")}}


def assert_same(a: object, b: object, where: str = "state") -> None:
    """Bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b or (a != a and b != b), where


VARIANTS = {
    "default": [],
    "backbone": ["--no-dsts"],
    "joint": ["--learning", "joint", "--balance", "0.1"],
    "no skip, second order": ["--no-skip", "--second-order"],
    "kernels": ["--scoring-kernel", "1x3x3", "--mixing-kernel", "3x1x1"],
    "literal": ["--literal"],
    "centred, balanced": ["--score-center", "balance", "--center-in-training", "--gate-offset", "1", "--augment"],
    "quieter, joint": [
        *("--learning", "joint", "--balance", "0.1", "--balance-on", "evaluation", "--score-center", "mean"),
        *("--gumbel-scale", "1", "0.1", "--gate-noise", "0.5", "--noise-shape", "cosine"),
    ],
    "both ways": ["--both-ways", "--warm-up", "2", "--one-rate", "--gate-rate", "0.1", "--backbone-rate", "1e-3"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path, name):
    """One epoch of each; what a checkpoint and ``metrics.json`` hold."""
    state = run(tmp_path, "--epochs", "1", *VARIANTS[name])
    (record,) = state["history"]
    assert json.loads((tmp_path / "metrics.json").read_text())[0]["top1"] == record["top1"]
    assert 0 <= record["top1"] <= 1 and len(record["class_accuracy"]) == 16
    assert ("val_loss" in record) == (name not in ("backbone", "joint", "quieter, joint"))
    assert ("gumbel_scale" in record) == (name == "quieter, joint")
    assert ("routing" in state) == ("dead" in record) == (name not in ("backbone", "literal"))
    if "routing" in state:
        assert state["routing"]["neuron"].shape == (2, 32) and state["routing"]["frames"].dtype == torch.uint8


def trainer(out: Path, *options: str) -> train.Trainer:
    return train.Trainer(train.parse([*TOY, "--out", str(out), *options]))


def test_what_options_of_ours_make(tmp_path):
    """Layers, groups of rates, schedule, learner and data are as asked for; by default all are the paper's."""
    plain = trainer(tmp_path)
    assert [len(optimizer.param_groups) for optimizer in plain.optimizers] == [1, 1]
    assert plain.schedule is None and plain.learner.warm_up == 0 and type(plain.train_set) is SyntheticDives
    layer = next(part for part in plain.model.modules() if isinstance(part, DSTSLayer))
    assert layer.score_center is False and layer.gate_offset == 0.0 and layer.gumbel_scale == 1.0
    own = trainer(
        tmp_path, "--score-center", "mean", "--center-momentum", "0.2", "--gate-offset", "2", "--augment",
        "--rate", "0.01", "--one-rate", "--gate-rate", "0.1", "--backbone-rate", "0.001", "--both-ways",
        "--warm-up", "3", "--gumbel-scale", "2", "1", "--noise-wait", "5", "--epochs", "2",
    )  # fmt: skip
    assert isinstance(own.train_set, Symmetries) and type(own.test_set) is SyntheticDives
    layer = next(part for part in own.model.modules() if isinstance(part, DSTSLayer))
    assert (layer.score_center, layer.center_momentum, layer.center_in_training) == ("mean", 0.2, False)
    assert layer.gate[0].mean() < -1.8 and layer.gate[1].mean() > 1.8 and layer.gumbel_scale == 2.0
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in own.optimizers]
    assert rates == [[0.01, 0.001], [0.01, 0.1]] and own.learner.warm_up == 3
    names = {id(p): name for name, p in own.model.named_parameters()}
    rest, backbone = ({names[id(p)] for p in group["params"]} for group in own.optimizers[0].param_groups)
    assert all(".dsts." in name or name.startswith("classifier.") for name in rest)
    assert backbone and not any(".dsts." in name or name.startswith("classifier.") for name in backbone)
    assert own.steps == 6 and len(own.loaders[0].dataset) == len(own.loaders[1].dataset) == 24
    assert (own.schedule.steps, own.schedule.wait) == (2 * 6 - 5, 5)
    literal = trainer(tmp_path, "--literal", "--gate-rate", "0.1", "--gumbel-scale", "0.5")
    assert [len(optimizer.param_groups) for optimizer in literal.optimizers] == [1, 2]


def test_a_trained_start(tmp_path):
    """``--init``: the backbone of a run without DSTS, or all of one with; frozen, no bit of it moves, BatchNorm's
    statistics included, and the rest learns."""
    run(tmp_path / "plain", "--epochs", "1", "--no-dsts")
    given = load_checkpoint(tmp_path / "plain" / "checkpoint.pt")["model"]
    init = ["--init", str(tmp_path / "plain" / "checkpoint.pt")]
    found = run(tmp_path / "frozen", "--epochs", "1", *init, "--freeze-backbone", "--learning", "joint")["model"]
    assert set(given) < set(found)
    for key, value in given.items():
        assert torch.equal(value, found[key]) != key.startswith("classifier."), key
    start = trainer(tmp_path, *init).model.state_dict()
    assert all(torch.equal(value, start[key]) for key, value in given.items())
    options = ["--score-center", "mean", "--gumbel-scale", "0.5"]
    with_dsts = run(tmp_path / "with", "--epochs", "1", *init, *options)["model"]
    init = ["--init", str(tmp_path / "with" / "checkpoint.pt")]
    again = trainer(tmp_path, *init, "--score-center", "mean").model
    assert all(torch.equal(value, with_dsts[key]) for key, value in again.state_dict().items())
    assert {layer.gumbel_scale for layer in again.modules() if isinstance(layer, DSTSLayer)} == {1.0}
    back = trainer(tmp_path, *init, "--no-dsts").model.state_dict()
    assert set(back) == set(given) and all(torch.equal(value, with_dsts[key]) for key, value in back.items())


def test_resumed_with_options_of_ours(tmp_path):
    """Centre, schedule, warm-up and symmetries go on where they were: every bit is that of a run left alone."""
    options = ["--epochs", "3", "--score-center", "balance", "--gumbel-scale", "1", "0.2", "--gate-noise", "1", "0.5"]
    options += ["--warm-up", "8", "--both-ways", "--augment", "--gate-rate", "0.05"]  # an epoch has six steps
    alone = run(tmp_path / "a", *options)
    stop = train.Trainer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "save", lambda self, *args: (stop(self, *args), self.epoch == 0 and 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "b", *options)
    half = load_checkpoint(tmp_path / "b" / "checkpoint.pt")
    assert half["learner_steps"] == half["schedule"]["done"] == 6
    resumed = run(tmp_path / "b", *options, "--resume")
    assert_same(comparable(resumed), comparable(alone))
    assert resumed["learner_steps"] == alone["learner_steps"] == resumed["schedule"]["done"] == 18
    assert Classifier.load(tmp_path / "b" / "checkpoint.pt").config.dsts["score_center"] == "balance"


def test_a_checkpoint_of_before_resumes(tmp_path):
    """One that a version without these options wrote, which has neither their names nor their states."""
    run(tmp_path, "--epochs", "1")
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    before = {k: v for k, v in state.items() if k not in ("learner_steps", "schedule")}
    names = ("score_center", "center_momentum", "gumbel_scale", "warm_up", "both_ways", "init", "augment", "noise_wait")
    before["options"] = {k: v for k, v in state["options"].items() if k not in names} | {"epochs": 2}
    save_checkpoint(tmp_path / "checkpoint.pt", before)
    assert run(tmp_path, "--epochs", "2", "--resume")["epoch"] == 1


def test_same_seed_same_run(tmp_path):
    """Twice the same; another seed differs."""
    first, second, other = (run(tmp_path / n, "--epochs", "2", "--seed", n[0]) for n in ("3", "3 again", "4"))
    assert_same(comparable(first), comparable(second))
    assert first["history"] != other["history"]


@pytest.mark.parametrize("learning", [["joint"], ["upstream-downstream"], ["upstream-downstream", "--second-order"]])
def test_killed_and_resumed_is_uninterrupted(tmp_path, learning):
    """SIGKILL in the middle of an epoch; from the last whole one on, every bit is that of a run left alone."""
    options = ["--epochs", "4", "--learning", *learning]
    command = [
        sys.executable,
        str(ROOT / "examples" / "train.py"),
        *TOY,
        "--clips",
        "240",
        "--out",
        str(tmp_path / "a"),
    ]
    killed_after_an_epoch([*command, *options], tmp_path / "a")
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt")["epoch"] < 3
    resumed = run(tmp_path / "a", *options, "--clips", "240", "--resume")
    alone = run(tmp_path / "b", *options, "--clips", "240")
    assert_same(comparable(resumed), comparable(alone))


def killed_after_an_epoch(command: list[str], out: Path) -> None:
    """Start a run, and kill it with all its processes in the middle of an epoch after the first."""
    with subprocess.Popen(command, start_new_session=True) as process:
        until = time.monotonic() + 200
        while not (out / "metrics.json").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    """torchrun with two processes: killed and resumed is uninterrupted, each with noise of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "train.py"), *TOY, "--clips", "480", "--epochs", "3", "--out"]
    killed_after_an_epoch([*command, str(tmp_path / "a")], tmp_path / "a")
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pt")["epoch"] < 2
    for given in ([str(tmp_path / "a"), "--resume"], [str(tmp_path / "b")]):
        done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    resumed, alone = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert_same(comparable(resumed), comparable(alone))
    first, second = (state["cpu"] for state in alone["generators"])
    assert not torch.equal(first, second)


@pytest.mark.needs("av")
def test_diving48(tmp_path, capsys):
    """From published annotations and videos to a checkpoint with figures; a missing and a broken clip are counted."""
    names = [f"dive_{i:05}" for i in range(10)]
    for name in names[:8]:
        write_video(tmp_path / f"{name}.mp4", 12)
    (tmp_path / f"{names[8]}.mp4").write_bytes(b"noise" * 50)
    (tmp_path / "vocab.json").write_text(
        json.dumps([["Back", "15som", "05Twis", "FREE"], ["Fwd", "25som", "NoTwis", "PIKE"]])
    )
    entries = [{"vid_name": n, "label": i % 2, "start_frame": 0, "end_frame": 12} for i, n in enumerate(names)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    given = ["--data", "diving48", "--videos", str(tmp_path), "--classes", str(tmp_path / "vocab.json")]
    given += ["--annotation", str(tmp_path / "train.json"), "--test-annotation", str(tmp_path / "test.json")]
    state = run(tmp_path / "out", *given, "--epochs", "1", "--batch", "2")
    assert "2 of 10 clips left out" in capsys.readouterr().out
    assert state["routing"]["neuron"].shape == (2, 8) and set(state["routing"]["attributes"]) >= {
        "position",
        "somersault",
    }
    assert cli(["plot", str(tmp_path / "out" / "checkpoint.pt")]) == 0


@pytest.mark.needs("av")
def test_finegym(tmp_path, capsys):
    """Elements cut out of a full video by their times; a class that the categories lack is an error."""
    write_video(tmp_path / "abc.mp4", 60)
    (tmp_path / "classes.txt").write_text(
        "Clabel:   0; set:  1; Glabel:   1; (VT) one\nClabel:   1; set:  2; Glabel:   5; (FX) two\n"
    )
    segments = {f"A_{i:04}_{i + 1:04}": {"stages": 1, "timestamps": [[0.5 * i, 0.5 * i + 0.5]]} for i in range(4)}
    event = {"event": 1, "timestamps": [[0.5, 2.9]], "segments": segments}
    (tmp_path / "segments.json").write_text(json.dumps({"abc": {"E_000000_000003": event}}))
    lines = [f"abc_E_000000_000003_{name} {i % 2}" for i, name in enumerate(segments)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    given = ["--data", "finegym", "--videos", str(tmp_path), "--classes", str(tmp_path / "classes.txt")]
    given += ["--segments", str(tmp_path / "segments.json"), "--test-annotation", str(tmp_path / "train.txt")]
    state = run(tmp_path / "out", *given, "--annotation", str(tmp_path / "train.txt"), "--epochs", "1", "--batch", "1")
    assert state["routing"]["label"].tolist() == [0, 1, 0, 1]
    (tmp_path / "other.txt").write_text(lines[0].replace(" 0", " 7"))
    assert train.main([*TOY, *given, "--annotation", str(tmp_path / "other.txt"), "--out", str(tmp_path)]) == 2
    assert "7" in capsys.readouterr().err


def test_a_test_clip_that_went_away(tmp_path, monkeypatch):
    """Its batch is smaller; pictures of other clips than those that were routed are not kept."""

    class Shrinking(SyntheticDives):
        def __getitems__(self, indices):
            return [self[index] for index in indices if index != 3]

    build = train.build_data

    def shrinking(options):
        made, test = build(options)
        test.__class__ = Shrinking
        return made, test

    monkeypatch.setattr(train, "build_data", shrinking)
    routing = run(tmp_path, "--epochs", "1", "--learning", "joint")["routing"]
    assert len(routing["label"]) == routing["neuron"].shape[1] == 31
    assert routing["frames"] is None and routing["frame_samples"] is None
    assert information_table(routing)


def test_a_package_that_does_not_import_is_told_first(tmp_path, capsys, monkeypatch):
    """Before an epoch is trained that would be lost: torchmetrics imports a torchvision that may not load."""
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    assert train.main([*TOY, "--out", str(tmp_path / "run")]) == 2
    assert "error: torchmetrics.classification: cannot be imported" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_a_missing_extra_is_one_line(tmp_path, capsys, monkeypatch):
    """All that is missing at once, and how to get it; nothing was made."""
    monkeypatch.setattr(train, "PACKAGES", ("no_package_a.part", "tqdm", "no_package_b"))
    assert train.main([*TOY, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: not installed: no_package_a, no_package_b; wanted the extra train: "
        "pip install -e '.[train]' -c constraints.txt\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", DATA)
def test_only_videos_are_decoded(monkeypatch, data):
    """Generated clips need no decoder."""
    monkeypatch.setattr(train, "PACKAGES", ())
    monkeypatch.setitem(sys.modules, "av", None)
    wants = pytest.raises(ImportError, match="av") if data not in SYNTHETIC else contextlib.nullcontext()
    with wants:
        train.import_packages(train.parse(["--data", data]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta", "gpu"])
def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch, device):
    """Before data are made, also under torchrun, where each process has a device of its own."""
    monkeypatch.setattr(train, "Trainer", None)
    for rank in (None, "1"):
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert train.main([*TOY, "--out", str(tmp_path / "run"), "--device", device]) == 2
        error = capsys.readouterr().err
        given = "cuda:1" if rank and device.startswith("cuda") else device
        assert error.startswith(f"error: --device: got '{given}', wanted a device of this machine (")
        assert error.count("\n") == 1


def test_a_log_has_one_line_for_each_epoch(tmp_path, capsys):
    """Where nobody watches there is no bar; the first line says what is trained and where results go."""
    assert train.main([o for o in TOY if o != "--quiet"] + ["--epochs", "2", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    lines = [line for line in told.out.splitlines() if line]
    assert [line.split(":")[0] for line in lines] == ["synthetic", "epoch 0", "epoch 1"] and told.err == ""
    assert "2 epochs" in lines[0] and str(tmp_path) in lines[0]


@pytest.mark.parametrize(
    "options",
    [TPN, [*TPN, "--aux-head", "--learning", "joint"], [*TPN, "--where", "backbone.layer2.0", "--literal"]],
    ids=["default", "auxiliary head", "elsewhere, literal"],
)
def test_backbone(tmp_path, options):
    """TPN learns too; its checkpoint says what it is, and resumes to the bits of a run left alone."""
    toy = ["--clips", "16", "--test-clips", "16", "--batch", "4", *options]
    state = run(tmp_path / "a", *toy, "--epochs", "1")
    config = ClassifierConfig.from_dict(state["classifier"])
    known = BACKBONES["tpn"]
    assert (config.backbone, config.sampling.frames, config.sampling.size) == ("tpn", 4, 32)
    assert (config.sampling.mean, config.sampling.std) == (known.mean, known.std)
    assert config.class_names == tuple(SyntheticDives.class_names)
    assert config.build().state_dict().keys() == state["model"].keys()
    assert any(key.startswith(f"{config.where or known.where}.") and ".gate" in key for key in state["model"])
    run(tmp_path / "b", *toy, "--epochs", "2")  # rates are a matter of the number of epochs
    stop = train.Trainer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "save", lambda self, *args: (stop(self, *args), self.epoch == 0 and 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "c", *toy, "--epochs", "2")
    resumed = run(tmp_path / "c", *toy, "--epochs", "2", "--resume")
    alone = load_checkpoint(tmp_path / "b" / "checkpoint.pt")
    assert torch.equal(resumed["model"]["backbone.conv1.conv.weight"], alone["model"]["backbone.conv1.conv.weight"])
    assert resumed["generators"] and str(strip(resumed)) == str(strip(alone))


def strip(state: dict) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in state["history"]]


def test_pretrained_weights(tmp_path):
    """A file's weights are where training starts from, but the head; a resumed run needs the file no more."""
    given = create("tpn", 5, width=2)
    torch.save(given.state_dict(), tmp_path / "tpn.pth")
    options = train.parse([*TOY, *TPN, "--weights", str(tmp_path / "tpn.pth"), "--out", str(tmp_path / "out")])
    model = train.Trainer(options).model.state_dict()
    body = [key for key in given.state_dict() if not key.startswith(BACKBONES["tpn"].head)]
    assert body and all(torch.equal(model[key], given.state_dict()[key]) for key in body)
    assert model["cls_head.fc_cls.weight"].shape[0] == 16
    (tmp_path / "tpn.pth").unlink()
    options.resume = True
    train.Trainer(options)


@pytest.mark.needs("torchvision")
def test_backbone_of_torchvision(tmp_path, torchvision):
    """Any of the registry, with DSTS of its own size; then a video through the checkpoint."""
    video = write_video(tmp_path / "clip.mp4", 12)
    toy = ["--clips", "4", "--test-clips", "2", "--batch", "2", "--layers", "1", "--learning", "joint", "--epochs", "1"]
    assert train.main(["--backbone", "mc3_18", "--frames", "4", "--size", "24", "--neurons", "2", "--threads", "1",
                       "--quiet", *toy, "--out", str(tmp_path)]) == 0  # fmt: skip
    found = Classifier.load(tmp_path / "checkpoint.pt")(video)
    assert found.probabilities.shape == (16,) and len(found.windows[0].neurons) == 1
    (tmp_path / "checkpoint.pt").unlink()  # 240 MB


def test_resume_refuses_another_run(tmp_path, capsys):
    run(tmp_path, "--epochs", "1")
    assert train.main([*TOY, "--out", str(tmp_path), "--resume", "--epochs", "1", "--rate", "1"]) == 2
    assert "rate 0.004 there and 1.0 here" in capsys.readouterr().err
    assert train.main([*TOY, "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    run(tmp_path / "some", "--epochs", "1")
    monkeypatch.setattr(train.Trainer, "run_epoch", stop)
    for out, says in (("some", "--resume"), ("none", "no epoch was whole")):
        assert train.main([*TOY, "--out", str(tmp_path / out), "--epochs", "2"]) == 130
        assert says in capsys.readouterr().err


@pytest.mark.needs("matplotlib")
def test_figures(tmp_path, capsys):
    """``plot`` draws every figure of a checkpoint of this recipe."""
    run(tmp_path, "--epochs", "2")
    assert cli(["plot", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path / "figures")]) == 0
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn >= {"gates.png", "activation.png", "examples.png", "usage.png", "saturation.png", "information.json"}
    assert "timing" in capsys.readouterr().out
