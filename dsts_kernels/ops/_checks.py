"""What an op accepts, said once: each check names the argument, what came and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.base import FLOATS

# Features whose channels lie in another dimension, and the way from there.
OTHER_ORDERS = {
    4: "; if these are (B, T, H, W, C), permute(0, 4, 1, 2, 3) makes them so",
    2: "; if these are (B, T, C, H, W), transpose(1, 2) makes them so",
}


def describe(value: object) -> str:
    """A value in an error message: type, and for tensors shape and dtype."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}{layout}"
    return f"{type(value).__name__} {value!r}"


def floating(name: str, value: object, dims: int | None = None) -> Tensor:
    """A dense floating tensor, of ``dims`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, wanted a floating tensor")
    if value.layout != torch.strided or value.dtype not in FLOATS:
        raise TypeError(f"{name}: got {describe(value)}, wanted a dense tensor in one of {', '.join(map(str, FLOATS))}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: got {describe(value)}, wanted {dims} dimensions")
    return value


def shaped(name: str, value: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor of exactly this shape, in one of these dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, wanted a tensor of shape {tuple(shape)}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got {describe(value)}, wanted shape {tuple(shape)}")
    if value.layout != torch.strided or value.dtype not in dtypes:
        raise TypeError(f"{name}: got {describe(value)}, wanted {' or '.join(map(str, dtypes))}, dense")
    return value


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, wanted {device}")


def features(name: str, value: object, channels: int | None = None) -> Tensor:
    """Video features ``(B, C, T, H, W)`` of so many channels, with at least one position."""
    x = floating(name, value)
    if x.dim() != 5:
        hint = ""
        if x.dim() == 4 and channels == x.shape[1] != x.shape[0]:
            hint = "; frames as a batch, (B*T, C, H, W), become clips by unflatten(0, (B, T)).transpose(1, 2)"
        elif x.dim() == 4 and channels in (None, x.shape[0]):
            hint = "; unsqueeze(0) makes one clip a batch"
        raise ValueError(f"{name}: got {describe(x)}, wanted 5 dimensions, (B, C, T, H, W){hint}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0 or x.shape[4] == 0:
        raise ValueError(f"{name}: got {describe(x)}, wanted C, T, H and W of at least 1")
    if channels is not None and x.shape[1] != channels:
        order = next((order for dim, order in OTHER_ORDERS.items() if x.shape[dim] == channels), "")
        raise ValueError(
            f"{name}: got {describe(x)}, wanted {channels} channels in dimension 1 of (B, C, T, H, W){order}"
        )
    return x


def neurons(value: object, batch: int, device: torch.device) -> Tensor:
    """One neuron index a sample."""
    neuron = shaped("neuron", value, (batch,), (torch.int64,))
    same_device("neuron", neuron, device)
    return neuron
