"""Decoding: the right frames from every kind of container, and a reason where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsts_kernels.data.video import VideoError, decode, frame_indices, probe

from .videos import RATE, frame_numbers, truncate, write_video

needs_av = pytest.mark.needs("av")
KINDS = ["mp4", "mkv", "avi", "ts", "mov"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for kind in KINDS:
        write_video(folder / f"video.{kind}", 40, codec="mpeg4")
    return folder


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames are stored in another order than shown, and AVI then has no times worth the name."""
    import av

    if "libx264" not in av.codecs_available:
        pytest.skip("this FFmpeg has no libx264")
    folder = tmp_path_factory.mktemp("reordered")
    for kind in KINDS:
        write_video(folder / f"video.{kind}", 40, codec="libx264")
    return folder


def test_uniform_indices_are_middles_of_segments():
    assert frame_indices(40, 4).tolist() == [5, 15, 25, 35]
    assert frame_indices(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert frame_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert frame_indices(1, 3).tolist() == [0, 0, 0]
    assert frame_indices(40, 4).dtype == torch.int64


@pytest.mark.parametrize(("count", "frames"), [(1, 1), (3, 8), (8, 8), (41, 8), (100_000_007, 16)])
def test_random_indices_stay_in_their_segments(count: int, frames: int):
    segments = torch.arange(frames, dtype=torch.float64)
    for _ in range(20):
        indices = frame_indices(count, frames, mode="random")
        assert indices.shape == (frames,) and indices.dtype == torch.int64
        assert (indices >= (segments * count / frames).floor()).all()
        assert (indices <= (segments + 1) * count / frames).all() and (indices < count).all()


def test_random_indices_come_from_the_generator():
    drawn = [
        frame_indices(1000, 8, mode="random", generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (-3, 2)])
def test_indices_of_nothing(arguments: tuple[int, int]):
    with pytest.raises(ValueError, match="at least 1"):
        frame_indices(*arguments)


def test_unknown_mode(tmp_path: Path):
    with pytest.raises(ValueError, match="'uniform' or 'random', got 'dense'"):
        frame_indices(4, 2, mode="dense")
    with pytest.raises(ValueError, match="'uniform' or 'random', got 'dense'"):
        decode(tmp_path, 2, mode="dense")


@pytest.mark.parametrize("kind", KINDS)
@needs_av
def test_whole_video(videos: Path, kind: str):
    clip = decode(videos / f"video.{kind}", 8)
    assert clip.shape == (8, 48, 64, 3) and clip.dtype == torch.uint8
    assert frame_numbers(clip) == [2, 7, 12, 17, 22, 27, 32, 37]


@pytest.mark.parametrize("kind", KINDS)
@needs_av
def test_every_frame(videos: Path, kind: str):
    assert frame_numbers(decode(videos / f"video.{kind}", 40)) == list(range(40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "after"), [(0, 10), (7, 23), (12, 13), (30, 40)])
@needs_av
def test_cut_in_seconds(videos: Path, kind: str, first: int, after: int):
    clip = decode(videos / f"video.{kind}", after - first, start=first / RATE, end=after / RATE)
    assert frame_numbers(clip) == list(range(first, after))


@pytest.mark.parametrize("kind", KINDS)
@needs_av
def test_cut_in_frames(videos: Path, kind: str):
    assert frame_numbers(decode(videos / f"video.{kind}", 4, first_frame=20, last_frame=23)) == [20, 21, 22, 23]


@pytest.mark.parametrize("kind", KINDS)
@needs_av
def test_reordered_frames(reordered: Path, kind: str):
    path = reordered / f"video.{kind}"
    assert frame_numbers(decode(path, 40)) == list(range(40))
    for first, after in ((0, 10), (7, 23), (8, 9), (30, 40)):
        clip = decode(path, after - first, start=first / RATE, end=after / RATE)
        assert frame_numbers(clip) == list(range(first, after))
        assert frame_numbers(decode(path, 2, first_frame=first, last_frame=first + 1)) == [first, first + 1]


@needs_av
def test_open_cuts(videos: Path):
    path = videos / "video.mp4"
    assert frame_numbers(decode(path, 5, start=35 / RATE)) == [35, 36, 37, 38, 39]
    assert frame_numbers(decode(path, 5, end=5 / RATE)) == [0, 1, 2, 3, 4]
    assert frame_numbers(decode(path, 5, first_frame=35)) == [35, 36, 37, 38, 39]
    assert frame_numbers(decode(path, 5, last_frame=4)) == [0, 1, 2, 3, 4]


@needs_av
def test_cut_past_the_end_stops_at_the_end(videos: Path):
    path = videos / "video.mp4"
    assert frame_numbers(decode(path, 4, first_frame=36, last_frame=60)) == [36, 37, 38, 39]
    assert frame_numbers(decode(path, 10, start=30 / RATE, end=41 / RATE)) == list(range(30, 40))


@needs_av
def test_cut_shorter_than_a_frame_shows_the_frame_before(videos: Path):
    assert frame_numbers(decode(videos / "video.mp4", 2, start=10.3 / RATE, end=10.6 / RATE)) == [10, 10]


@pytest.mark.parametrize("cut", [{"start": 5.0}, {"start": 3.0, "end": 4.0}, {"first_frame": 40}])
@pytest.mark.parametrize("kind", KINDS)
@needs_av
def test_cut_after_the_end(videos: Path, kind: str, cut: dict[str, float]):
    with pytest.raises(VideoError, match=rf"video\.{kind}: "):
        decode(videos / f"video.{kind}", 2, **cut)


@needs_av
def test_cut_mostly_after_the_end(videos: Path):
    with pytest.raises(VideoError, match="early in the clip"):
        decode(videos / "video.mp4", 2, start=35 / RATE, end=80 / RATE)


@pytest.mark.parametrize(
    "cut",
    [{"start": 1.0, "end": 1.0}, {"start": -1.0}, {"first_frame": 3, "last_frame": 2}, {"start": 0.0, "last_frame": 2}],
)
@needs_av
def test_cuts_that_are_none(videos: Path, cut: dict[str, float]):
    with pytest.raises(ValueError, match=r"start|first_frame") as caught:
        decode(videos / "video.mp4", 2, **cut)
    assert not isinstance(caught.value, VideoError)


@needs_av
def test_scaled_down_only(videos: Path):
    path = videos / "video.mp4"
    assert decode(path, 2, size=24).shape == (2, 24, 32, 3)
    assert decode(path, 2, size=31).shape == (2, 31, 41, 3)
    assert decode(path, 2, size=500).shape == (2, 48, 64, 3)


@needs_av
def test_random_frames_repeat_with_the_seed(videos: Path):
    path = videos / "video.mp4"
    drawn = [decode(path, 8, mode="random", generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert frame_numbers(drawn[0]) != frame_numbers(drawn[2])
    numbers = torch.tensor(frame_numbers(drawn[0]))
    assert torch.equal(numbers // 5, torch.arange(8))


@needs_av
def test_only_the_stretch_is_decoded(videos: Path, monkeypatch: pytest.MonkeyPatch):
    """Seeks: from the last key frame (every tenth frame is one) to the last frame wanted."""
    from dsts_kernels.data import streams

    seen: list[int] = []
    frames = streams.Source.frames

    def watched(source: streams.Source, **options: bool) -> Iterator[Any]:
        for frame in frames(source, **options):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(streams.Source, "frames", watched)
    decode(videos / "video.mp4", 2, start=32 / RATE, end=36 / RATE)
    assert 2 <= len(seen) <= 6


@needs_av
def test_without_packet_times(videos: Path, monkeypatch: pytest.MonkeyPatch):
    from dsts_kernels.data import video

    monkeypatch.setattr(video, "_listing", lambda *_: None)
    path = videos / "video.mp4"
    assert frame_numbers(decode(path, 8)) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert frame_numbers(decode(path, 5, start=7 / RATE, end=12 / RATE)) == [7, 8, 9, 10, 11]
    assert frame_numbers(decode(path, 3, first_frame=20, last_frame=22)) == [20, 21, 22]


@needs_av
def test_raw_stream_without_container(tmp_path: Path):
    path = write_video(tmp_path / "video.m4v", 30)
    assert frame_numbers(decode(path, 6)) == [2, 7, 12, 17, 22, 27]


@pytest.mark.parametrize("content", [b"", b"no video", bytes(5000)], ids=["empty", "text", "zeros"])
@needs_av
def test_not_a_video(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    for read in (probe, lambda path: decode(path, 2)):
        with pytest.raises(VideoError, match=r"broken\.mp4: \w"):
            read(path)


@needs_av
def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "none.mp4", tmp_path):
        for read in (probe, lambda path: decode(path, 2)):
            with pytest.raises(VideoError, match=f"{path.name}: "):
                read(path)


@needs_av
def test_sound_only(tmp_path: Path):
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        container.add_stream("pcm_s16le", rate=8000)
    with pytest.raises(VideoError, match=r"sound\.wav: "):
        decode(path, 2)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@needs_av
def test_truncated_file(tmp_path: Path, kind: str):
    """It opens and its first frame decodes, so that only the frames that are not there can tell."""
    path = truncate(write_video(tmp_path / f"video.{kind}", 40, faststart=True), 0.6)
    probe(path)
    with pytest.raises(VideoError, match=rf"video\.{kind}: cut off after"):
        decode(path, 8)
    with pytest.raises(VideoError, match=rf"video\.{kind}: "):
        decode(path, 2, start=34 / RATE, end=40 / RATE)
    assert frame_numbers(decode(path, 4, start=4 / RATE, end=8 / RATE)) == [4, 5, 6, 7]
    assert frame_numbers(decode(path, 4, first_frame=4, last_frame=7)) == [4, 5, 6, 7]


@needs_av
def test_truncated_before_its_index(tmp_path: Path):
    path = truncate(write_video(tmp_path / "video.mp4", 40), 0.6)
    with pytest.raises(VideoError, match=r"video\.mp4: "):
        probe(path)


@needs_av
def test_damaged_frames(tmp_path: Path):
    path = write_video(tmp_path / "video.mp4", 40, faststart=True)
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin:] = bytes(255 for _ in content[begin:])
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"video\.mp4: "):
        decode(path, 8)


@needs_av
def test_damaged_group_of_pictures(reordered: Path, tmp_path: Path):
    """A decoder that says nothing and drops what it cannot decode."""
    path = tmp_path / "video.mp4"
    content = bytearray((reordered / "video.mp4").read_bytes())
    begin, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[begin : begin + (end - begin) // 3] = bytes((end - begin) // 3)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"video\.mp4: "):
        decode(path, 40)


@needs_av
def test_without_pyav(videos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'dsts_kernels\[train\]'"):
        probe(videos / "video.mp4")
