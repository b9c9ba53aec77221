"""torchvision beside a torch that its native library was not built for.

Its models are plain PyTorch, but importing it registers fakes for operators of that library, and fails where they are
not there. :func:`torchvision` defines their schemas; they have no implementation, and no video model calls them. For
tests alone: the package never does this.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_LIBRARY: list[torch.library.Library] = []  # schemas live as long as it does


def torchvision() -> ModuleType:
    """The package, imported; its own operators where they load, else schemas."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _LIBRARY.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in SCHEMAS:
            _LIBRARY[0].define(schema)
        return importlib.import_module("torchvision")


def for_processes() -> str:
    """A ``PYTHONPATH`` with which processes of their own find this tree, and torchvision as :func:`torchvision` has it.

    What imports torchvision by itself where it is installed (torchmetrics) would fail there otherwise.
    """
    root = Path(__file__).resolve().parents[2]
    if importlib.util.find_spec("torchvision") is None:
        return str(root)
    torchvision()
    return os.pathsep.join([str(Path(__file__).parent / "at_start"), str(root)] if _LIBRARY else [str(root)])
