"""The torch library that holds our ops, and the one way to define one.

An op is a schema, an implementation that picks a backend, and a fake that gives shapes; autograd lives in an
``autograd.Function`` outside, which costs half as much a call as ``torch.library.custom_op``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dsts_kernels", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define ``dsts_kernels::<schema>``; returns the callable op."""
    name = schema.split("(", 1)[0]

    def run(*args):
        # Beneath the dispatcher autograd and autocast would otherwise still see the calls inside.
        with torch.no_grad():
            with without_autocast(next(a for a in args if isinstance(a, Tensor))):
                return implementation(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"dsts_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dsts_kernels, name).default


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``, where there is such a thing."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A block in which autocast is off; entering one costs more than asking."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else contextlib.nullcontext()


def autocast_features(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where autocast is on; weights are converted where they are gathered.

    As in torch, float64 is left alone.
    """
    cast = autocast_on(x) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if cast else x
