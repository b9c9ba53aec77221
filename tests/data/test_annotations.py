"""The published formats read right, and every way in which a file can be wrong named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsts_kernels.data.annotations import read_diving48, read_finegym

from .videos import truncate, write_video

VOCABULARY = [
    ["Back", "15som", "05Twis", "FREE"],
    ["Back", "Dive", "NoTwis", "PIKE"],
    ["Inward", "15som", "NoTwis", "TUCK"],
]
DIVE = {"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 120}

CATEGORIES = """\
Clabel:   0; set:  1; Glabel:   1; (VT) round-off, flic-flac with 0.5 turn on; stretched
Clabel:   1; set: 21; Glabel:  67; (FX) switch leap with 0.5 turn
Clabel:   2; set:  1; Glabel:  19; (VT) round-off, flic-flac on  
"""
VIDEO = "A0_E_xAXX-hUo"
ELEMENT = f"{VIDEO}_E_002407_002435_A_0003_0005"
STAGED = f"{VIDEO}_E_002407_002435_A_0007_0011"
ELEMENTS = f"{ELEMENT} 1\n{STAGED} 0\n"
SEGMENTS: dict[str, Any] = {
    VIDEO: {
        "E_002407_002435": {
            "event": 1,
            "timestamps": [[2407.32, 2435.28]],
            "segments": {
                "A_0003_0005": {"stages": 1, "timestamps": [[3.45, 5.64]]},
                "A_0007_0011": {"stages": 3, "timestamps": [[7.0, 8.5], [8.5, 9], [9.25, 11.5]]},
            },
        },
        "E_002500_002510": {"event": 2, "timestamps": [[2500.0, 2510.0]], "segments": None},
    }
}


class Folder:
    """Annotation files and empty videos to read them with; the readers never open a video."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "videos").mkdir()

    def file(self, name: str, content: Any) -> Path:
        path = self.path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def video(self, name: str) -> Path:
        path = self.path / "videos" / name
        path.touch()
        return path

    def diving48(self, entries: Any, vocabulary: Any = VOCABULARY):
        return read_diving48(
            self.file("train.json", entries), self.file("vocab.json", vocabulary), self.path / "videos"
        )

    def finegym(self, lines: Any = ELEMENTS, categories: str = CATEGORIES, segments: Any = None):
        times = None if segments is None else self.file("info.json", segments)
        return read_finegym(
            self.file("train.txt", lines), self.file("categories.txt", categories), self.path / "videos", times
        )


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_diving48(folder: Folder):
    there = folder.video("_8Vy3dlHg2w_00000.mp4")
    read = folder.diving48([DIVE, {**DIVE, "vid_name": "absent.v2", "label": 2, "start_frame": 3}, DIVE])
    assert read.clips[0] == (there, 1, None, None, 0, 119, "_8Vy3dlHg2w_00000")
    assert read.clips[1] == (there.parent / "absent.v2.mp4", 2, None, None, 3, 119, "absent.v2")
    assert read.clips[2] == read.clips[0]
    assert read.class_names == ["Back 15som 05Twis FREE", "Back Dive NoTwis PIKE", "Inward 15som NoTwis TUCK"]
    assert read.attribute_names["takeoff"] == ["Back", "Inward"]
    assert read.attribute_names["somersault"] == ["15som", "Dive"]
    assert read.class_attributes == {
        "takeoff": [0, 0, 1],
        "somersault": [0, 1, 0],
        "twist": [0, 1, 1],
        "position": [0, 1, 2],
    }


