"""``python -m dsts_kernels classify``: its arguments, the videos that they name, its output and its exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..backbones import BACKBONES
from ..data.folders import EXTENSIONS
from .classifier import Classifier
from .results import Classification

__all__ = ["add_arguments", "classify"]

SHOWN = 12  # windows of a picture, at most
PICTURES = (".png", ".pdf", ".svg", ".jpg")
FAILED = 1  # the exit code where a video, or a window of one, could not be read


class Unread(NamedTuple):
    """A video that could not be read, and why."""

    path: Path
    reason: str


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted seconds above 0, or inf for the whole video")
    return value


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("clips", type=Path, nargs="+", metavar="CLIP", help="videos, or folders with videos in them at any depth")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="FILE", help="checkpoint of examples/train.py")
    model.add_argument("--backbone", choices=tuple(BACKBONES), help="random weights: what a model costs")
    add("--top", type=at_least_one, default=5, metavar="K", help="classes to name (5)")
    add("--window", type=seconds, metavar="SECONDS", help="of a long video's equal parts, roughly (10); inf: one part")
    add("--hop", type=seconds, metavar="SECONDS", help="from one window to the next (side by side)")
    add("--per-window", action="store_true", help="also each window's class and neurons")
    add("--json", action="store_true", help="one JSON document instead of text")
    add("--out", type=Path, metavar="FILE", help="write there instead of printing")
    add(
        "--figure", type=Path, metavar="PATH", help="draw frames and neurons: a picture, or a folder for several videos"
    )
    add("--device", default="cpu", help="such as cuda (cpu)")
    add("--batch", type=at_least_one, default=1, metavar="N", help="windows at a time (1)")
    add("--threads", type=at_least_one, metavar="N", help="of the CPU (as torch chooses)")
    add("--no-freeze", action="store_true", help="run DSTS as it is trained, not folded and packed")


def found_in(paths: Iterable[Path]) -> tuple[list[Path], list[Unread]]:
    """The videos that arguments name, folders looked through in order of names, each once; and what is not there.

    Raises:
        ValueError: a folder without videos.
    """
    videos: dict[Path, None] = {}
    missing = []
    for path in paths:
        if path.is_dir():
            inside = [found for found in path.rglob("*") if found.suffix.lower() in EXTENSIONS and found.is_file()]
            if not inside:
                raise ValueError(f"CLIP: got the folder {str(path)!r}, wanted videos in it: {', '.join(EXTENSIONS)}")
            videos.update(dict.fromkeys(sorted(inside)))
        elif path.exists():
            videos[path] = None
        else:
            missing.append(Unread(path, f"{path}: no such file"))
    return list(videos), missing


def classify(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit code: 1 where a video or a window could not be read, which stderr names."""
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        if given.out is not None and given.out.is_dir():
            raise ValueError(f"--out: got the folder {str(given.out)!r}, wanted the name of a file")
        videos, unread = found_in(given.clips)
        pictures = places(given.figure, videos)
        classifier = made(given)
        classifier.sampling.check(given.window, given.hop)
        results, failed = answers(classifier, videos, given)
        unread += failed
        text = document(classifier, given, results, unread) if given.json else report(given, results)
        if given.out is not None:
            with files.replacing(given.out) as beside:
                beside.write_text(text + "\n", encoding="utf-8")
        for result in results:
            if result.path in pictures:
                draw(result, pictures[result.path])
    except (ImportError, OSError, ValueError, TypeError) as error:
        parser.error(str(error))
    for result in results:
        for window, reason in result.left_out:
            print(f"{result.path}: {window.start:.1f} to {window.end:.1f} s left out: {reason}", file=sys.stderr)
    for _, reason in unread:
        print(f"error: {reason}", file=sys.stderr)
    if unread:
        print(f"{len(unread)} of {len(videos) + len(unread) - len(failed)} videos could not be read", file=sys.stderr)
    bad = bool(unread) or any(result.left_out for result in results)
    return ("" if given.out is not None else text), FAILED if bad else 0


def made(given: argparse.Namespace) -> Classifier:
    options = {"device": given.device, "freeze": not given.no_freeze}
    if given.model is not None:
        return Classifier.load(given.model, **options)
    return Classifier.untrained(given.backbone, **options)


def answers(
    classifier: Classifier, videos: list[Path], given: argparse.Namespace
) -> tuple[list[Classification], list[Unread]]:
    """Of every video its answer, or why there is none."""
    results: list[Classification] = []
    unread: list[Unread] = []
    began = time.perf_counter()
    for path in bar(videos, "videos", len(videos) > 1):
        try:
            results.append(
                classifier(
                    path,
                    length=given.window,
                    hop=given.hop,
                    batch=given.batch,
                    keep=SHOWN if given.figure is not None else 0,
                    progress=partial(windows_bar, path),
                )
            )
        except ValueError as error:  # VideoError, or logits that are not finite: the others' answers are kept
            unread.append(Unread(path, str(error)))
    windows = sum(len(result.windows) for result in results)
    if windows > 1 and not sys.stderr.isatty():
        took = time.perf_counter() - began
        of = "1 video" if len(results) == 1 else f"{len(results)} videos"
        print(f"{windows} windows of {of} in {took:.1f} s", file=sys.stderr)
    return results, unread


def windows_bar(path: Path, windows: Sequence[Any]) -> Iterable[Any]:
    return bar(windows, path.name, len(windows) > 1)


def bar(items: Sequence[Any], name: str, wanted: bool) -> Iterable[Any]:
    """The items with a progress bar, where there is somebody to see it."""
    if not wanted or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install 'dsts_kernels[train]'") from error
    return tqdm(items, desc=name, leave=False)


def report(given: argparse.Namespace, results: list[Classification]) -> str:
    return "\n".join(result.text(given.top, given.per_window) for result in results)


def document(
    classifier: Classifier, given: argparse.Namespace, results: list[Classification], unread: list[Unread]
) -> str:
    """All answers as one JSON document."""
    model = {
        "checkpoint": None if given.model is None else str(given.model),
        "backbone": classifier.config.backbone,
        "trained": classifier.trained,
        "frozen": not given.no_freeze,
        "classes": len(classifier.class_names),
        "sampling": classifier.sampling.to_dict(),
    }
    content = {
        "model": model,
        "clips": [result.to_dict(given.top) for result in results],
        "unreadable": [{"path": str(path), "reason": reason} for path, reason in unread],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def places(figure: Path | None, videos: list[Path]) -> dict[Path, Path]:
    """Where each video's picture goes.

    Raises:
        ValueError: one video and no name of a picture, or several videos and a file.
    """
    if figure is None:
        return {}
    if len(videos) == 1 and not figure.is_dir():
        if figure.suffix.lower() not in PICTURES:
            raise ValueError(f"--figure: got {str(figure)!r}, wanted a name that ends in {', '.join(PICTURES)}")
        return {videos[0]: figure}
    if figure.exists() and not figure.is_dir():
        raise ValueError(f"--figure: got the file {str(figure)!r} for {len(videos)} videos, wanted a folder")
    found: dict[Path, Path] = {}
    for video in videos:
        names = (video.name, *(f"{video.name}-{number}" for number in range(2, len(videos) + 2)))
        found[video] = next(figure / f"{name}.png" for name in names if figure / f"{name}.png" not in found.values())
    return found


def draw(result: Classification, path: Path) -> None:
    from ..viz import plot_classification

    drawn = plot_classification(result)
    with files.replacing(path) as beside:
        drawn.savefig(beside, dpi=150, format=path.suffix[1:].lower())
