"""Seconds of a file as players count them, frames that are shown for unequal times, and how little is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsts_kernels.data import streams
from dsts_kernels.data.video import VideoError, decode, probe

from .test_pictures import codec_or_skip
from .videos import RATE, frame_numbers, numbered, write_pictures, write_video

pytestmark = pytest.mark.needs("av")
PICTURES = [numbered(number) for number in range(40)]


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "ts"])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_sound_begins_first(tmp_path: Path, kind: str, codec: str):
    """Seconds count from where the sound begins; the first picture comes half a second later."""
    path = write_pictures(tmp_path / f"late.{kind}", PICTURES, codec=codec_or_skip(codec), delay=10.4 / RATE, sound=2.5)
    assert frame_numbers(decode(path, 40)) == list(range(40))
    assert frame_numbers(decode(path, 5, start=20 / RATE, end=25 / RATE)) == [10, 11, 12, 13, 14]
    assert frame_numbers(decode(path, 14, start=0.0, end=1.2)) == list(range(14)), "no picture for 0.52 s of it"
    assert frame_numbers(decode(path, 3, first_frame=0, last_frame=2)) == [0, 1, 2]
    assert frame_numbers(decode(path, 2, start=48 / RATE)) == [38, 39]
    with pytest.raises(
        VideoError, match=rf"late\.{kind}: its first frame is at 0\.5. s, late in the clip 0\.00 to 0\.40"
    ):
        decode(path, 2, start=0.0, end=0.4)
    with pytest.raises(VideoError, match=rf"late\.{kind}: ends at 2\.5. s, before the start"):
        decode(path, 2, start=2.6)
    probe(path, end=True)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_a_clock_that_starts_anywhere(tmp_path: Path, kind: str):
    """Without sound the file begins with its first picture, whatever its clock says."""
    path = write_pictures(tmp_path / f"anywhere.{kind}", PICTURES, delay=100.0)
    assert frame_numbers(decode(path, 5, start=20 / RATE, end=25 / RATE)) == [20, 21, 22, 23, 24]
    assert frame_numbers(decode(path, 40)) == list(range(40))


def test_pictures_before_the_beginning_are_not_shown(tmp_path: Path):
    """An edit list that begins after the first frames, as cameras and trimming write it."""
    path = write_pictures(
        tmp_path / "trimmed.mp4", PICTURES, delay=-5 / RATE, container={"avoid_negative_ts": "disabled"}
    )
    assert frame_numbers(decode(path, 35)) == list(range(5, 40))
    assert frame_numbers(decode(path, 5, start=0.0, end=5 / RATE)) == [5, 6, 7, 8, 9]
    assert frame_numbers(decode(path, 2, first_frame=0, last_frame=1)) == [5, 6]


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_unequal_times(tmp_path: Path, kind: str):
    """A recording of a screen: a frame only where something changes."""
    times = [0, 0.04, 0.08, 2, 2.04, 2.08, 5, 5.04, 9]
    path = write_pictures(tmp_path / f"screen.{kind}", PICTURES[: len(times)], times=times)
    assert frame_numbers(decode(path, 9)) == list(range(9))
    assert frame_numbers(decode(path, 3, start=1.0, end=3.0)) == [3, 4, 5]
    assert frame_numbers(decode(path, 2, start=3.0, end=4.0)) == [5, 5], "what is on the screen all the while"
    assert frame_numbers(decode(path, 1, start=6.0)) == [8]
    assert frame_numbers(decode(path, 2, first_frame=6, last_frame=7)) == [6, 7]


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_last_picture_that_stays(tmp_path: Path, kind: str):
    """A title of five seconds at the end is one frame; nothing is cut off."""

    def change(packets: list[Any]) -> None:
        packets[-1].duration = round(5 / packets[-1].time_base)

    path = write_pictures(tmp_path / f"title.{kind}", PICTURES[:20], codec="mpeg4", change=change)
    assert frame_numbers(decode(path, 20)) == list(range(20))
    assert frame_numbers(decode(path, 2, start=3.0, end=5.0)) == [19, 19]
    probe(path, end=True)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mov", "avi", "ts"])
def test_one_frame(tmp_path: Path, kind: str):
    path = write_video(tmp_path / f"one.{kind}", 1)
    probe(path, end=True)
    for cut in ({}, {"start": 0.0}, {"end": 0.05}, {"first_frame": 0, "last_frame": 5}):
        assert frame_numbers(decode(path, 4, **cut)) == [0] * 4


@pytest.mark.parametrize(
    ("codec", "kind", "options"),
    [
        ("libx265", "mkv", {"x265-params": "log-level=0:pools=1:open-gop=1:keyint=10:bframes=3"}),
        ("libx265", "mp4", {"x265-params": "log-level=0:pools=1:open-gop=1:keyint=10:bframes=3"}),
        ("libx264", "mkv", {"x264-params": "open-gop=1:bframes=3:keyint=10"}),
        ("libx264", "ts", {"x264-params": "open-gop=1:bframes=3:keyint=10"}),
        ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}),
        ("libvpx", "webm", {"deadline": "realtime", "cpu-used": "8"}),
        ("libsvtav1", "mkv", {"preset": "13", "crf": "20", "svtav1-params": "lp=1"}),
        ("mpeg2video", "mpg", {"bf": "2"}),
        ("wmv2", "asf", {}),
        ("flv", "flv", {}),
    ],
)
def test_codecs_and_open_groups(tmp_path: Path, codec: str, kind: str, options: dict[str, str]):
    """Pictures before a key frame that need the group before it, and cuts on either side."""
    path = write_video(tmp_path / f"video.{kind}", 40, codec=codec_or_skip(codec), options=options)
    assert frame_numbers(decode(path, 40)) == list(range(40))
    for first, after in ((7, 13), (9, 10), (17, 22), (38, 40)):
        clip = decode(path, after - first, start=first / RATE, end=after / RATE)
        assert frame_numbers(clip) == list(range(first, after))
        assert frame_numbers(decode(path, 2, first_frame=first, last_frame=first + 1)) == [first, first + 1]
    probe(path, end=True)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_with_frames_out_of_order(tmp_path: Path, codec: str):
    """Its frames have no times: the first is at 0 s, whatever FFmpeg makes up."""
    path = write_video(tmp_path / "video.avi", 40, codec=codec_or_skip(codec), options={"bf": "2"})
    for first, after in ((0, 2), (7, 13), (20, 25), (38, 40)):
        clip = decode(path, after - first, start=first / RATE, end=after / RATE)
        assert frame_numbers(clip) == list(range(first, after))
        clip = decode(path, after - first, first_frame=first, last_frame=after - 1)
        assert frame_numbers(clip) == list(range(first, after))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_listing_stops_at_the_last_frame_wanted(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch):
    path = write_video(tmp_path / "long.mp4", 240, codec=codec_or_skip(codec))
    read: list[int] = []
    packets = streams.Source.packets

    def counted(source: streams.Source) -> Iterator[Any]:
        for packet in packets(source):
            read.append(packet.size)
            yield packet

    monkeypatch.setattr(streams.Source, "packets", counted)
    for first, last in ((0, 0), (11, 14), (30, 33)):
        read.clear()
        assert frame_numbers(decode(path, 2, first_frame=first, last_frame=last)) == [
            first + (last + 1 - first) // 4,
            first + 3 * (last + 1 - first) // 4,
        ]
        assert len(read) <= 2 * (last + 1) + 24


@pytest.mark.parametrize(
    "name",
    [
        "colon:1.mp4",
        "%03d.mp4",
        "-i.mp4",
        "a b#?&.mp4",
        "http:x.mp4",
        "file:y.mp4",
        "pipe:0.mp4",
        "ü\n.mp4",
        b"\xe9.mp4",
    ],
)
def test_names(tmp_path: Path, name: str | bytes, monkeypatch: pytest.MonkeyPatch):
    """From the folder itself, where FFmpeg would take some for protocols, patterns or options."""
    monkeypatch.chdir(tmp_path)
    name = name if isinstance(name, str) else __import__("os").fsdecode(name)
    write_video(tmp_path / "plain.mp4", 4).rename(tmp_path / name)
    for path in (name, Path(name), tmp_path / name):
        probe(path)
        assert frame_numbers(decode(path, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (
            {"end": float("inf")},
            "end: wanted a finite number of seconds, got inf; leave it out for the end of the video",
        ),
        ({"end": float("-inf")}, "end: wanted a finite number of seconds, got -inf"),
        ({"end": float("nan")}, "end: wanted a finite number of seconds, got nan"),
        ({"start": float("inf")}, "start: wanted a finite number of seconds, got inf"),
        ({"start": float("nan")}, "start: wanted a finite number of seconds, got nan"),
        ({"end": 1e300}, r"end: wanted at most 1e\+09 s, got 1e\+300; leave it out for the end of the video"),
        ({"start": 1e308}, r"start: wanted at most 1e\+09 s, got 1e\+308$"),
        pytest.param({"end": 10**400}, r"end: wanted at most 1e\+09 s, got 1000", id="end 10**400"),
        ({"start": 2**70}, r"start: wanted at most 1e\+09 s, got 1180591620717411303424$"),
        ({"start": -0.5}, r"start: wanted at least 0 s, got -0\.5"),
        ({"end": 0}, r"end: wanted more than start \(0\.0 s\), got 0"),
        ({"start": 3, "end": 2}, r"end: wanted more than start \(3 s\), got 2"),
        ({"first_frame": -1}, "first_frame: wanted at least 0, got -1"),
        ({"last_frame": -1}, "last_frame: wanted at least 0, got -1"),
        ({"first_frame": 4, "last_frame": 3}, r"last_frame: wanted at least first_frame \(4\), got 3"),
        ({"frames": 0}, "frames: wanted at least 1, got 0"),
        ({"size": 0}, "size: wanted at least 1 pixel, got 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range(tmp_path: Path, argument: dict[str, float], error: str):
    """Refused by name before the file is opened: it is not even there."""
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        decode(tmp_path / "none.mp4", **{"frames": 2, **argument})
    assert not isinstance(caught.value, VideoError)


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"start": "1"}, "start: wanted a number of seconds, got str '1'"),
        ({"end": True}, "end: wanted a number of seconds, got bool True"),
        ({"first_frame": 1.5}, r"first_frame: wanted an int, got float 1\.5"),
        ({"frames": 2.0}, r"frames: wanted an int, got float 2\.0"),
        ({"size": "8"}, "size: wanted an int, got str '8'"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(tmp_path: Path, argument: dict[str, Any], error: str):
    with pytest.raises(TypeError, match=f"^{error}"):
        decode(tmp_path / "none.mp4", **{"frames": 2, **argument})
