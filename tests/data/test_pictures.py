"""Pictures as players show them: turned, mirrored, with square pixels, in the stated colours; sizes and formats."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from dsts_kernels.data import pictures
from dsts_kernels.data.video import decode

from .videos import HEIGHT, WIDTH, frame_numbers, write_pictures, write_video

pytestmark = pytest.mark.needs("av")
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
ONE = 1 << 16


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test hears every warning, and warnings that none expects are errors."""
    monkeypatch.setattr(pictures, "_SAID", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def corners() -> list[np.ndarray]:
    """Red, green / blue, white."""
    rows = [np.concatenate([np.tile(np.uint8(COLOURS[c]), (24, 32, 1)) for c in row], 1) for row in ("RG", "BW")]
    return [np.concatenate(rows)] * 2


def seen(path: Path, **options: int) -> tuple[tuple[int, int], str]:
    """Height and width of a picture, and its four quarters."""
    picture = decode(path, 1, **options)[0].double()
    height, width = picture.shape[:2]
    quarters = [picture[y * height // 4, x * width // 4] for y in (1, 3) for x in (1, 3)]
    names = [min(COLOURS, key=lambda c: float((q - torch.tensor(COLOURS[c])).abs().sum())) for q in quarters]
    return (height, width), "".join(names)


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize(("degrees", "shown"), [(0, "RGBW"), (90, "GWRB"), (180, "WBGR"), (270, "BRWG"), (-90, "BRWG")])
def test_turned(tmp_path: Path, kind: str, degrees: int, shown: str):
    path = write_pictures(
        tmp_path / f"phone.{kind}", corners(), prepare=lambda stream: stream.set_display_rotation(degrees)
    )
    height, width = (HEIGHT, WIDTH) if degrees % 180 == 0 else (WIDTH, HEIGHT)
    assert seen(path) == ((height, width), shown)
    scale = 24 / HEIGHT
    assert seen(path, size=24) == ((round(height * scale), round(width * scale)), shown)
    assert decode(path, 2).is_contiguous()


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-ONE, 0, 0, 0, ONE, 0), "GRWB"),
        ((ONE, 0, 0, 0, -ONE, 0), "BWRG"),
        ((0, ONE, 0, ONE, 0, 0), "RBGW"),
        ((0, -ONE, 0, -ONE, 0, 0), "WGBR"),
        ((0, 0, 0, 0, 0, 0), "RGBW"),
    ],
    ids=["left-right", "upside-down", "transposed", "anti-transposed", "nothing"],
)
def test_mirrored(tmp_path: Path, matrix: tuple[int, ...], shown: str):
    path = write_pictures(
        tmp_path / "mirrored.mp4",
        corners(),
        prepare=lambda stream: stream.set_display_matrix((*matrix, 0, 0, 1 << 30)),
    )
    assert seen(path)[1] == shown


def test_turned_askew_is_said_once(tmp_path: Path):
    path = write_pictures(tmp_path / "askew.mp4", corners(), prepare=lambda stream: stream.set_display_rotation(30))
    with pytest.warns(UserWarning, match=r"askew\.mp4: to be shown turned by -30 degrees, .*said once"):
        assert seen(path) == ((HEIGHT, WIDTH), "RGBW")
    assert seen(path)[1] == "RGBW"


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("aspect", "size", "shape"),
    [
        (Fraction(2), None, (48, 128)),
        (Fraction(2), 24, (24, 64)),
        (Fraction(1, 2), None, (96, 64)),
        (Fraction(1, 2), 32, (48, 32)),
        (Fraction(16, 11), None, (48, 93)),
        (Fraction(2001, 2000), None, (48, 64)),
    ],
    ids=str,
)
def test_square_pixels(tmp_path: Path, kind: str, aspect: Fraction, size: int | None, shape: tuple[int, int]):
    path = write_pictures(tmp_path / f"wide.{kind}", corners(), prepare=lambda stream: pixel(stream, aspect))
    assert seen(path, size=size) == (shape, "RGBW")


def test_square_pixels_of_a_turned_video(tmp_path: Path):
    def prepare(stream):
        pixel(stream, Fraction(2))
        stream.set_display_rotation(90)

    path = write_pictures(tmp_path / "phone.mp4", corners(), prepare=prepare)
    assert seen(path) == ((128, 48), "GWRB")


def test_pixels_that_cannot_be(tmp_path: Path):
    path = write_pictures(tmp_path / "odd.mp4", corners(), prepare=lambda stream: pixel(stream, Fraction(1, 50)))
    with pytest.warns(UserWarning, match=r"odd\.mp4: .*1/50 times as wide as high; taken as square"):
        assert seen(path) == ((HEIGHT, WIDTH), "RGBW")


