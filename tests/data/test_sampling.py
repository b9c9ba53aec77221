"""Windows of long videos, strides, and when a video has pictures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dsts_kernels.data import ClipSampling, Extent, VideoError, decode, extent, frame_indices
from dsts_kernels.data.clips import VideoClips
from dsts_kernels.data.records import Annotations, Clip

from .videos import RATE, frame_numbers, write_pictures, write_video

needs_av = pytest.mark.needs("av")
HALF = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
SPREAD = ClipSampling(frames=4, size=24, **HALF)
DENSE = ClipSampling(frames=4, size=24, stride=5, **HALF)


def bounds(windows: list) -> list[tuple[float, float]]:
    return [(round(start, 6), round(end, 6)) for start, end in windows]


@pytest.mark.parametrize(
    ("video", "given", "wanted"),
    [
        ((0, 10), {}, [(0, 10)]),
        ((0, 14.9), {}, [(0, 14.9)]),
        ((0.5, 30.5), {}, [(0.5, 10.5), (10.5, 20.5), (20.5, 30.5)]),
        ((0, 600), {"length": math.inf}, [(0, 600)]),
        ((0, 5), {"length": 2}, [(0, 2.5), (2.5, 5)]),
        ((0, 1), {"length": 100, "hop": 1}, [(0, 1)]),
        ((0, 4), {"length": 2, "hop": 1}, [(0, 2), (1, 3), (2, 4)]),
        ((0, 4.5), {"length": 2, "hop": 1}, [(0, 2), (1, 3), (2, 4), (2.5, 4.5)]),
        ((0, 0.05), {}, [(0, 0.05)]),
    ],
)
def test_windows(video, given, wanted):
    """Equal parts of about the length wanted; with a hop of that length, the last one at the end."""
    assert bounds(SPREAD.windows(Extent(*video, 0.04), **given)) == wanted


@pytest.mark.parametrize(
    ("video", "hop", "wanted"),
    [
        ((0, 0.8, 0.04), None, [(0, 0.8)]),
        ((0, 0.5, 0.04), None, [(0, 0.5)]),
        ((0, 1.6, 0.04), None, [(0, 0.8), (0.8, 1.6)]),
        ((1, 3, 0.04), None, [(1, 1.8), (1.6, 2.4), (2.2, 3)]),
        ((0, 1.6, 0.04), 0.4, [(0, 0.8), (0.4, 1.2), (0.8, 1.6)]),
        ((0, 9, 0.0), None, [(0, 9)]),
    ],
)
def test_windows_of_a_stride(video, hop, wanted):
    """As long as a clip's frames, spread so that they cover the video; one where the rate is not known."""
    assert bounds(DENSE.windows(Extent(*video), hop=hop)) == wanted


@pytest.mark.parametrize(
    ("sampling", "given", "says"),
    [
        (SPREAD, {"length": 0}, "window: got 0, wanted seconds above 0"),
        (SPREAD, {"hop": -1}, "hop: got -1, wanted"),
        (SPREAD, {"length": math.nan}, "window: got nan"),
        (DENSE, {"length": 1.0}, "window: got 1.0 s for a model whose clips are 4 frames at a stride of 5"),
    ],
)
def test_windows_that_are_none(sampling, given, says):
    with pytest.raises(ValueError, match=says):
        sampling.windows(Extent(0, 10, 0.04), **given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 0}, "frames: got 0"),
        ({"size": 2.5}, "size: got 2.5"),
        ({"stride": True}, "stride: got True"),
        ({"std": (1.0, 0.0, 1.0)}, "std: wanted numbers above 0"),
        ({"mean": (1.0, 0.0)}, "mean: wanted a finite number for each"),
        ({"mean": ("a", "b", "c")}, "mean: wanted a finite number for each"),
    ],
)
def test_values_that_are_none(changes, says):
    with pytest.raises(ValueError, match=says):
        ClipSampling(**({"frames": 4, "size": 24, **HALF} | changes))


