"""The data set: what it leaves out and says of it, broken files among good ones, randomness that can be repeated."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dsts_kernels.data.annotations import Annotations, Clip, read_diving48, read_finegym
from dsts_kernels.data.clips import VideoClips
from dsts_kernels.data.transforms import EvalTransform
from dsts_kernels.data.video import VideoError, decode
from dsts_kernels.learning import split_train_val

from .videos import RATE, frame_numbers, truncate, write_video

pytestmark = pytest.mark.needs("av")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("source") / "good.mp4", 40, faststart=True)


def clip(path: Path, label: int = 0) -> Clip:
    return Clip(path, label, None, None, None, None, path.stem)


def annotated(*clips: Clip) -> Annotations:
    return Annotations(clips, ["a", "b", "c"], {"set": [0, 1, 1]}, {"set": ["set 1", "set 2"]})


@pytest.fixture
def mixed(source: Path, tmp_path: Path) -> Annotations:
    """Good, missing, unreadable, cut off, good: labels 0, 1, 2, 1, 2."""
    for name in ("first", "short", "last"):
        shutil.copy(source, tmp_path / f"{name}.mp4")
    truncate(tmp_path / "short.mp4", 0.6)
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    names = ("first", "missing", "noise", "short", "last")
    return annotated(
        *(clip(tmp_path / f"{name}.mp4", label) for name, label in zip(names, (0, 1, 2, 1, 2), strict=True))
    )


@pytest.fixture
def good(source: Path) -> Annotations:
    return annotated(*(clip(source, label) for label in (0, 1, 2, 0, 1, 2)))


def test_items(good: Annotations, source: Path):
    clips = VideoClips(good, frames=4, size=32, train=False)
    picture, label = clips[1]
    assert picture.shape == (3, 4, 32, 32) and picture.dtype == torch.float32
    assert label == 1 and type(label) is int
    assert torch.equal(picture, EvalTransform(32)(decode(source, 4, size=32)))
    assert torch.equal(clips[-1][0], picture) and clips[-1][1] == 2
    with pytest.raises(IndexError, match="index 6 of 6"):
        clips[6]
    assert clips.class_names == ["a", "b", "c"] and clips.num_classes == 3
    assert clips.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert clips.attributes["set"].tolist() == [0, 1, 1, 0, 1, 1] and clips.attributes["set"].dtype == torch.int64
    assert clips.skipped == {} and clips.report() == "0 of 6 clips left out"


def test_what_is_left_out_of_training(mixed: Annotations):
    clips = VideoClips(mixed, frames=4, size=32, train=True)
    assert len(clips) == 3 and clips.labels.tolist() == [0, 1, 2] and clips.attributes["set"].tolist() == [0, 1, 1]
    assert clips.skipped == {"missing": ["missing"], "corrupt": ["noise"]}
    assert clips.report() == "2 of 5 clips left out: 1 missing, 1 corrupt (first: missing)"


def test_what_is_left_out_of_evaluation(mixed: Annotations):
    """A file that breaks off is left out whole; length, labels and attributes are those of what is read."""
    with pytest.warns(UserWarning, match="only 2 of 5 clips are read"):
        clips = VideoClips(mixed, frames=4, size=32, train=False)
    assert len(clips) == 2 and clips.labels.tolist() == [0, 2] and clips.attributes["set"].tolist() == [0, 1]
    assert clips.skipped == {"missing": ["missing"], "corrupt": ["noise", "short"]}
    assert [clips[index][1] for index in range(2)] == [0, 2]


@pytest.mark.parametrize("train", [True, False])
def test_it_is_said_where_most_clips_are_left_out(source: Path, tmp_path: Path, train: bool):
    """An accuracy on a few clips should not look like one on all; of a half and fewer nothing is said."""
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    bad = [clip(tmp_path / "noise.mp4")] * 2
    with pytest.warns(
        UserWarning,
        match=r"only 1 of 3 clips are read; 2 of 3 clips left out: 2 corrupt \(first: noise\); .*noise\.mp4: Invalid",
    ):
        VideoClips(annotated(*bad, clip(source)), train=train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoClips(annotated(*bad, clip(source), clip(source)), train=train)


def test_most_stretches_are_not_there(source: Path):
    after = [Clip(source, 1, 7.0, 8.0, None, None, "after")] * 2
    with pytest.warns(UserWarning, match=r"only 1 of 3 clips are read; .*2 unreadable.*good\.mp4: ends at 2\.00 s"):
        VideoClips(annotated(*after, clip(source)), train=False)


def test_clips_of_good_files_that_do_not_decode(source: Path):
    """A stretch after the end, and one in frames: told at construction, each counted once."""
    after = Clip(source, 1, 7.0, 8.0, None, None, "after")
    beyond = Clip(source, 2, None, None, 90, 95, "beyond")
    clips = VideoClips(annotated(after, clip(source), beyond, clip(source, 2)), frames=4, size=32, train=False)
    assert clips.labels.tolist() == [0, 2] and clips.skipped == {"unreadable": ["after", "beyond"]}
    assert clips.report() == "2 of 4 clips left out: 2 unreadable (first: after)"
    assert [label for _, label in DataLoader(clips, batch_size=None)] == [0, 2]
    with pytest.raises(VideoError, match=r"none of 1 clips can be decoded: .*good\.mp4: ends at 2\.00 s"):
        VideoClips(annotated(after), train=False)


def test_evaluation_replaces_nothing(mixed: Annotations):
    """What only reading shows raises by its index, and makes a loader's batch smaller."""
    clips = VideoClips(mixed, frames=4, size=32, train=False, check=False)
    assert len(clips) == 4 and clips.skipped == {"missing": ["missing"]}
    with pytest.warns(UserWarning, match=r"short\.mp4: cut off after .*; short is left out"):
        with pytest.raises(VideoError, match=r"short\.mp4: cut off"):
            clips[2]
    with pytest.warns(UserWarning, match=r"noise\.mp4: .*; noise is left out"):
        batches = [labels.tolist() for _, labels in DataLoader(clips, batch_size=3)]
    assert batches == [[0], [2]]
    assert clips.skipped["unreadable"] == ["noise", "short"]
    with pytest.raises(VideoError, match=r"none of the 2 clips of a batch can be decoded, e\.g\. noise; check=True"):
        clips.__getitems__([1, 2])