def test_other_containers_and_mp4_first(folder: Folder):
    folder.video("_8Vy3dlHg2w_00000.txt")
    folder.video("_8Vy3dlHg2w_00000.avi")
    assert folder.diving48([DIVE]).clips[0].path.suffix == ".avi"
    folder.video("_8Vy3dlHg2w_00000.WEBM")
    assert folder.diving48([DIVE]).clips[0].path.suffix == ".WEBM"
    folder.video("_8Vy3dlHg2w_00000.mp4")
    assert folder.diving48([DIVE]).clips[0].path.suffix == ".mp4"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("[{", r"train\.json: not JSON"),
        ("", r"train\.json: not JSON"),
        (b"\xff\xfe\x00", r"train\.json: wanted text in UTF-8"),
        ([], r"train\.json: wanted a list of at least one clip, got list \[\]"),
        ({"a": 1}, r"train\.json: wanted a list of at least one clip, got dict"),
        ([DIVE, "abc"], r"train\.json: entry 1: wanted an object with 'vid_name', got str 'abc'"),
        ([DIVE, {"vid_name": "a"}], r"train\.json: entry 1: has no 'label'"),
        ([{**DIVE, "label": "1"}], r"entry 0: 'label': wanted int, got str '1'"),
        ([{**DIVE, "label": True}], r"entry 0: 'label': wanted int, got bool True"),
        (
            [{**DIVE, "label": 3}],
            r"entry 0 \(_8Vy3dlHg2w_00000\): label 3: wanted one of the 3 classes of .*vocab\.json",
        ),
        ([{**DIVE, "label": -1}], r"label -1: wanted one of the 3 classes"),
        ([{**DIVE, "end_frame": 0}], r"wanted 0 <= start_frame < end_frame, got 0 and 0"),
        ([{**DIVE, "vid_name": ""}], r"entry 0: vid_name is empty"),
        (
            [DIVE, {**DIVE, "vid_name": "other"}, {**DIVE, "label": 2, "end_frame": 9}],
            r"entry 2 \(_8Vy3dlHg2w_00000\): label 2, but entry 0 gives it label 1",
        ),
        ([{**DIVE, "vid_name": "../secret"}], r"entry 0: wanted the name of a video in .*, got '\.\./secret'"),
        ([{**DIVE, "vid_name": "/etc/motd"}], r"entry 0: wanted the name of a video in .*leads elsewhere"),
        ([{**DIVE, "vid_name": "sub/dive"}], r"entry 0: wanted the name of a video"),
        ([{**DIVE, "vid_name": ".."}], r"entry 0: wanted the name of a video"),
        ([{**DIVE, "vid_name": "a\0b"}], r"entry 0: wanted the name of a video"),
    ],
)
def test_bad_diving48(folder: Folder, entries: Any, reason: str):
    folder.video("_8Vy3dlHg2w_00000.mp4")
    with pytest.raises(ValueError, match=reason):
        folder.diving48(entries)


@pytest.mark.parametrize(
    ("vocabulary", "reason"),
    [
        ("{", "not JSON"),
        ([], "wanted a list of one list a class"),
        ([VOCABULARY[0], ["Back", "15som"]], "class 1: wanted .takeoff, somersault, twist, position., got list"),
        ([["Back", "15som", "05Twis", 4]], "class 0: wanted"),
        (["Back 15som 05Twis FREE"], "class 0: wanted"),
    ],
)
def test_bad_vocabulary(folder: Folder, vocabulary: Any, reason: str):
    with pytest.raises(ValueError, match=rf"vocab\.json: {reason}"):
        folder.diving48([DIVE], vocabulary)


def test_no_videos(folder: Folder):
    with pytest.raises(FileNotFoundError, match=r"videos: holds none of the 1 videos, e\.g\. _8Vy3dlHg2w_00000\.mp4"):
        folder.diving48([DIVE])
    with pytest.raises(FileNotFoundError, match="holds none of the 2 videos"):
        folder.finegym()
    (folder.path / "videos").rmdir()
    with pytest.raises(FileNotFoundError, match="videos: no such folder"):
        folder.diving48([DIVE])


