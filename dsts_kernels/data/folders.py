"""The videos of a folder by name without extension: ``<name>.mp4``, or ``<name>/<name>.mp4`` in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .video import VideoError, probe

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".ts")  # in order of preference
_RANK = {extension: place for place, extension in enumerate(EXTENSIONS)}
_MMACTION = ("subactions", "events", "videos")  # how mmaction2 lays FineGym out, in order of preference


class Videos:
    """A folder, listed once; a video is opened only where two files have its name.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of videos")
        self.folder = folder
        self._files, self._folders = _listed(folder)
        self._inside: dict[str, dict[str, list[Path]]] = {}
        self._found: dict[str, Path | None] = {}

    def find(self, name: str, where: str, groups: Iterable[str] = ()) -> Path | None:
        """A video by its name, or ``None``.

        Args:
            name: without extension; a file of the folder, or of a folder in it that is called like the video.
            where: the entry that names it, for errors.
            groups: other folders in it in which the video may lie.

        Raises:
            ValueError: the name is none of a file in this folder.
        """
        if name in (".", "..") or "\0" in name or Path(name).name != name:
            raise ValueError(
                f"{where}: wanted the name of a video in {self.folder}, got {name!r}, which leads elsewhere"
            )
        if name not in self._found:
            paths = list(self._files.get(name, ()))
            for group in dict.fromkeys((name, *groups)):
                if group in self._folders:
                    if group not in self._inside:
                        self._inside[group], _ = _listed(self.folder / group)
                    paths += self._inside[group].get(name, ())
            self._found[name] = _readable(paths) if len(paths) > 1 else next(iter(paths), None)
        return self._found[name]

    def missing(self, name: str) -> Path:
        """Where a video that is not there should be."""
        return self.folder / f"{name}{EXTENSIONS[0]}"

    def check(self, count: int) -> None:
        """Refuses a folder with none of ``count`` videos that were looked for.

        Raises:
            FileNotFoundError: there are none; says what is there instead.
        """
        if any(path is not None for path in self._found.values()):
            return
        name = next(iter(self._found))
        layout = [folder for folder in _MMACTION if folder in self._folders]
        hint = ""
        if layout:
            hint = f"; it has mmaction2's layout, pass one of its folders: {', '.join(layout)}"
        elif any(name in self._folders for name in self._found):
            hint = "; it has folders of these names without videos, perhaps frames: videos are wanted"
        raise FileNotFoundError(
            f"{self.folder}: holds none of the {count} videos, e.g. {self.missing(name).name}{hint}"
        )


def _listed(folder: Path) -> tuple[dict[str, list[Path]], set[str]]:
    """Videos by name, those of one name in order of preference, and the names of folders."""
    files: dict[str, list[Path]] = {}
    folders = set()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.is_dir():
                folders.add(entry.name)
            elif path.suffix.lower() in _RANK:
                files.setdefault(path.stem, []).append(path)
    for paths in files.values():
        paths.sort(key=lambda path: _RANK[path.suffix.lower()])
    return files, folders


def _readable(paths: list[Path]) -> Path:
    """Of files with one name the first that can be read to its end, else the first that opens, else the first."""
    for whole in (True, False):
        for path in paths:
            try:
                probe(path, end=whole)
            except VideoError:
                continue
            except ImportError:  # no PyAV: nothing can be told, and nothing will be read
                return paths[0]
            return path
    return paths[0]
