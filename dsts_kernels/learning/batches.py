"""What a batch is: inputs and targets, whole or in micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..ops._checks import describe


def micro_batches(name: str, batch: Any, accumulate: int) -> list[tuple[Any, Any]]:
    """``batch`` as a list of ``accumulate`` pairs, each with samples."""
    if accumulate > 1:
        if not isinstance(batch, (tuple, list)) or len(batch) != accumulate:
            found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else describe(batch)
            raise ValueError(f"{name}: got {found}, wanted {accumulate} pairs (inputs, targets), as accumulate says")
        return [pair(f"{name}[{i}]", one) for i, one in enumerate(batch)]
    return [pair(name, batch)]


def pair(name: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else describe(batch)
        raise ValueError(f"{name}: got {found}, wanted a pair (inputs, targets)")
    inputs, targets = batch
    first = first_tensor(inputs)
    if first is not None and first.dim() and not first.shape[0]:
        raise ValueError(f"{name}: got inputs of shape {tuple(first.shape)}, wanted one sample at least")
    return inputs, targets


def first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for found in map(first_tensor, value) if found is not None), None)
    return None


def call(module: nn.Module, inputs: Any) -> Any:
    """``module`` on a tensor, on positional arguments or on named ones."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, (tuple, list)):
        return module(*inputs)
    return module(inputs)
