"""FineGym as it is published, and as mmaction2 lays it out: lines of elements, a list of classes, videos cut or whole.

A video may be a whole competition, one event of it (a routine), or one element (what is classified). Times of elements
count from the start of their event.
"""

from __future__ import annotations

import math
import re
from os import PathLike
from pathlib import Path
from typing import Any

from .folders import EXTENSIONS, Videos
from .records import Annotations, Clip, field, read_json, read_lines, shown

_ELEMENT = re.compile(r"(?P<video>.+)_(?P<event>E_\d+_\d+)_(?P<segment>A_\d+_\d+)")
_EVENT = re.compile(r".+_E_\d+_\d+")
# gym99 and gym288 number their classes by Clabel; gym530 is all of Glabel.
_CATEGORY = re.compile(
    r"(Clabel:\s*(?P<class>\d+)\s*;\s*)?(Glabel:\s*(?P<before>\d+)\s*;\s*)?set:\s*(?P<set>\d+)\s*;"
    r"(\s*Glabel:\s*\d+\s*;)?\s*(?P<name>\S.*)"
)
_SET = re.compile(r"set:\s*\d+\s*;[^;]*")


def read_finegym(
    annotation: str | PathLike[str],
    categories: str | PathLike[str],
    videos: str | PathLike[str],
    segments: str | PathLike[str] | None = None,
) -> Annotations:
    """FineGym elements, e.g. ``gym99_train_element_v1.1.txt`` with ``gym99_categories.txt``.

    Args:
        annotation: lines ``<youtube id>_E_<start>_<end>_A_<start>_<end> <label>``; mmaction2's lists, with ``.mp4``
            after the element, are read too.
        categories: lines ``Clabel: 0; set: 1; Glabel: 1; (VT) name``, or ``Glabel: 0; set: 1; (VT) name`` (gym530).
        videos: folder of cut elements ``<youtube id>_E_..._A_....mp4``, of events ``<youtube id>_E_....mp4``, of full
            videos ``<youtube id>.mp4``, or of any of them: the shortest that is there is read. Each may lie in a folder
            of its own name or of the youtube id; of two files with one name the one that can be read is.
        segments: ``finegym_annotation_info_v1.1.json``, the times at which events and full videos are cut, or for
            events mmaction2's ``event_annotation.json``; an element of several stages runs from the start of the first
            to the end of the last.

    Returns:
        Clips cut by seconds where they come from an event or a full video; the attribute of a class is its ``"set"``.

    Raises:
        FileNotFoundError: a file or the folder does not exist, or the folder holds none of the videos.
        ValueError: a file is not what is described above, an element has two labels or its name leads out of the
            folder, or it is to be cut and ``segments`` is not given or has no times for it; names the file and the line
            or entry.
    """
    source = Path(annotation)
    classes = _finegym_categories(Path(categories))
    files = Videos(Path(videos))
    times = None if segments is None else read_json(Path(segments))
    if times is not None and not isinstance(times, dict):
        raise ValueError(f"{segments}: wanted an object of one entry a video, got {shown(times)}")
    clips = []
    known: dict[str, tuple[int, int]] = {}
    for number, line in read_lines(source):
        where = f"{source}, line {number}"
        element, label = _element(line, where)
        name = element.group()
        if label >= len(classes):
            raise ValueError(f"{where}: label {label}: wanted one of the {len(classes)} classes of {categories}")
        earlier, given = known.setdefault(name, (number, label))
        if label != given:
            raise ValueError(f"{where}: {name} has label {label}, but line {earlier} gives it label {given}")
        path, level = _video(files, element, where)
        start = end = None
        if level != "element":
            if times is None:
                raise ValueError(f"{where}: {name} is to be cut from {path}: pass segments=")
            start, end = _segment_times(times, element, Path(segments), within_event=level == "event")
        clips.append(Clip(path, label, start, end, None, None, name))
    if not clips:
        raise ValueError(f"{source}: wanted at least one line, the file is empty")
    files.check(len(clips))
    sets = sorted({number for number, _ in classes})
    return Annotations(
        tuple(clips),
        [name for _, name in classes],
        {"set": [sets.index(number) for number, _ in classes]},
        {"set": [f"set {number}" for number in sets]},
    )


