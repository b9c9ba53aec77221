"""What readers of annotation files give and share: records; text, JSON and fields with errors that say where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Clip(NamedTuple):
    """One labelled stretch of a video; a bound that is ``None`` is the video's own.

    Attributes:
        path: the video, or where it should be when it is missing.
        label: index into ``Annotations.class_names``.
        start: first moment, in seconds from the start of the file, as players count.
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


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a mark in front."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted text in UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) that are not blank, without the space around them and with tabs as spaces."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.replace("\t", " ").strip()


def field(entry: Any, key: str, kind: type, where: str) -> Any:
    """A field of a JSON object, of the kind that is wanted."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: wanted an object with {key!r}, got {shown(entry)}")
    if key not in entry:
        raise ValueError(f"{where}: has no {key!r}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key!r}: wanted {kind.__name__}, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as errors show it: its kind and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
