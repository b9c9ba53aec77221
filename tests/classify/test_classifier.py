"""The classifier: the same answer as by hand, by window, and a reason for every file that gives none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dsts_kernels import FrozenDSTS, FusedDSTS, insert_dsts
from dsts_kernels.backbones import create
from dsts_kernels.classify import Classifier, ClassifierConfig
from dsts_kernels.data import ClipSampling, VideoError, decode
from dsts_kernels.learning import load_checkpoint, save_checkpoint
from dsts_kernels.testing import assert_close
from tests.data.videos import damage, frame_numbers, numbered, packet_places, write_pictures, write_video

from .models import CLASSES, SAMPLING, Noting, config, lively, write_checkpoint

needs_av = pytest.mark.needs("av")
pytestmark = needs_av


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 60)  # 3 s


def by_hand(model: nn.Module, path: Path) -> tuple[torch.Tensor, list[int], list[float]]:
    """Decoded, cut, normalised and classified step by step; DSTS unfrozen."""
    frames = decode(path, SAMPLING.frames, size=SAMPLING.size)
    left = (frames.shape[2] - SAMPLING.size) // 2
    clip = frames[:, :, left : left + SAMPLING.size].permute(3, 0, 1, 2).float()[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (SAMPLING.mean, SAMPLING.std))
    (dsts,) = [part for part in model.modules() if isinstance(part, FusedDSTS)]
    seen: list = []
    handle = dsts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model((clip - mean) / std)
        handle.remove()
        _, routing = dsts(seen[0], return_routing=True)
    return logits.softmax(1)[0], routing.neuron[:, 0].tolist(), routing.gate[:, 0].mean(1).tolist()


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"where": "stages.1"}, {"backbone": "tpn", "options": {"width": 2, "blocks": (1, 1, 1, 1)}}],
    ids=["tiny", "elsewhere", "tpn"],
)
def test_is_what_the_model_says(tmp_path, video, freeze, changes):
    """Frozen or not: probabilities, neurons, spatial channels; and every part has taken its time."""
    model = write_checkpoint(tmp_path / "last.pt", **changes)
    classifier = Classifier.load(tmp_path / "last.pt", freeze=freeze)
    kinds = {type(part) for part in classifier.model.modules() if isinstance(part, (FrozenDSTS, FusedDSTS))}
    assert kinds == {FrozenDSTS if freeze else FusedDSTS}
    found = classifier(video)
    wanted, neurons, spatial = by_hand(model, video)
    assert_close(found.probabilities, wanted)
    (window,) = found.windows
    assert list(window.neurons) == neurons and found.neurons() == [{neuron: 1} for neuron in neurons]
    assert found.spatial() == pytest.approx(spatial) and 0 < min(spatial) and max(spatial) < 1
    assert min(found.times) > 0 and found.trained and found.left_out == ()
    best = int(wanted.argmax())
    assert found.top(2)[0] == (CLASSES[best], pytest.approx(float(wanted[best]), rel=1e-4))
    assert len(found.top(9)) == 3 and window.frames is None


def test_without_dsts(tmp_path, video):
    write_checkpoint(tmp_path / "last.pt", dsts=None)
    found = Classifier.load(tmp_path / "last.pt")(video)
    assert found.neurons() == [] and found.spatial() == [] and found.times.dsts == 0 < found.times.backbone
    assert "no DSTS in this model" in found.text() and "DSTS 0" not in found.text()


def test_windows(video):
    """Each sees its own frames; the answer is their mean; batches change nothing."""
    sampling = ClipSampling(frames=2, size=48, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    for batch in (1, 2, 5):
        model = Noting()
        found = Classifier(model, sampling, CLASSES)(video, length=1.0, batch=batch, keep=2)
        assert [(w.window.start, w.window.end) for w in found.windows] == [(0, 1), (1, 2), (2, 3)]
        each = torch.stack([window.probabilities for window in found.windows])
        assert torch.equal(found.probabilities, each.mean(0)) and not torch.equal(each[0], each[1])
        assert found.top(1, 1)[0][1] == each[1].max()
        kept = [w.frames for w in found.windows]
        assert kept[1] is None and frame_numbers(kept[0]) == [5, 15] and frame_numbers(kept[2]) == [45, 55]
        wanted = torch.stack([decode(video, 2, start=float(s), end=s + 1.0) for s in range(3)])[:, :, :, 8:56]
        assert torch.equal(torch.stack(model.clips).round().to(torch.uint8).permute(0, 2, 3, 4, 1), wanted)


def test_progress_goes_through_the_windows(video):
    seen: list = []

    def progress(windows):
        for window in windows:
            seen.append(window)
            yield window

    found = Classifier(Noting(), SAMPLING, CLASSES)(video, length=0.5, hop=0.25, progress=progress)
    assert seen == [result.window for result in found.windows] and len(seen) == 11


def test_a_damaged_window_is_left_out(tmp_path):
    """Of a long video; the others answer, and the reason is kept."""
    path = write_video(tmp_path / "clip.mp4", 60, codec="mpeg4")
    damage(path, *range(22, 39))
    found = Classifier(Noting(), SAMPLING, CLASSES)(path, length=1.0)
    assert [result.window.start for result in found.windows] == [0, 2]
    ((window, reason),) = found.left_out
    assert (window.start, window.end) == (1, 2) and "damaged" in reason
    assert "left out: 1.0 to 2.0 s" in found.text() and found.to_dict()["left_out"][0]["reason"] == reason
    whole = write_video(tmp_path / "whole.mp4", 60, codec="mpeg4")
    damage(whole, *range(1, len(packet_places(whole))))
    with pytest.raises(VideoError, match="damaged"):
        Classifier(Noting(), SAMPLING, CLASSES)(whole, length=1.0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 300), (300, 2), (47, 63), (17, 16)])
def test_odd_sizes(tmp_path, height, width):
    path = write_pictures(
        tmp_path / "a.avi", [numbered(3)[:1, :1].repeat(height, 0).repeat(width, 1)] * 3, codec="ffv1", pixels="bgr0"
    )
    found = Classifier(Noting(), SAMPLING, CLASSES)(path, keep=1)
    assert len(found.windows) == 1 and bool(found.probabilities.isfinite().all())


def test_files_that_give_no_answer(tmp_path):
    """Missing, empty, no video, sound alone: named, with the reason."""
    import av

    classifier = Classifier(Noting(), SAMPLING, CLASSES)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video " * 100)
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate, frame.pts = 48_000, 0
        frame.planes[0].update(bytes(4096))
        out.mux([*stream.encode(frame), *stream.encode()])
    for name, says in (("none", ""), ("empty", ""), ("text", ""), ("sound", r"has no video stream \(audio only\)")):
        with pytest.raises(VideoError, match=rf"{name}\.mp4.*{says}"):
            classifier(tmp_path / f"{name}.mp4")


def test_untrained_says_so(video):
    """The same weights each time, from a seed, and torch's own stream is left alone."""
    before = torch.get_rng_state()
    first, second = (Classifier.untrained("tiny", num_classes=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = Classifier.untrained("tiny", num_classes=4, seed=1)(video)
    found = first(video)
    assert not found.trained and "weights are random" in found.text() and found.to_dict()["top"] == []
    assert torch.equal(found.probabilities, second(video).probabilities)
    assert not torch.equal(found.probabilities, other.probabilities)
    assert len(found.windows[0].neurons) == 3 and "class 0" not in found.text()
    assert first.config.where is None and first.sampling.frames == 8
    with pytest.raises(ValueError, match="backbone: got 'tnp', wanted one of tpn"):
        Classifier.untrained("tnp")


def test_a_model_of_your_own(video):
    """Any model of clips, with several DSTS modules in it; they are frozen in place."""
    model = lively(create("tiny", 3, width=4))
    for where, neurons in (("stages.0", 2), ("stages", 5)):
        insert_dsts(model, where, num_neurons=neurons, num_layers=2)
    classifier = Classifier(model, SAMPLING, CLASSES)
    found = classifier(video)
    assert classifier.model is model and classifier.config is None and len(found.windows[0].neurons) == 4
    assert classifier(video).windows[0].neurons == found.windows[0].neurons  # nothing of the call before


def test_models_that_do_not_fit(video):
    with pytest.raises(ValueError, match=r"model: got logits \(1, 3\), wanted \(1, 2\)"):
        Classifier(Noting(), SAMPLING, CLASSES[:2])(video)
    model = lively(create("tiny", 3, width=4))
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model: got logits that are not finite for '.*clip\.mp4'"):
        Classifier(model, SAMPLING, CLASSES)(video)
    with pytest.raises(ValueError, match="device: got 'nowhere', wanted a device of this machine"):
        Classifier(Noting(), SAMPLING, CLASSES, device="nowhere")
    with pytest.raises(ValueError, match="batch, keep: got 0 and 0"):
        Classifier(Noting(), SAMPLING, CLASSES)(video, batch=0)


def changed(path: Path, change) -> None:
    content = load_checkpoint(path)
    change(content)
    save_checkpoint(path, content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: c.pop("classifier"),
            r"a checkpoint without 'classifier'; wanted a checkpoint of examples/train\.py",
        ),
        (lambda c: c.pop("model"), "a checkpoint without 'model'"),
        (lambda c: c["classifier"].update(backbone="tnp"), "cannot be made: backbone: got 'tnp', wanted one of tpn"),
        (lambda c: c["classifier"].pop("where"), "classifier: got backbone, .*wanted backbone, class_names"),
        (lambda c: c.update(classifier=3), "classifier: got int 3, wanted a mapping"),
        (lambda c: c["classifier"].update(class_names=[]), "class_names: got"),
        (lambda c: c["classifier"].update(class_names="ab"), "class_names: got str 'ab', wanted a list"),
        (lambda c: c["classifier"].update(where="stage"), "where: got 'stage', wanted a submodule of TinyNet"),
        (lambda c: c["classifier"]["sampling"].update(frames=0), "frames: got 0"),
        (lambda c: c["classifier"]["sampling"].pop("size"), "sampling: got frames, "),
        (lambda c: c["classifier"]["dsts"].update(num_neuron=3), "num_neuron"),
        (lambda c: c["classifier"].update(options={"width": 0}), "width: got 0 for tiny, wanted a whole number"),
        (lambda c: c["classifier"].update(options={"depth": 2}), "depth"),
        (
            lambda c: c["classifier"].update(options={"width": 8}),
            "is no state of this model, of whose .* names: .* of anoth",
        ),
        (lambda c: c["model"].pop("classifier.bias"), r"1 missing \(classifier\.bias\)"),
        (lambda c: c["classifier"].update(class_names=["a"]), r"classifier\.weight: got \(3, 16\), wanted \(1, 16\)"),
    ],
)
def test_checkpoints_of_another_model(tmp_path, change, says):
    write_checkpoint(tmp_path / "last.pt")
    changed(tmp_path / "last.pt", change)
    with pytest.raises(ValueError, match=says) as error:
        Classifier.load(tmp_path / "last.pt")
    assert "last.pt" in str(error.value)


