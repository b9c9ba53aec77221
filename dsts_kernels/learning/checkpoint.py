"""Checkpoints that survive a kill (:mod:`dsts_kernels.files`), and the states of torch's generators."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import files
from .sharded import is_sharded

__all__ = ["FORMAT", "generator_states", "load_checkpoint", "restore_generators", "save_checkpoint"]

FORMAT = "dsts_kernels checkpoint 1"


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain Python values): the old file or the new one is there, never half of one.

    Raises:
        ValueError: a tensor of which this process has a part only.
    """
    refuse_shards("state", state)
    files.write(path, state, FORMAT)


def refuse_shards(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, own in value.items():
            refuse_shards(f"{name}[{key!r}]", own)
    elif isinstance(value, (list, tuple)):
        for index, own in enumerate(value):
            refuse_shards(f"{name}[{index}]", own)
    elif isinstance(value, Tensor) and is_sharded(value):
        raise ValueError(
            f"{name}: got a shard of a tensor, wanted all of it: torch.distributed.checkpoint.save writes every "
            "process's part, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) gathers them"
        )


def load_checkpoint(
    path: str | os.PathLike, map_location: torch.device | str = "cpu", *, hint: str = ""
) -> dict[str, Any]:
    """Read a file of :func:`save_checkpoint`; nothing in it is executed.

    Args:
        path: of the file.
        map_location: where its tensors go.
        hint: what to do about a file that is none, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint, or a damaged one.
    """
    return files.read(path, FORMAT, "a checkpoint", map_location=map_location, hint=hint)


def generator_states(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """State of torch's generators: the CPU's, and that of ``device``."""
    device = torch.device(device)
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Continue the streams of :func:`generator_states`."""
    torch.set_rng_state(states["cpu"].cpu())
    if torch.device(device).type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