def _element(line: str, where: str) -> tuple[re.Match[str], int]:
    """The element that a line names, and its label."""
    name, _, text = line.rpartition(" ")
    name = name.strip()
    if name.lower().endswith(EXTENSIONS):  # mmaction2's lists
        name = name.rpartition(".")[0]
    element = _ELEMENT.fullmatch(name)
    if element is not None and text.isdecimal():
        return element, int(text)
    hint = ""
    if _ELEMENT.fullmatch(name.rpartition(" ")[0]):
        hint = "; this is mmaction2's list of frame folders, and its list of videos is wanted"
    elif _EVENT.fullmatch(name):
        hint = "; this names an event, and elements are what is classified"
    raise ValueError(f"{where}: wanted '<youtube id>_E_<start>_<end>_A_<start>_<end> <label>', got {line!r}{hint}")


def _video(files: Videos, element: re.Match[str], where: str) -> tuple[Path, str]:
    """The shortest video that has an element, and what it is of: the element (also where none is there), event, all."""
    name, video = element.group(), element["video"]
    event = f"{video}_{element['event']}"
    for level, stem in (("element", name), ("event", event), ("video", video)):
        path = files.find(stem, where, groups=(event, video))
        if path is not None:
            return path, level
    return files.missing(name), "element"


def _finegym_categories(path: Path) -> list[tuple[int, str]]:
    """``(set, name)`` of each class, by label."""
    classes: dict[int, tuple[int, str]] = {}
    kinds = set()
    for number, line in read_lines(path):
        match = _CATEGORY.fullmatch(line)
        label = match and (match["class"] or match["before"])
        if label is None:
            hint = "; this is FineGym's list of sets, and one of classes is wanted" if _SET.fullmatch(line) else ""
            raise ValueError(
                f"{path}, line {number}: wanted 'Clabel: 0; set: 1; Glabel: 1; name' or 'Glabel: 0; set: 1; name', "
                f"got {line!r}{hint}"
            )
        kinds.add("Clabel" if match["class"] else "Glabel")
        if len(kinds) > 1:
            raise ValueError(f"{path}, line {number}: wanted classes numbered by Clabel or by Glabel, got both")
        if int(label) in classes:
            raise ValueError(f"{path}, line {number}: class {int(label)} is there twice")
        classes[int(label)] = int(match["set"]), match["name"]
    if not classes:
        raise ValueError(f"{path}: wanted one line a class, the file is empty")
    absent = next(label for label in range(len(classes) + 1) if label not in classes)
    if absent < len(classes):
        raise ValueError(f"{path}: classes go up to {max(classes)} but class {absent} is not there")
    return [classes[label] for label in range(len(classes))]


def _segment_times(
    times: dict[str, Any], element: re.Match[str], path: Path, *, within_event: bool
) -> tuple[float, float]:
    """Start and end of an element in seconds, of its event or of the full video."""
    video, name = element["video"], f"{element['video']}_{element['event']}"
    start = 0.0
    if video not in times and name in times:  # mmaction2's event_annotation.json
        where = f"{path}: {name}"
        segments = times[name]
        if not within_event:
            raise ValueError(
                f"{where}: mmaction2's event_annotation.json times elements within events, and {element.group()} is "
                "to be cut from a full video: pass finegym_annotation_info as segments="
            )
    else:
        where = f"{path}: {video}"
        event = field(field(times, video, dict, str(path)), element["event"], dict, where)
        where = f"{where}, {element['event']}"
        if not within_event:
            start, _ = _span(event, where)
        segments = event.get("segments", ...)
        if segments is None:
            raise ValueError(
                f"{where}: 'segments': wanted dict, got NoneType None: the event has no elements there, and "
                f"{element.group()} is one of it; are annotation and segments of one version?"
            )
        segments = field(event, "segments", dict, where)
    segment = field(segments, element["segment"], dict, f"{where}, segments")
    first, last = _span(segment, f"{where}, {element['segment']}")
    return start + first, start + last


def _span(entry: dict[str, Any], where: str) -> tuple[float, float]:
    """From the first start to the last end of ``entry["timestamps"]``, in seconds."""
    stages = field(entry, "timestamps", list, where)
    for stage in stages:
        numbers = isinstance(stage, list) and len(stage) == 2 and all(type(t) in (int, float) for t in stage)
        if not numbers or not 0 <= stage[0] <= stage[1] < math.inf:
            raise ValueError(f"{where}: wanted timestamps [[start, end], ...] in seconds, got {shown(stages)}")
    if not stages:
        raise ValueError(f"{where}: wanted at least one timestamp, got none")
    start, end = min(stage[0] for stage in stages), max(stage[1] for stage in stages)
    if start == end:
        raise ValueError(f"{where}: wanted an end after the start, got {shown(stages)}")
    return start, end
