"""``python -m dsts_kernels probe CHECKPOINT``: the model of a checkpoint on its test set, as it is and changed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .. import files
from ..backbones import load_state
from ..classify.config import CLASSIFIER, ClassifierConfig
from ..data.named import SYNTHETIC, build_test_data
from ..learning import load_checkpoint
from ..viz import plot_costs
from .report import Report, probe, report_text

__all__ = ["add_arguments", "probe_checkpoint", "probe_command"]

NOT_OURS = "; wanted a checkpoint of examples/train.py with DSTS"
PICTURES, DPI = (".png", ".pdf", ".svg"), 150
PATHS = ("videos", "classes", "test_annotation", "segments")  # which may lie elsewhere now


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file that a training run saved")
    add("--test-clips", type=at_least_one, metavar="N", help="synthetic tasks: clips to draw (as the run had)")
    for name in PATHS:
        add(f"--{name.replace('_', '-')}", metavar="PATH", help="videos: where they are now (as the run had)")
    add("--by-layer", action="store_true", help="also change each layer alone")
    add("--draws", type=at_least_one, default=5, metavar="N", help="of what is random (5)")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--json", action="store_true", help="one JSON document instead of text")
    add("--figure", type=Path, metavar="FILE", help="draw the costs: .png, .pdf or .svg")
    add("--out", type=Path, metavar="FILE", help="write there instead of printing")
    add("--device", default="cpu", help="such as cuda (cpu)")
    add("--batch", type=at_least_one, default=64, metavar="N", help="clips at a time (64)")
    add("--threads", type=at_least_one, metavar="N", help="of the CPU (as torch chooses)")


def probe_checkpoint(
    path: Path, *, device: str = "cpu", batch: int = 64, data: dict[str, Any], **options: Any
) -> Report:
    """:func:`probe` of a checkpoint of ``examples/train.py``.

    Args:
        path: of the checkpoint.
        device, batch: to run on, and clips at a time.
        data: options of the test set that differ from the run's.
        options: of :func:`probe`.

    Raises:
        FileNotFoundError: no such file; no such videos.
        ImportError: the backbone or the videos need a package that is missing.
        ValueError: damaged, another file, or a model without DSTS.
    """
    content = load_checkpoint(path, hint=NOT_OURS)
    for key in (CLASSIFIER, "model", "options"):
        if key not in content:
            raise ValueError(f"path: got {str(path)!r}, a checkpoint without {key!r}{NOT_OURS}")
    run = argparse.Namespace(**{**content["options"], **data})
    if "test_clips" in data and run.data not in SYNTHETIC:
        raise ValueError(f"--test-clips: got {run.test_clips} of --data {run.data}, wanted none: its clips are given")
    config = ClassifierConfig.from_dict(content[CLASSIFIER])
    model = config.build()
    load_state(model, content["model"], source=str(path))
    test_set = build_test_data(run)
    if list(test_set.class_names) != list(config.class_names):
        raise ValueError(f"path: got {str(path)!r} of other classes than its test set, wanted the same")
    loader = DataLoader(test_set, batch)
    return probe(
        model.eval().to(device),
        loader,
        class_names=test_set.class_names,
        attributes=test_set.attributes,
        attribute_names=test_set.attribute_names,
        start=content.get("gates_at_start"),
        **options,
    )


def draw_costs(parser: argparse.ArgumentParser, path: Path, found: Report) -> None:
    """``--figure``: all layers at once, then each alone where that was measured."""
    rows = {"all layers": found.measured.rows}
    rows |= {f"{name} alone": own for name, own in zip(found.layers, found.by_layer, strict=False)}
    try:
        drawn = plot_costs({title: [row._asdict() for row in own] for title, own in rows.items()})
        with files.replacing(path) as beside:
            drawn.savefig(beside, dpi=DPI, format=path.suffix[1:])
    except (ImportError, OSError) as error:
        parser.error(str(error))


def probe_command(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """What the command prints; argparse's error where it cannot."""
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.figure is not None and given.figure.suffix not in PICTURES:
        parser.error(f"--figure: got {given.figure}, wanted a name that ends in {', '.join(PICTURES)}")
    data = {name: getattr(given, name) for name in ("test_clips", *PATHS) if getattr(given, name) is not None}
    try:
        found = probe_checkpoint(
            given.checkpoint,
            device=given.device,
            batch=given.batch,
            data=data,
            by_layer=given.by_layer,
            draws=given.draws,
            seed=given.seed,
        )
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(str(error))
    if given.figure is not None:
        draw_costs(parser, given.figure, found)
    text = json.dumps(found.to_dict(), indent=1) if given.json else report_text(found)
    if given.out is None:
        return text
    try:
        with files.replacing(given.out) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        parser.error(f"--out: got {given.out}, which cannot be written ({error})")
    return ""