def test_training_replaces_by_a_clip_drawn(source: Path, tmp_path: Path):
    """By seed, epoch and index alone: not by the order of reading, what failed before, or who reads."""
    short = truncate(Path(shutil.copy(source, tmp_path / "short.mp4")), 0.6)
    entries = [clip(source, number) if number % 4 else clip(short, number) for number in range(12)]
    annotations = Annotations(tuple(entries), [str(n) for n in range(12)], {}, {})

    def made(seed: int = 0) -> VideoClips:
        return VideoClips(annotations, frames=2, size=16, train=True, seed=seed)

    def drawn(clips: VideoClips, order: Iterable[int]) -> dict[int, tuple[int, float]]:
        items = {index: clips[index] for index in order}
        return {index: (label, float(picture.sum())) for index, (picture, label) in items.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = drawn(made(), range(12))
        clips = made()
        assert drawn(clips, reversed(range(12))) == alone and drawn(clips, range(12)) == alone
        loaded = [label for _, label in DataLoader(made(), num_workers=2, batch_size=None)]
        assert loaded == [alone[index][0] for index in range(12)]
        replaced = {index: alone[index][0] for index in (0, 4, 8)}
        assert all(label % 4 for label in replaced.values()) and clips.skipped["replaced"] == ["short"] * 3
        assert all(alone[index][0] == index for index in range(12) if index % 4)
        elsewhere = []
        for epoch in range(1, 5):
            clips.set_epoch(epoch)
            elsewhere.append({index: clips[index][1] for index in (0, 4, 8)})
        assert any(labels != replaced for labels in elsewhere)
        assert any({index: made(seed)[index][1] for index in (0, 4, 8)} != replaced for seed in range(1, 5))
        assert clips[-12][1] == clips[0][1]


def test_a_part_replaces_from_itself(source: Path, tmp_path: Path):
    """What one part of Upstream-Downstream Learning reads, the other never sees, whatever is broken."""
    short = truncate(Path(shutil.copy(source, tmp_path / "short.mp4")), 0.6)
    entries = [clip(short if number % 2 else source, number) for number in range(12)]
    clips = VideoClips(Annotations(tuple(entries), [str(n) for n in range(12)], {}, {}), frames=2, size=16, train=True)
    parts = split_train_val(clips, 0.5, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch in range(4):
            parts[0].set_epoch(epoch)
            for part in parts:
                own = part.indices.tolist()
                read = [part[index][1] for index in range(len(part))]
                assert set(read) <= set(own) and all(label % 2 == 0 for label in read)
                assert [label for label, index in zip(read, own, strict=True) if index % 2 == 0] == [
                    index for index in own if index % 2 == 0
                ]
        bad = torch.tensor([1, 3, 5])
        with pytest.raises(VideoError, match=r"none of the 3 clips can be decoded, e\.g\. .*short\.mp4"):
            clips.read_among(3, bad)


def test_one_warning_a_file(source: Path, tmp_path: Path):
    short = truncate(Path(shutil.copy(source, tmp_path / "short.mp4")), 0.6)
    clips = VideoClips(annotated(clip(short), clip(short), clip(source, 2)), frames=4, size=32, train=True)
    with pytest.warns(UserWarning, match="another clip is read instead of short") as caught:
        assert clips[0][1] == clips[1][1] == 2
    assert len(caught) == 1 and caught[0].filename == __file__ and clips.skipped["replaced"] == ["short", "short"]
    assert clips.report() == "2 of 3 clips left out: 2 replaced (first: short)"


def test_workers_count_for_all(mixed: Annotations):
    clips = VideoClips(mixed, frames=4, size=32, train=False, check=False)
    batches = [labels.tolist() for _, labels in DataLoader(clips, num_workers=2, batch_size=2)]
    assert batches == [[0], [2]]
    assert clips.skipped["unreadable"] == ["noise", "short"]


def test_nothing_to_read(tmp_path: Path, source: Path):
    with pytest.raises(FileNotFoundError, match=r"all 1 videos are missing, e\.g\. .*none\.mp4"):
        VideoClips(annotated(clip(tmp_path / "none.mp4")), train=True)
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(b"noise")
    with pytest.raises(VideoError, match=r"none of 1 videos can be read: .*noise\.mp4"):
        VideoClips(annotated(clip(noise)), train=True)
    clips = VideoClips(
        annotated(clip(noise), clip(truncate(Path(shutil.copy(source, tmp_path)), 0.6))), train=True, check=False
    )
    with pytest.warns(UserWarning), pytest.raises(VideoError, match="none of the 2 clips can be decoded"):
        clips[0]
    with pytest.raises(ValueError, match="wanted at least one clip"):
        VideoClips(annotated(), train=True)
    with pytest.raises(ValueError, match="frames: wanted at least 1, got 0"):
        VideoClips(annotated(clip(source)), train=True, frames=0)
    with pytest.raises(TypeError, match=r"seed: wanted an int, got float 1\.5"):
        VideoClips(annotated(clip(source)), train=True, seed=1.5)


def test_same_sample_in_any_worker(good: Annotations):
    clips = VideoClips(good, frames=4, size=32, train=True, seed=7)
    alone = [picture for picture, _ in DataLoader(clips, batch_size=None)]
    backwards = [clips[index][0] for index in reversed(range(len(clips)))][::-1]
    for pictures in (backwards, [picture for picture, _ in DataLoader(clips, batch_size=None, num_workers=2)]):
        assert all(torch.equal(*pair) for pair in zip(alone, pictures, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_numbers_of_any_kind_are_the_same_item(good: Annotations):
    """Samplers give ints, or numbers of NumPy's or torch's."""
    clips = VideoClips(good, frames=4, size=32, train=True)
    for index in (np.int64(3), torch.tensor(3), np.int32(-3)):
        assert torch.equal(clips[index][0], clips[3][0])
    assert torch.equal(VideoClips(good, frames=4, size=32, train=True, seed=np.int64(0))[3][0], clips[3][0])


def test_epochs_and_seeds_differ_and_repeat(good: Annotations):
    clips = VideoClips(good, frames=4, size=32, train=True)
    first = clips[0][0]
    clips.set_epoch(1)
    second = clips[0][0]
    assert not torch.equal(first, second)
    clips.set_epoch(0)
    assert torch.equal(first, clips[0][0])
    assert not torch.equal(first, VideoClips(good, frames=4, size=32, train=True, seed=1)[0][0])


def test_epoch_reaches_persistent_workers(good: Annotations):
    clips = VideoClips(good, frames=4, size=32, train=True)
    loader = DataLoader(clips, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        clips.set_epoch(epoch)
        epochs.append([picture for picture, _ in loader])
        assert torch.equal(epochs[-1][0], clips[0][0])
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_evaluation_is_not_random(good: Annotations):
    clips = VideoClips(good, frames=4, size=32, train=False)
    first = clips[0][0]
    clips.set_epoch(5)
    assert torch.equal(first, clips[0][0])


def seen(clips: VideoClips, index: int) -> list[int]:
    """Frame numbers of an evaluation item as wide as the video, so that nothing is cropped."""
    entry = clips._clips[index]
    numbers = decode(
        entry.path, 4, start=entry.start, end=entry.end, first_frame=entry.first_frame, last_frame=entry.last_frame
    )
    assert torch.equal(clips[index][0], EvalTransform(48)(numbers))
    return frame_numbers(numbers)


def test_diving48_end_to_end(source: Path, tmp_path: Path):
    shutil.copy(source, tmp_path / "dive.mp4")
    entry = {"vid_name": "dive", "label": 0, "start_frame": 10, "end_frame": 14}
    (tmp_path / "train.json").write_text(json.dumps([entry, {**entry, "vid_name": "gone"}, {**entry, "end_frame": 18}]))
    (tmp_path / "vocab.json").write_text(json.dumps([["Back", "15som", "05Twis", "FREE"]]))
    annotations = read_diving48(tmp_path / "train.json", tmp_path / "vocab.json", tmp_path)
    clips = VideoClips(annotations, frames=4, size=48, train=False)
    assert clips.report() == "1 of 3 clips left out: 1 missing (first: gone)"
    assert seen(clips, 0) == [10, 11, 12, 13] and seen(clips, 1) == [11, 13, 15, 17]
    assert sorted(clips.attributes) == ["position", "somersault", "takeoff", "twist"]


def test_finegym_end_to_end(source: Path, tmp_path: Path):
    """One element in a file of its own, one cut from the full video, one of a video that is not there."""
    cut, full = "abc_E_000000_000002_A_0000_0001", "abc_E_000000_000002_A_0001_0002"
    shutil.copy(source, tmp_path / f"{cut}.mp4")
    shutil.copy(source, tmp_path / "abc.mp4")
    (tmp_path / "train.txt").write_text(f"{cut} 0\n{full} 1\nxyz{full[3:]} 1\n")
    (tmp_path / "categories.txt").write_text(
        "Clabel: 0; set: 1; Glabel: 1; (VT) x\nClabel: 1; set: 2; Glabel: 9; (FX) y\n"
    )
    stages = {"stages": 2, "timestamps": [[15 / RATE, 17 / RATE], [17 / RATE, 19 / RATE]]}
    event = {"event": 1, "timestamps": [[5 / RATE, 2.0]], "segments": {"A_0001_0002": stages}}
    (tmp_path / "info.json").write_text(json.dumps({"abc": {"E_000000_000002": event}}))
    annotations = read_finegym(
        tmp_path / "train.txt", tmp_path / "categories.txt", tmp_path, segments=tmp_path / "info.json"
    )
    clips = VideoClips(annotations, frames=4, size=48, train=False)
    assert seen(clips, 0) == [5, 15, 25, 35] and seen(clips, 1) == [20, 21, 22, 23]
    assert clips.skipped == {"missing": [f"xyz{full[3:]}"]} and clips.attributes["set"].tolist() == [0, 1]