def test_stride_of_indices():
    """Every so many frames from the middle, from a random place in training; all of a short video."""
    assert frame_indices(40, 4, stride=5).tolist() == [12, 17, 22, 27]
    assert frame_indices(20, 4, stride=5).tolist() == frame_indices(20, 4).tolist()
    assert frame_indices(7, 4, stride=5).tolist() == frame_indices(7, 4).tolist()
    drawn = [frame_indices(40, 4, stride=5, mode="random") for _ in range(60)]
    assert all((indices.diff() == 5).all() and 2 <= indices[0] <= 22 for indices in drawn)
    assert len({int(indices[0]) for indices in drawn}) > 5
    again = [
        frame_indices(40, 4, stride=5, mode="random", generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="stride: wanted at least 1 frame, got 0"):
        frame_indices(40, 4, stride=0)


@needs_av
def test_stride_of_a_video(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", 40)
    assert frame_numbers(decode(path, 4, stride=5)) == [12, 17, 22, 27]
    assert frame_numbers(DENSE.decode(path)) == [12, 17, 22, 27]
    windows = DENSE.windows(extent(path))
    assert [frame_numbers(DENSE.decode(path, window)) for window in windows] == [[2, 7, 12, 17], [22, 27, 32, 37]]
    with pytest.raises(TypeError, match="stride: wanted an int, got float"):
        decode(path, 4, stride=1.5)


@needs_av
def test_stride_and_normalisation_of_a_data_set(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", 40)
    annotations = Annotations((Clip(path, 0, None, None, None, None, "a"),), ["one"], {}, {})
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)}
    clips = VideoClips(annotations, frames=4, size=48, stride=5, train=False, **own)
    shown = clips[0][0] * torch.tensor(own["std"]).view(3, 1, 1, 1) + torch.tensor(own["mean"]).view(3, 1, 1, 1)
    middle = decode(path, 4, stride=5)[:, :, 8:56].permute(3, 0, 1, 2) / 255
    torch.testing.assert_close(shown, middle, atol=1e-6, rtol=0)
    starts = set()
    train = VideoClips(annotations, frames=4, size=48, stride=5, train=True)
    for epoch in range(4):
        train.set_epoch(epoch)
        starts.add(float(train[0][0].sum()))
    assert len(starts) == 4
    with pytest.raises(ValueError, match="stride: wanted at least 1 frame, got 0"):
        VideoClips(annotations, train=False, stride=0)


@needs_av
@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts", "mov"])
def test_extent(tmp_path: Path, kind: str):
    found = extent(write_video(tmp_path / f"a.{kind}", 40, codec="mpeg4"))
    assert found.start == pytest.approx(0, abs=0.02) and found.step == pytest.approx(1 / RATE, abs=1e-3)
    assert found.end == pytest.approx(40 / RATE, abs=0.06)


@needs_av
def test_extent_of_a_late_video(tmp_path: Path):
    """Sound comes first: pictures are from 1 s on, and windows are too."""
    path = write_pictures(tmp_path / "a.mp4", [*write_numbered(20)], delay=1.0, sound=2.0)
    found = extent(path)
    assert found.start == pytest.approx(1.0, abs=0.05) and found.end == pytest.approx(2.0, abs=0.1)
    halves = SPREAD.windows(found, length=0.5)
    assert [min(frame_numbers(SPREAD.decode(path, window))) for window in halves] == [1, 11]


def write_numbered(frames: int) -> list:
    from .videos import numbered

    return [numbered(number) for number in range(frames)]


@needs_av
def test_extent_without_a_stated_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From packets, or where these say nothing from frames."""
    from dsts_kernels.data import streams

    path = write_video(tmp_path / "a.mp4", 30)
    monkeypatch.setattr(streams.Source, "_declared_end", lambda self: None)
    assert extent(path).end == pytest.approx(1.5, abs=0.06)
    monkeypatch.setattr(streams.Source, "listed", lambda self, *args: None)
    assert extent(path).end == pytest.approx(1.5, abs=0.06)


@needs_av
def test_extent_of_nothing(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match=r"a\.mp4"):
        extent(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"none\.mp4"):
        extent(tmp_path / "none.mp4")