def pixel(stream, aspect: Fraction) -> None:
    stream.codec_context.sample_aspect_ratio = aspect


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_interlaced_is_said_once(tmp_path: Path, codec: str):
    options = {"x264-params": "tff=1"} if codec == "libx264" else {"flags": "+ilme+ildct"}
    path = write_video(tmp_path / "lines.mkv", 12, codec=codec_or_skip(codec), options=options)
    with pytest.warns(UserWarning, match=r"lines\.mkv: interlaced: .*said once"):
        assert frame_numbers(decode(path, 12)) == list(range(12))
    decode(path, 2)


@pytest.mark.parametrize(
    ("codec", "pixels", "kind"),
    [
        ("ffv1", "gray", "mkv"),
        ("ffv1", "yuv420p10le", "mkv"),
        ("ffv1", "bgra", "mkv"),
        ("ffv1", "rgba64le", "mkv"),
        ("qtrle", "argb", "mov"),
        ("gif", "rgb8", "gif"),
        ("mjpeg", "yuvj420p", "avi"),
        ("mjpeg", "yuvj444p", "mkv"),
        ("libx264", "yuv422p10le", "mp4"),
    ],
)
def test_formats_of_pixels(tmp_path: Path, codec: str, pixels: str, kind: str):
    path = write_video(tmp_path / f"video.{kind}", 12, codec=codec_or_skip(codec), pixels=pixels)
    clip = decode(path, 12)
    assert clip.dtype == torch.uint8 and frame_numbers(clip) == list(range(12))
    assert int(clip.max()) > 225 and int(clip.min()) < 30


@pytest.mark.parametrize(
    ("stated", "matrix", "colour", "white"),
    [
        (None, None, (81, 90, 240), (235, 128, 128)),
        ("tv", "bt709", (81, 90, 240), (235, 128, 128)),
        ("tv", "smpte170m", (81, 90, 240), (235, 128, 128)),
        ("pc", "smpte170m", (76, 85, 255), (255, 128, 128)),
    ],
)
def test_colours_as_stated(
    tmp_path: Path, stated: str | None, matrix: str | None, colour: tuple[int, ...], white: tuple[int, ...]
):
    """A red of BT.601 in either range; read as BT.709 it is another red. What states nothing is BT.601, also in HD."""
    found = []
    for values in (colour, white):
        path = tmp_path / f"{values[0]}.mp4"
        options = {} if stated is None else {"color_range": stated, "colorspace": matrix}
        write_planes(path, values, {**options, "crf": "1"}, *((WIDTH, HEIGHT) if stated else (1280, 720)))
        found.append(decode(path, 1)[0, HEIGHT // 2, WIDTH // 2].tolist())
    red = (255, 23, 0) if matrix == "bt709" else (254, 0, 0)
    assert np.abs(np.subtract(found[0], red)).max() <= 3
    assert np.abs(np.subtract(found[1], (255, 255, 255))).max() <= 3


def write_planes(path: Path, values: tuple[int, ...], options: dict[str, str], width: int, height: int) -> None:
    """Two frames of one colour in YUV."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec_or_skip("libx264"), rate=20, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(2):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts = number
            if "colorspace" in options:
                frame.color_range = 2 if options["color_range"] == "pc" else 1
                frame.colorspace = 1 if options["colorspace"] == "bt709" else 6
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("width", "height"), [(65, 49), (63, 47), (1, 1), (2, 2), (17, 300)])
def test_odd_sizes(tmp_path: Path, width: int, height: int):
    path = write_pictures(
        tmp_path / "odd.mkv", [np.full((height, width, 3), 200, np.uint8)] * 3, codec=codec_or_skip("ffv1")
    )
    assert decode(path, 2).shape == (2, height, width, 3)
    small = decode(path, 2, size=16)
    assert min(small.shape[1:3]) == min(16, width, height) and int(small.min()) > 190


def test_pictures_of_two_sizes_are_scaled_to_the_first(tmp_path: Path):
    """A stream that changes its size midway, as two recordings that were joined."""
    first = write_video(tmp_path / "first.ts", 10, codec="mpeg2video")
    second = write_pictures(
        tmp_path / "second.ts", [np.full((96, 128, 3), 128, np.uint8)] * 10, codec="mpeg2video", delay=0.5
    )
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    clip = decode(joined, 20)
    assert clip.shape == (20, HEIGHT, WIDTH, 3)
    assert frame_numbers(clip[:9]) == list(range(9)), "a decoder that begins anew may drop the frame before"
    assert (clip[12:].double() - 128).abs().max() < 12


def codec_or_skip(name: str) -> str:
    import av

    if name not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {name}")
    return name