def test_no_annotation_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json: no such file"):
        read_diving48(tmp_path / "train.json", tmp_path / "vocab.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"categories\.txt: no such file"):
        read_finegym(tmp_path / "train.txt", tmp_path / "categories.txt", tmp_path)


def test_finegym_cut_elements(folder: Folder):
    there = folder.video(f"{ELEMENT}.mp4")
    read = folder.finegym("\ufeff" + ELEMENTS.replace("\n", "\r\n") + "\n")
    assert read.clips[0] == (there, 1, None, None, None, None, ELEMENT)
    assert read.clips[1] == (there.parent / f"{STAGED}.mp4", 0, None, None, None, None, STAGED)
    assert read.class_names == [
        "(VT) round-off, flic-flac with 0.5 turn on; stretched",
        "(FX) switch leap with 0.5 turn",
        "(VT) round-off, flic-flac on",
    ]
    assert read.class_attributes == {"set": [0, 1, 0]}
    assert read.attribute_names == {"set": ["set 1", "set 21"]}


def test_finegym_full_videos(folder: Folder):
    there = folder.video(f"{VIDEO}.mkv")
    one, staged = folder.finegym(segments=SEGMENTS).clips
    assert one.path == staged.path == there
    assert (one.start, one.end) == pytest.approx((2410.77, 2412.96))
    assert (staged.start, staged.end) == pytest.approx((2414.32, 2418.82))


def test_finegym_cut_files_come_first(folder: Folder):
    full, cut = folder.video(f"{VIDEO}.mp4"), folder.video(f"{ELEMENT}.webm")
    one, staged = folder.finegym(segments=SEGMENTS).clips
    assert (one.path, one.start, one.end) == (cut, None, None)
    assert staged.path == full and staged.start is not None


EVENT_VIDEO = f"{VIDEO}_E_002407_002435"


def test_finegym_events(folder: Folder):
    """mmaction2 cuts videos into events first: times of elements then count from the event's start."""
    there, full = folder.video(f"{EVENT_VIDEO}.mp4"), folder.video(f"{VIDEO}.mp4")
    within = {EVENT_VIDEO: SEGMENTS[VIDEO]["E_002407_002435"]["segments"]}
    for segments in (SEGMENTS, within):
        one, staged = folder.finegym(segments=segments).clips
        assert one.path == staged.path == there
        assert (one.start, one.end, staged.start, staged.end) == pytest.approx((3.45, 5.64, 7.0, 11.5))
    there.unlink()
    assert folder.finegym(segments=SEGMENTS).clips[0].path == full
    with pytest.raises(
        ValueError, match=r"info\.json: .*mmaction2's event_annotation\.json times elements within events"
    ):
        folder.finegym(segments=within)


def test_finegym_events_need_segments(folder: Folder):
    folder.video(f"{EVENT_VIDEO}.mp4")
    with pytest.raises(ValueError, match=rf"line 1: {ELEMENT} is to be cut from .*{EVENT_VIDEO}\.mp4: pass segments="):
        folder.finegym()


@pytest.mark.parametrize(
    "place", [f"{ELEMENT}/{ELEMENT}.mp4", f"{VIDEO}/{ELEMENT}.mp4", f"{EVENT_VIDEO}/{ELEMENT}.mkv"]
)
def test_elements_in_folders(folder: Folder, place: str):
    (folder.path / "videos" / place).parent.mkdir()
    there = folder.video(place)
    assert folder.finegym().clips[0].path == there


def test_full_videos_in_folders(folder: Folder):
    (folder.path / "videos" / VIDEO).mkdir()
    there = folder.video(f"{VIDEO}/{VIDEO}.mp4")
    one, staged = folder.finegym(segments=SEGMENTS).clips
    assert one.path == staged.path == there and one.start == pytest.approx(2410.77)


def test_dives_in_folders(folder: Folder):
    (folder.path / "videos" / DIVE["vid_name"]).mkdir()
    there = folder.video(f"{DIVE['vid_name']}/{DIVE['vid_name']}.mp4")
    assert folder.diving48([DIVE]).clips[0].path == there


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (["videos", "subactions", "events"], "mmaction2's layout, pass one of its folders: subactions, events, videos"),
        ([ELEMENT], "folders of these names without videos, perhaps frames"),
    ],
)
def test_layouts_that_are_refused_by_name(folder: Folder, folders: list[str], hint: str):
    for name in folders:
        (folder.path / "videos" / name).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"holds none of the 2 videos, .*{hint}"):
        folder.finegym()


def test_mmaction_list_of_videos(folder: Folder):
    there = folder.video(f"{ELEMENT}.mp4")
    assert folder.finegym(f"{ELEMENT}.mp4 1\n").clips[0] == (there, 1, None, None, None, None, ELEMENT)


def test_gym530(folder: Folder):
    folder.video(f"{ELEMENT}.mp4")
    categories = "Glabel:   0; set:  1; (VT) tsukahara piked\nGlabel:   1; set: 21; (FX) stag jump      \n"
    read = folder.finegym(categories=categories)
    assert read.class_names == ["(VT) tsukahara piked", "(FX) stag jump"]
    assert read.class_attributes == {"set": [0, 1]} and [clip.label for clip in read.clips] == [1, 0]


@pytest.mark.needs("av")
def test_of_two_files_with_one_name_the_readable_one(folder: Folder):
    """A download that broke off, its second try, and one that is whole but comes last in the order of preference."""
    broken, cut, good = (folder.path / "videos" / f"{ELEMENT}.{kind}" for kind in ("mp4", "mov", "avi"))
    write_video(good, 20)
    truncate(write_video(cut, 40, faststart=True), 0.6)
    broken.write_bytes(b"moov" * 20)
    assert folder.finegym().clips[0].path == good
    good.unlink()
    assert folder.finegym().clips[0].path == cut
    cut.unlink()
    assert folder.finegym().clips[0].path == broken


