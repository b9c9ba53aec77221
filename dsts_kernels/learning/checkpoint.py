"""Checkpoints that survive a kill: written beside the old one, synced, then renamed over it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FORMAT", "generator_states", "load_checkpoint", "restore_generators", "save_checkpoint"]

FORMAT = "dsts_kernels checkpoint 1"


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain Python values): the old file or the new one is there, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.part"):  # of a save that was killed
        stale.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({**state, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp keeps the file to its owner
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | os.PathLike, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file of :func:`save_checkpoint`; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, wanted a checkpoint; there is no such file")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen types for bytes that are something else
        raise ValueError(f"path: got {str(path)!r}, which torch.load cannot read ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"path: got {str(path)!r}, whose format is {found!r}, wanted {FORMAT!r}")
    return state


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
