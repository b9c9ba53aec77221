"""Backbones by name: where DSTS goes in each, what clips it was made for, and how one is made, with weights or without.

:data:`BACKBONES` states them, :func:`create` makes one. TPN and a tiny network are here; the others are torchvision's
video models, and torchvision is imported only when one of them is made.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import TPN_HEAD, load_mmaction2, load_state, read_state
from .tiny import TinyNet
from .tpn import TPN

__all__ = ["BACKBONES", "Backbone", "create", "swin3d_b"]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SYNTHETIC = {"mean": (0.5,) * 3, "std": (64 / 255,) * 3}
KINETICS = {"mean": (0.43216, 0.394666, 0.37645), "std": (0.22803, 0.22145, 0.216989)}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A video classifier, ``(B, 3, T, H, W)`` clips to ``(B, num_classes)`` logits, and what a recipe must know of it.

    Attributes:
        name: its name here, and in torchvision.
        where: the submodule behind which DSTS goes by default, as in ``named_modules``. **Assumption**: the paper gives
            the shape of the features and no place; any other place is as good an argument of ``insert_dsts``.
        layout: of the features there: ``"BCTHW"`` or ``"BTHWC"``.
        channels: of the features there.
        width: channels of its first layer, where ``create(name, ..., width=)`` may set another; ``channels`` and all
            others follow. ``None`` where they are fixed.
        frames: of a clip that its published weights are for.
        size: side of a frame of such a clip, in pixels.
        mean, std: of red, green and blue in such clips, for pixels from 0 to 1: ``(pixel - mean) / std``.
        head: prefixes of the last layers' names in its ``state_dict``.
        torchvision: it is torchvision's.
    """

    name: str
    where: str
    layout: str = "BCTHW"
    channels: int
    width: int | None = None
    frames: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    head: tuple[str, ...]
    torchvision: bool = True

    def channels_of(self, width: int | None = None) -> int:
        """Channels of the features at :attr:`where`, in a model of that width.

        Raises:
            ValueError: there is no such width.
        """
        if width is not None and (self.width is None or not isinstance(width, int) or width < 1):
            wanted = "none" if self.width is None else "a whole number of at least 1"
            raise ValueError(f"width: got {width!r} for {self.name}, wanted {wanted}")
        return self.channels if width is None else self.channels * width // self.width


def _swin(name: str, channels: int) -> Backbone:
    place = {"where": "norm", "layout": "BTHWC", "channels": channels}
    return Backbone(name=name, **place, frames=32, size=224, **IMAGENET, head=("head.",))


def _resnet(name: str) -> Backbone:
    return Backbone(name=name, where="layer4", channels=512, frames=16, size=112, **KINETICS, head=("fc.",))


_TPN = Backbone(
    name="tpn",
    where="backbone.layer3",
    channels=1024,
    width=64,
    frames=8,
    size=256,
    **IMAGENET,
    head=TPN_HEAD,
    torchvision=False,
)
_TINY = Backbone(
    name="tiny",
    where="stages",
    channels=48,
    width=12,
    frames=8,
    size=32,
    **SYNTHETIC,
    head=("classifier.",),
    torchvision=False,
)
_S3D = Backbone(
    name="s3d",
    where="features",
    channels=1024,
    frames=128,
    size=224,
    **KINETICS,
    head=("classifier.",),
)
BACKBONES: Mapping[str, Backbone] = MappingProxyType(
    {
        backbone.name: backbone
        for backbone in (
            _TPN,
            _swin("swin3d_b", 1024),
            _swin("swin3d_s", 768),
            _swin("swin3d_t", 768),
            _resnet("r3d_18"),
            _resnet("mc3_18"),
            _resnet("r2plus1d_18"),
            _S3D,
            _TINY,
        )
    }
)
_OURS: Mapping[str, Callable[..., nn.Module]] = {"tpn": TPN, "tiny": TinyNet}


def create(
    name: str,
    num_classes: int,
    *,
    weights: str | os.PathLike | None = None,
    new_head: bool = False,
    **options: Any,
) -> nn.Module:
    """A backbone of :data:`BACKBONES`, DSTS not in it yet.

    >>> from dsts_kernels import backbones
    >>> model = backbones.create("tpn", num_classes=48)
    >>> backbones.BACKBONES["tpn"].where
    'backbone.layer3'

    Args:
        name: a key of :data:`BACKBONES`.
        num_classes: of the task.
        weights: ``None`` starts at random. A path is read as :func:`~dsts_kernels.backbones.read_state` says: for TPN a
            file of mmaction2, for the others a ``state_dict``. For torchvision's models also the name of published
            weights, such as ``"KINETICS400_V1"`` or ``"DEFAULT"``, which torchvision downloads.
        new_head: leave the classifier at random, as weights for other classes need it.
        options: of the model: of :class:`~dsts_kernels.backbones.TPN`, of
            :class:`~dsts_kernels.backbones.TinyNet`, or of torchvision's function.

    Raises:
        ImportError: torchvision is needed and cannot be imported.
        FileNotFoundError: no such file.
        ValueError: an unknown name or weights, or weights of another model.
    """
    if name not in BACKBONES:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(BACKBONES)}")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, wanted at least 1")
    if new_head and weights is None:
        raise ValueError("new_head: got True without weights, wanted False: all layers are new")
    backbone = BACKBONES[name]
    if not backbone.torchvision:
        model = _OURS[name](num_classes, **options)
        if isinstance(model, TPN) and weights is not None:
            load_mmaction2(model, weights, new_head=new_head)
        elif weights is not None:
            load_state(model, read_state(weights), source=str(weights), head=backbone.head, new_head=new_head)
        return model
    models = _torchvision_models()
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if weights is not None:
        state = _published(models, name, weights)
        load_state(model, state, source=str(weights), head=backbone.head, new_head=new_head)
    return model


def swin3d_b(num_classes: int = 400, **options: Any) -> nn.Module:
    """Video Swin-B with random weights, torchvision's.

    For 32 frames of 224x224 its ``norm`` gives the paper's ``(B, 16, 7, 7, 1024)``, channels last.

    Args:
        num_classes: of the task.
        options: of ``torchvision.models.video.swin3d_b``.

    Raises:
        ImportError: torchvision cannot be imported.
    """
    return create("swin3d_b", num_classes, **options)


def _torchvision_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision").models
    except (ImportError, RuntimeError) as error:  # RuntimeError: its native library is of another torch
        raise ImportError(
            f"torchvision: cannot be imported ({error}), wanted one made for torch {torch.__version__}: "
            "pip install 'dsts_kernels[backbones]'"
        ) from error


def _published(models: ModuleType, name: str, weights: str | os.PathLike) -> Mapping[str, Tensor]:
    """Weights by a name of torchvision's, or from a file."""
    published = models.get_model_weights(name)
    if isinstance(weights, str) and weights in published.__members__:
        return published[weights].get_state_dict(progress=True, check_hash=True)
    if not os.path.isfile(weights):
        names = ", ".join(published.__members__)
        raise FileNotFoundError(f"weights: got {str(weights)!r}, wanted a file, or one of {names}")
    return read_state(weights)