def test_finegym_full_videos_need_segments(folder: Folder):
    folder.video(f"{VIDEO}.mp4")
    with pytest.raises(ValueError, match=rf"train\.txt, line 1: {ELEMENT} is to be cut from .*: pass segments="):
        folder.finegym()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("\n \n", r"train\.txt: wanted at least one line"),
        (f"{ELEMENT} 1\n\n{ELEMENT}\n", r"train\.txt, line 3: wanted '<youtube id>_E_"),
        (f"{ELEMENT} one\n", r"line 1: wanted '<youtube id>_E_"),
        (f"{VIDEO}_E_002407_002435 1\n", r"line 1: wanted '<youtube id>_E_.*this names an event"),
        (f"{ELEMENT} 48 1\n", r"line 1: wanted .*mmaction2's list of frame folders"),
        (f"{ELEMENT} 1\n{STAGED} 0\n{ELEMENT} 2\n", rf"line 3: {ELEMENT} has label 2, but line 1 gives it label 1"),
        (f"../{ELEMENT} 1\n", r"line 1: wanted the name of a video in .*leads elsewhere"),
        (f"{ELEMENT} 1\n{ELEMENT} 3\n", r"line 2: label 3: wanted one of the 3 classes of .*categories\.txt"),
    ],
)
def test_bad_elements(folder: Folder, lines: str, reason: str):
    folder.video(f"{ELEMENT}.mp4")
    with pytest.raises(ValueError, match=reason):
        folder.finegym(lines)


@pytest.mark.parametrize(
    ("categories", "reason"),
    [
        ("", "wanted one line a class, the file is empty"),
        ("0 (VT) vault\n", "line 1: wanted 'Clabel"),
        (CATEGORIES + CATEGORIES, "line 4: class 0 is there twice"),
        ("set: 1; vault\n", "line 1: wanted 'Clabel.*FineGym's list of sets"),
        (
            CATEGORIES + "Glabel: 3; set: 1; (VT) x\n",
            "line 4: wanted classes numbered by Clabel or by Glabel, got both",
        ),
        ("Glabel: 1; set: 1; (VT) x\n", "classes go up to 1 but class 0 is not there"),
        (CATEGORIES.replace("Clabel:   1", "Clabel:   7"), "classes go up to 7 but class 1 is not there"),
    ],
)
def test_bad_categories(folder: Folder, categories: str, reason: str):
    with pytest.raises(ValueError, match=rf"categories\.txt(, |: ){reason}"):
        folder.finegym(categories=categories)


def changed(*keys: str, value: Any) -> dict[str, Any]:
    """The segments with one entry replaced, or removed for ``...``."""
    segments = json.loads(json.dumps(SEGMENTS))
    entry = segments
    for key in keys[:-1]:
        entry = entry[key]
    if value is ...:
        del entry[keys[-1]]
    else:
        entry[keys[-1]] = value
    return segments


EVENT = (VIDEO, "E_002407_002435")
SEGMENT = (*EVENT, "segments", "A_0003_0005")


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ("no", r"info\.json: not JSON"),
        ([1], r"info\.json: wanted an object of one entry a video, got list"),
        ({}, rf"info\.json: has no '{VIDEO}'"),
        (changed(*EVENT, value=...), rf"info\.json: {VIDEO}: has no 'E_002407_002435'"),
        (
            changed(*EVENT, "segments", value=None),
            r"E_002407_002435: 'segments': wanted dict, got NoneType None: the event has no",
        ),
        (changed(*SEGMENT, value=...), r"E_002407_002435, segments: has no 'A_0003_0005'"),
        (changed(*SEGMENT, "timestamps", value=...), r"A_0003_0005: has no 'timestamps'"),
        (changed(*SEGMENT, "timestamps", value=[]), r"A_0003_0005: wanted at least one timestamp"),
        (
            changed(*SEGMENT, "timestamps", value=[[3, "x"]]),
            r"A_0003_0005: wanted timestamps \[\[start, end\], \.\.\.\]",
        ),
        (changed(*SEGMENT, "timestamps", value=[[5.0, 3.0]]), r"A_0003_0005: wanted timestamps"),
        (changed(*SEGMENT, "timestamps", value=[[3.0, 3.0]]), r"A_0003_0005: wanted an end after the start"),
        (changed(*EVENT, "timestamps", value=7), r"E_002407_002435: 'timestamps': wanted list, got int 7"),
    ],
)
def test_bad_segments(folder: Folder, segments: Any, reason: str):
    folder.video(f"{VIDEO}.mp4")
    with pytest.raises(ValueError, match=reason):
        folder.finegym(segments=segments)
