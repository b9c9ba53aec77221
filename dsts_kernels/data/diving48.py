"""Diving48 as it is published: a JSON list of clips, one of classes, and a folder of videos."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from .folders import Videos
from .records import Annotations, Clip, field, read_json, shown

DIVING48_ATTRIBUTES = ("takeoff", "somersault", "twist", "position")


def read_diving48(
    annotation: str | PathLike[str], vocabulary: str | PathLike[str], videos: str | PathLike[str]
) -> Annotations:
    """Diving48, e.g. ``Diving48_V2_train.json`` with ``Diving48_vocab.json``.

    Args:
        annotation: JSON list of ``{"vid_name", "label", "start_frame", "end_frame"}``; ``end_frame`` is the one after
            the last (the number of frames, in the published files).
        vocabulary: JSON list of one ``[takeoff, somersault, twist, position]`` a class.
        videos: folder of ``<vid_name>.mp4`` (or another container), or of ``<vid_name>/<vid_name>.mp4``; of two files
            with one name the one that can be read.

    Returns:
        Clips cut by frames; the four parts of a class are its attributes, their values sorted by name.

    Raises:
        FileNotFoundError: a file or the folder does not exist, or the folder holds none of the videos.
        ValueError: a file is not what is described above, a video has two labels, or its name leads out of the folder;
            names the file and the entry.
    """
    source = Path(annotation)
    classes = _diving48_vocabulary(Path(vocabulary))
    entries = read_json(source)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{source}: wanted a list of at least one clip, got {shown(entries)}")
    files = Videos(Path(videos))
    clips = []
    known: dict[str, tuple[int, int]] = {}
    for number, entry in enumerate(entries):
        where = f"{source}: entry {number}"
        name = field(entry, "vid_name", str, where)
        label = field(entry, "label", int, where)
        first = field(entry, "start_frame", int, where)
        after = field(entry, "end_frame", int, where)
        if not name:
            raise ValueError(f"{where}: vid_name is empty")
        if not 0 <= label < len(classes):
            raise ValueError(
                f"{where} ({name}): label {label}: wanted one of the {len(classes)} classes of {vocabulary}"
            )
        if not 0 <= first < after:
            raise ValueError(f"{where} ({name}): wanted 0 <= start_frame < end_frame, got {first} and {after}")
        earlier, given = known.setdefault(name, (number, label))
        if label != given:
            raise ValueError(f"{where} ({name}): label {label}, but entry {earlier} gives it label {given}")
        path = files.find(name, where) or files.missing(name)
        clips.append(Clip(path, label, None, None, first, after - 1, name))
    files.check(len(clips))
    values = {
        attribute: sorted({parts[place] for parts in classes}) for place, attribute in enumerate(DIVING48_ATTRIBUTES)
    }
    numbers = {
        attribute: [values[attribute].index(parts[place]) for parts in classes]
        for place, attribute in enumerate(DIVING48_ATTRIBUTES)
    }
    return Annotations(tuple(clips), [" ".join(parts) for parts in classes], numbers, values)


def _diving48_vocabulary(path: Path) -> list[list[str]]:
    classes = read_json(path)
    if not isinstance(classes, list) or not classes:
        raise ValueError(f"{path}: wanted a list of one list a class, got {shown(classes)}")
    for number, parts in enumerate(classes):
        strings = isinstance(parts, list) and all(isinstance(part, str) and part for part in parts)
        if not strings or len(parts) != len(DIVING48_ATTRIBUTES):
            raise ValueError(f"{path}: class {number}: wanted [{', '.join(DIVING48_ATTRIBUTES)}], got {shown(parts)}")
    return classes
