"""Damaged and odd files: what is lost costs itself, too much of it costs the clip, and errors say what a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsts_kernels.data.video import VideoError, decode, probe

from .test_pictures import codec_or_skip
from .videos import RATE, damage, frame_numbers, numbered, packet_places, truncate, write_pictures, write_video

pytestmark = pytest.mark.needs("av")


def inner(path: Path, count: int) -> list[int]:
    """Places of packets that are no key frames, evenly through the file."""
    places = [place for place, (_, _, key) in enumerate(packet_places(path)) if not key]
    return [places[len(places) * part // (count + 1)] for part in range(1, count + 1)]


def pictures_apart(folder: Path) -> Path:
    """Forty frames of which each stands for itself, and is either right or refused."""
    return write_video(folder / "video.mov", 40, codec=codec_or_skip("png"), pixels="rgb24")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mjpeg"])
def test_one_damaged_packet(tmp_path: Path, kind: str, codec: str):
    """The clip is read, with all frames before it as they are."""
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / f"video.{kind}", 60, codec=codec_or_skip(codec), pixels=pixels)
    whole = decode(path, 60)
    (place,) = inner(path, 1) if codec != "mjpeg" else (30,)
    damage(path, place)
    for options in ({}, {"start": 0.0, "end": 3.0}, {"first_frame": 0, "last_frame": 59}):
        found = decode(path, 60, **options)
        assert found.shape == whole.shape and torch.equal(found[:20], whole[:20])
        assert torch.equal(found[45:], whole[45:]), "groups of pictures after it are whole"
    assert decode(path, 8).shape[0] == 8


@pytest.mark.parametrize("place", [0, 39])
def test_damaged_first_or_last_packet(tmp_path: Path, place: int):
    """All frames are key frames: each stands for itself."""
    path = damage(pictures_apart(tmp_path), place, codec_header=0)
    found = frame_numbers(decode(path, 40))
    assert [n for n in range(40) if found[n] != n] == [place] and found[place] == abs(place - 1)
    near = [1, 1, 2, 3] if place == 0 else [36, 37, 38, 38]
    assert frame_numbers(decode(path, 4, first_frame=near[1] - 1, last_frame=near[1] + 2)) == near
    probe(path)


def test_a_lost_frame_is_its_neighbour(tmp_path: Path):
    path = damage(pictures_apart(tmp_path), 7, 20, codec_header=0)
    wanted = [6 if n == 7 else 19 if n == 20 else n for n in range(40)]
    assert frame_numbers(decode(path, 40)) == wanted
    assert frame_numbers(decode(path, 40, start=0.0, end=2.0)) == wanted
    assert frame_numbers(decode(path, 3, first_frame=7, last_frame=9)) == [8, 8, 9], "a neighbour within the stretch"
    with pytest.raises(VideoError, match=r"video\.mov: damaged, only 0 of 1 frames can be decoded"):
        decode(path, 1, first_frame=7, last_frame=7)
    assert frame_numbers(decode(path, 2, first_frame=19, last_frame=20)) == [19, 19]


@pytest.mark.parametrize("count", [5, 20, 38])
def test_much_damage(tmp_path: Path, count: int):
    """More than 5% of the stretch; another stretch of the same file is read."""
    path = damage(pictures_apart(tmp_path), *range(1, 1 + count), codec_header=0)
    with pytest.raises(VideoError, match=r"video\.mov: damaged, only \d+ of \d+ frames can be decoded"):
        decode(path, 40)
    if count < 20:
        assert frame_numbers(decode(path, 20, start=1.0, end=2.0)) == list(range(20, 40))


def test_a_stretch_with_nothing_left(tmp_path: Path):
    path = damage(pictures_apart(tmp_path), *range(10, 14), codec_header=0)
    with pytest.raises(VideoError, match=r"video\.mov: damaged"):
        decode(path, 2, start=10 / RATE, end=14 / RATE)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mov", "avi", "ts"])
def test_the_end_is_probed(tmp_path: Path, kind: str):
    path = write_video(tmp_path / f"video.{kind}", 100, faststart=True)
    probe(path, end=True)
    truncate(path, 0.6)
    probe(path)
    if kind != "ts":  # says nothing of its length
        with pytest.raises(VideoError, match=rf"video\.{kind}: "):
            probe(path, end=True)


def cover(path: Path, *, video: bool, first: bool) -> Path:
    """Sound with a cover picture larger than the video, which may be there."""
    import av

    with av.open(str(path), "w") as out:
        streams: dict[str, Any] = {}

        def add_cover() -> None:
            stream = streams["cover"] = out.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 320, 320, "yuvj420p"
            stream.disposition = av.stream.Disposition.attached_pic

        if first:
            add_cover()
        if video:
            stream = streams["video"] = out.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=48_000, layout="mono")
        if not first:
            add_cover()
        art = av.VideoFrame.from_ndarray(np.full((320, 320, 3), 99, np.uint8), format="rgb24")
        packets = [*streams["cover"].encode(art), *streams["cover"].encode()]
        for number in range(20 if video else 0):
            packets += stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24"))
        packets += stream.encode() if video else []
        for start in range(0, 48_000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48_000, start
            packets += sound.encode(frame)
        for packet in [*packets, *sound.encode()]:
            out.mux(packet)
    return path


@pytest.mark.parametrize("first", [True, False])
def test_cover_pictures(tmp_path: Path, first: bool):
    path = cover(tmp_path / "song.mp4", video=True, first=first)
    assert frame_numbers(decode(path, 20)) == list(range(20))
    path = cover(tmp_path / "podcast.mp4", video=False, first=first)
    for read in (probe, lambda path: decode(path, 2)):
        with pytest.raises(VideoError, match=r"podcast\.mp4: has no video stream, only a cover picture"):
            read(path)


def test_sound_alone(tmp_path: Path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        for packet in [*sound.encode(frame), *sound.encode()]:
            out.mux(packet)
    for read in (probe, lambda path: decode(path, 2)):
        with pytest.raises(VideoError, match=r"sound\.mp4: has no video stream \(audio only\)"):
            read(path)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_without_a_frame(tmp_path: Path, kind: str):
    import av

    path = tmp_path / f"none.{kind}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    for read in (probe, lambda path: decode(path, 2)):
        with pytest.raises(VideoError, match=rf"none\.{kind}: \w"):
            read(path)


def test_several_video_streams(tmp_path: Path):
    """The one that the file calls its default."""
    import av

    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as out:
        streams = []
        for width, height in ((64, 48), (32, 16)):
            stream = out.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append(stream)
        for number in range(20):
            for stream in streams:
                picture = numbered(number) if stream.width == 64 else np.zeros((16, 32, 3), np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode())
    assert frame_numbers(decode(path, 20)) == list(range(20))


def test_transparency_is_left_out(tmp_path: Path):
    path = write_pictures(tmp_path / "clear.mov", [numbered(5)] * 3, codec=codec_or_skip("qtrle"), pixels="argb")
    assert frame_numbers(decode(path, 3)) == [5, 5, 5]