def test_files_of_another_kind(tmp_path):
    model = write_checkpoint(tmp_path / "last.pt")
    FusedDSTS(4).eval().freeze().save(tmp_path / "frozen.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:5000])
    for name, says in (
        (
            "frozen",
            "format is 'dsts_kernels frozen 1', wanted 'dsts_kernels checkpoint 1'.*examples/train.py --weights",
        ),
        ("state", "format is None"),
        ("cut", "which torch.load cannot read"),
    ):
        with pytest.raises(ValueError, match=says):
            Classifier.load(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        Classifier.load(tmp_path / "none.pt")


def test_config_goes_there_and_back():
    about = config(
        where="stages.1", sampling=ClipSampling(frames=4, size=32, stride=2, mean=(0.5,) * 3, std=(1.0,) * 3)
    )
    assert ClassifierConfig.from_dict(about.to_dict()) == about
    assert ClassifierConfig.from_dict(config(dsts=None).to_dict()).dsts is None
    for wrong, says in (
        ({"sampling": 3}, "sampling: got int"),
        ({"dsts": 3}, "dsts: got int"),
        ({"options": {1: 2}}, "options: got"),
        ({"where": 3}, "where: got int"),
    ):
        with pytest.raises(TypeError, match=says):
            config(**wrong)


def test_literal_is_of_the_same_state(tmp_path, video):
    """What was trained with the literal module is classified by ours."""
    about = config()
    literal = lively(about.build(literal=True))
    save_checkpoint(tmp_path / "last.pt", {"classifier": about.to_dict(), "model": literal.state_dict()})
    classifier = Classifier.load(tmp_path / "last.pt")
    clip = SAMPLING.transform(SAMPLING.decode(video))[None]
    with torch.no_grad():
        assert_close(classifier(video).probabilities, literal(clip).softmax(1)[0])
    assert sum(isinstance(part, FrozenDSTS) for part in classifier.model.modules()) == 1
