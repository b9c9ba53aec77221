"""Files that survive a kill and say when they are not whole: what checkpoints and frozen modules are kept in.

A file is written beside the old one, synced, then renamed over it. Reading checks every record's checksum, executes
nothing, and wants the format that the writer put in: a name that ends in a number, which counts up.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_records", "read", "replacing", "write"]

FOLDER = 0x10  # a zip record's attribute, as MS-DOS had it
_SWITCH = threading.RLock()


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """A block in which torch.save writes checksums, also where they were switched off.

    The switch is the process's: one thread at a time turns it, or another would turn it back meanwhile.
    """
    with _SWITCH:
        if torch.serialization.get_crc32_options():
            yield
            return
        torch.serialization.set_crc32_options(True)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(False)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A block that writes a new file, whose path it is given: the file becomes ``path`` at the block's end.

    The old file or the new one is there, never half of one; where the block raises, it is the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # of a save that was killed
        stale.unlink(missing_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write(path: str | os.PathLike, content: Mapping[str, Any], form: str) -> None:
    """Write ``content`` (tensors and plain Python values): the old file or the new one is there, never half of one."""
    with replacing(path) as beside, open(beside, "xb") as file, _checksums():
        torch.save({**content, "format": form}, file)


def check_records(path: str | os.PathLike) -> None:
    """Check every record of a zip file, as torch.load does not look at checksums.

    Raises:
        zipfile.BadZipFile: no zip file, or one with a damaged record, which is named.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        # One bit of a record's attributes makes a folder of it, of which torch.load reads nothing at all.
        folders = [record.filename for record in archive.infolist() if record.external_attr & FOLDER]
    if damaged is not None or folders:
        raise zipfile.BadZipFile(f"record {damaged or folders[0]} is damaged")


def read(
    path: str | os.PathLike, form: str, what: str, *, map_location: torch.device | str = "cpu", hint: str = ""
) -> dict[str, Any]:
    """The content of a file of :func:`write`; nothing in it is executed.

    Args:
        path: of the file.
        form: the format wanted.
        what: the kind of file, for errors.
        map_location: where its tensors go.
        hint: what to do about a file that is none of ours, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, cut off, something else, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"path: got {str(path)!r}, wanted {what}; {why}")
    try:
        check_records(path)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen types for bytes that are something else
        reason = f"{type(error).__name__}: {error}" if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise ValueError(f"path: got {str(path)!r}, which torch.load cannot read ({reason}){hint}") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if isinstance(content, dict) and found == form:
        return content
    if _newer(found, form):
        hint = "; a newer version of dsts_kernels wrote it: install that one, or save the file again with this one"
    raise ValueError(f"path: got {str(path)!r}, whose format is {found!r}, wanted {form!r}{hint}")


def _newer(found: object, form: str) -> bool:
    """Whether a format is ours with a larger number."""
    name, number = form.rsplit(" ", 1)
    kind, _, theirs = found.rpartition(" ") if isinstance(found, str) else ("", "", "")
    return kind == name and theirs.isdecimal() and int(theirs) > int(number)
