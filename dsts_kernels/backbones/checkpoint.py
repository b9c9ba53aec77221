"""Published weights into our backbones: reading a file without executing it, and checking all of it before any is used.

A file is a ``state_dict``, or a dict that holds one under ``"state_dict"`` beside other things, as mmaction2 and many
training scripts write them. Names are the map: TPN's are those of mmaction2 (``backbone.``, ``neck.``, ``cls_head.``),
and what those files hold beyond the model is listed in :data:`BESIDE_TPN`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import check_records
from ..layer_state import NOISE, LayerState
from ..ops._checks import describe
from .tpn import TPN

__all__ = ["load_mmaction2", "load_state", "read_state"]

# Of a file of TPN, what is no weight of ours: a copy of fc_cls that testing makes and may leave behind, old; the mean
# and the deviation of pixels.
BESIDE_TPN = ("cls_head.new_cls.", "data_preprocessor.")
AUX_HEAD = "neck.aux_head."
TPN_HEAD = ("cls_head.fc_cls.", "neck.aux_head.fc.")
SHOWN = 4  # keys of each kind in an error


class _Ignored:
    """Stands in for a class that a file names and that we have no use for: takes all, keeps nothing, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _stand_ins(path: Path) -> list[type]:
    """A stand-in for every class or function beyond torch's that a zip file names.

    mmengine writes its log beside the weights, as objects of its own; with these ``weights_only`` reads past them.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    pairs = [name.rpartition(".") for name in names]
    return [type(own, (_Ignored,), {"__module__": module}) for module, _, own in pairs]


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The ``state_dict`` of a file of ``torch.save``, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, cut off, or without a ``state_dict``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, wanted a file of weights; there is no such file")
    hint = ""
    try:
        ignored: list[type] = []
        if zipfile.is_zipfile(path):
            check_records(path)
            ignored = _stand_ins(path)
        else:
            hint = (
                "; it is cut off, or of before torch 1.6 with more than weights in it: where you trust it, save "
                "torch.load(path, weights_only=False)['state_dict'] with torch.save and read that"
            )
        with torch.serialization.safe_globals(ignored):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen types for bytes that are something else
        reason = f"{type(error).__name__}: {error}" if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise ValueError(f"path: got {str(path)!r}, which torch.load cannot read ({reason}){hint}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"path: got {str(path)!r}, which holds no state_dict, wanted a mapping of names to tensors")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key}: got {describe(value)} in {str(path)!r}, wanted a tensor")
    return dict(state)


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str, head: Collection[str] = (), new_head: bool = False
) -> list[str]:
    """Write a state into a model: all of it, or nothing.

    Args:
        model: whose ``state_dict`` has the names and shapes wanted.
        state: names to tensors, of any floating dtype: they are cast to the model's.
        source: where the state is from, for errors.
        head: the prefixes of the classifier's names.
        new_head: leave the classifier as it is.

    Returns:
        The names that were left as they are: the classifier's with ``new_head``, otherwise none.

    Raises:
        ValueError: a name is missing, unexpected, or of another shape. The model is as it was.
    """
    own = model.state_dict()
    left = [key for key in own if new_head and key.startswith(tuple(head))]
    wanted = {key: value for key, value in own.items() if key not in left}
    given = {key: value for key, value in state.items() if not (new_head and key.startswith(tuple(head)))}
    missing = [key for key in wanted if key not in given]
    beside = {f"{name}.{NOISE}" for name, part in model.named_modules() if isinstance(part, LayerState)}
    unexpected = [key for key in given if key not in wanted and key not in beside]
    differing = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
    if missing or unexpected or differing:
        shapes = [f"{key}: got {tuple(given[key].shape)}, wanted {tuple(wanted[key].shape)}" for key in differing]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        hint = ""
        if not missing and not unexpected and all(key.startswith(tuple(head)) for key in differing):
            hint = "; it was trained for other classes: new_head=True leaves the classifier out"
        faults = "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{source}: is no state of this model, of whose {len(own)} names: {faults}{hint}")
    model.load_state_dict({**given, **{key: own[key] for key in left}})
    return left


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def load_mmaction2(model: TPN, path: str | os.PathLike, *, new_head: bool = False) -> list[str]:
    """Load a checkpoint of mmaction2's ``tpn-slowonly_r50_8x8x1`` into a TPN, before DSTS is put into it.

    Args:
        model: of :func:`~dsts_kernels.backbones.tpn_slowonly_r50`. Without ``aux_logits`` the file's auxiliary head is
            passed over.
        path: the file, of ``tools/train.py`` or as published; or a ``state_dict`` of our own.
        new_head: leave the last linear layers as they are, for a task of other classes.

    Returns:
        The names that were left as they are.

    Raises:
        TypeError: ``model`` is no TPN.
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or is of another model. The model is as it was.
    """
    if not isinstance(model, TPN):
        raise TypeError(f"model: got {type(model).__name__}, wanted TPN")
    beside = BESIDE_TPN if model.neck.aux_head is not None else (*BESIDE_TPN, AUX_HEAD)
    state = {key: value for key, value in read_state(path).items() if not key.startswith(beside)}
    return load_state(model, state, source=str(path), head=TPN_HEAD, new_head=new_head)
