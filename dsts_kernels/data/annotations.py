"""Diving48 and FineGym as they are published: annotation files and a folder of videos in, one record a clip out.

Files are checked entry by entry, and an error names the file and the entry. A video that is not in the folder is no
error here (copies of both data sets are incomplete): its clip keeps the path where the video should be, and
:class:`~dsts_kernels.data.clips.VideoClips` leaves it out and says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Annotations", "Clip", "read_diving48", "read_finegym"]

DIVING48_ATTRIBUTES = ("takeoff", "somersault", "twist", "position")
EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".ts")  # in order of preference

_ELEMENT = re.compile(r"(?P<video>.+)_(?P<event>E_\d+_\d+)_(?P<segment>A_\d+_\d+)")
_CATEGORY = re.compile(
    r"Clabel:\s*(?P<label>\d+)\s*;\s*set:\s*(?P<set>\d+)\s*;(\s*Glabel:\s*\d+\s*;)?\s*(?P<name>\S.*)"
)


class Clip(NamedTuple):
    """One labelled stretch of a video; a bound that is ``None`` is the video's own.

    Attributes:
        path: the video, or where it should be when it is missing.
        label: index into ``Annotations.class_names``.
        start: first moment, in seconds from the start of the video.
        end: moment after the last, in seconds.
        first_frame: index of the first frame, from 0.
        last_frame: index of the last frame, itself included.
        name: the clip as the annotation calls it; need not be unique.
    """

    path: Path
    label: int
    start: float | None
    end: float | None
    first_frame: int | None
    last_frame: int | None
    name: str


class Annotations(NamedTuple):
    """A labelled data set.

    Attributes:
        clips: in the order of the file.
        class_names: one a class.
        class_attributes: attribute -> one value a class, an index into ``attribute_names[attribute]``.
        attribute_names: attribute -> what its values are called.
    """

    clips: tuple[Clip, ...]
    class_names: list[str]
    class_attributes: dict[str, list[int]]
    attribute_names: dict[str, list[str]]


def read_diving48(
    annotation: str | PathLike[str], vocabulary: str | PathLike[str], videos: str | PathLike[str]
) -> Annotations:
    """Diving48, e.g. ``Diving48_V2_train.json`` with ``Diving48_vocab.json``.

    Args:
        annotation: JSON list of ``{"vid_name", "label", "start_frame", "end_frame"}``; ``end_frame`` is the one after
            the last (the number of frames, in the published files).
        vocabulary: JSON list of one ``[takeoff, somersault, twist, position]`` a class.
        videos: folder of ``<vid_name>.mp4`` (or another container).

    Returns:
        Clips cut by frames; the four parts of a class are its attributes, their values sorted by name.

    Raises:
        FileNotFoundError: a file or the folder does not exist, or the folder holds none of the videos.
        ValueError: a file is not what is described above; names the file and the entry.
    """
    source = Path(annotation)
    classes = _diving48_vocabulary(Path(vocabulary))
    entries = _json(source)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{source}: wanted a list of at least one clip, got {_shown(entries)}")
    files = _Videos(Path(videos))
    clips = []
    for number, entry in enumerate(entries):
        where = f"{source}: entry {number}"
        name = _field(entry, "vid_name", str, where)
        label = _field(entry, "label", int, where)
        first = _field(entry, "start_frame", int, where)
        after = _field(entry, "end_frame", int, where)
        if not name:
            raise ValueError(f"{where}: vid_name is empty")
        if not 0 <= label < len(classes):
            raise ValueError(
                f"{where} ({name}): label {label}: wanted one of the {len(classes)} classes of {vocabulary}"
            )
        if not 0 <= first < after:
            raise ValueError(f"{where} ({name}): wanted 0 <= start_frame < end_frame, got {first} and {after}")
        clips.append(Clip(files.expected(name), label, None, None, first, after - 1, name))
    files.check(clips)
    values = {
        attribute: sorted({parts[place] for parts in classes}) for place, attribute in enumerate(DIVING48_ATTRIBUTES)
    }
    numbers = {
        attribute: [values[attribute].index(parts[place]) for parts in classes]
        for place, attribute in enumerate(DIVING48_ATTRIBUTES)
    }
    return Annotations(tuple(clips), [" ".join(parts) for parts in classes], numbers, values)


def read_finegym(
    annotation: str | PathLike[str],
    categories: str | PathLike[str],
    videos: str | PathLike[str],
    segments: str | PathLike[str] | None = None,
) -> Annotations:
    """FineGym elements, e.g. ``gym99_train_element_v1.0.txt`` with ``gym99_categories.txt``.

    Args:
        annotation: lines ``<youtube id>_E_<start>_<end>_A_<start>_<end> <label>``.
        categories: lines ``Clabel: 0; set: 1; Glabel: 1; (VT) name``.
        videos: folder of cut elements ``<youtube id>_E_..._A_....mp4``, of full videos ``<youtube id>.mp4``, or of
            both: an element that has been cut is read from its own file.
        segments: ``finegym_annotation_info_v1.0.json``, the times at which full videos are cut; an element of several
            stages runs from the start of the first to the end of the last.

    Returns:
        Clips cut by seconds where they come from a full video; the attribute of a class is its ``"set"``.

    Raises:
        FileNotFoundError: a file or the folder does not exist, or the folder holds none of the videos.
        ValueError: a file is not what is described above, or full videos are there and ``segments`` is not given or has
            no times for one of their elements; names the file and the line or entry.
    """
    source = Path(annotation)
    classes = _finegym_categories(Path(categories))
    files = _Videos(Path(videos))
    times = None if segments is None else _json(Path(segments))
    if times is not None and not isinstance(times, dict):
        raise ValueError(f"{segments}: wanted an object of one entry a video, got {_shown(times)}")
    clips = []
    for number, line in _lines(source):
        where = f"{source}, line {number}"
        name, _, text = line.rpartition(" ")
        element = _ELEMENT.fullmatch(name.strip())
        if element is None or not text.isdecimal():
            raise ValueError(f"{where}: wanted '<youtube id>_E_<start>_<end>_A_<start>_<end> <label>', got {line!r}")
        name, label = element.group(), int(text)
        if label >= len(classes):
            raise ValueError(f"{where}: label {label}: wanted one of the {len(classes)} classes of {categories}")
        start = end = None
        path = files.expected(name)
        if name not in files and element["video"] in files:
            if segments is None:
                raise ValueError(f"{where}: {name} is to be cut from {files[element['video']]}: pass segments=")
            path = files[element["video"]]
            start, end = _segment_times(times, element, Path(segments))
        clips.append(Clip(path, label, start, end, None, None, name))
    if not clips:
        raise ValueError(f"{source}: wanted at least one line, the file is empty")
    files.check(clips)
    sets = sorted({number for number, _ in classes})
    return Annotations(
        tuple(clips),
        [name for _, name in classes],
        {"set": [sets.index(number) for number, _ in classes]},
        {"set": [f"set {number}" for number in sets]},
    )


def _diving48_vocabulary(path: Path) -> list[list[str]]:
    classes = _json(path)
    if not isinstance(classes, list) or not classes:
        raise ValueError(f"{path}: wanted a list of one list a class, got {_shown(classes)}")
    for number, parts in enumerate(classes):
        strings = isinstance(parts, list) and all(isinstance(part, str) and part for part in parts)
        if not strings or len(parts) != len(DIVING48_ATTRIBUTES):
            raise ValueError(f"{path}: class {number}: wanted [{', '.join(DIVING48_ATTRIBUTES)}], got {_shown(parts)}")
    return classes


def _finegym_categories(path: Path) -> list[tuple[int, str]]:
    """``(set, name)`` of each class, by label."""
    classes: dict[int, tuple[int, str]] = {}
    for number, line in _lines(path):
        match = _CATEGORY.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}, line {number}: wanted 'Clabel: 0; set: 1; Glabel: 1; name', got {line!r}")
        label = int(match["label"])
        if label in classes:
            raise ValueError(f"{path}, line {number}: class {label} is there twice")
        classes[label] = int(match["set"]), match["name"]
    if not classes:
        raise ValueError(f"{path}: wanted one line a class, the file is empty")
    absent = next(label for label in range(len(classes) + 1) if label not in classes)
    if absent < len(classes):
        raise ValueError(f"{path}: classes go up to {max(classes)} but class {absent} is not there")
    return [classes[label] for label in range(len(classes))]


def _segment_times(times: dict[str, Any], element: re.Match[str], path: Path) -> tuple[float, float]:
    """Start and end of an element in its full video, in seconds."""
    where = f"{path}: {element['video']}"
    event = _field(_field(times, element["video"], dict, str(path)), element["event"], dict, where)
    where = f"{where}, {element['event']}"
    event_start, _ = _span(event, where)
    segment = _field(_field(event, "segments", dict, where), element["segment"], dict, f"{where}, segments")
    start, end = _span(segment, f"{where}, {element['segment']}")
    return event_start + start, event_start + end


def _span(entry: dict[str, Any], where: str) -> tuple[float, float]:
    """From the first start to the last end of ``entry["timestamps"]``, in seconds."""
    stages = _field(entry, "timestamps", list, where)
    for stage in stages:
        numbers = isinstance(stage, list) and len(stage) == 2 and all(type(t) in (int, float) for t in stage)
        if not numbers or not 0 <= stage[0] <= stage[1] < math.inf:
            raise ValueError(f"{where}: wanted timestamps [[start, end], ...] in seconds, got {_shown(stages)}")
    if not stages:
        raise ValueError(f"{where}: wanted at least one timestamp, got none")
    start, end = min(stage[0] for stage in stages), max(stage[1] for stage in stages)
    if start == end:
        raise ValueError(f"{where}: wanted an end after the start, got {_shown(stages)}")
    return start, end


class _Videos:
    """The videos of a folder by name without extension; the folder is listed once."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of videos")
        self.folder = folder
        self.files: dict[str, Path] = {}
        rank = {extension: place for place, extension in enumerate(EXTENSIONS)}
        for path in sorted(folder.iterdir()):
            place = rank.get(path.suffix.lower())
            known = self.files.get(path.stem)
            if place is not None and (known is None or place < rank[known.suffix.lower()]):
                self.files[path.stem] = path

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Path:
        return self.files[name]

    def expected(self, name: str) -> Path:
        """Where the video is, or where it should be."""
        return self.files.get(name, self.folder / f"{name}{EXTENSIONS[0]}")

    def check(self, clips: list[Clip]) -> None:
        if not any(clip.path.stem in self.files for clip in clips):
            raise FileNotFoundError(f"{self.folder}: holds none of the {len(clips)} videos, e.g. {clips[0].path.name}")


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted text in UTF-8: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) that are not blank, without the space around them and with tabs as spaces."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.replace("\t", " ").strip()


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: wanted an object with {key!r}, got {_shown(entry)}")
    if key not in entry:
        raise ValueError(f"{where}: has no {key!r}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key!r}: wanted {kind.__name__}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
