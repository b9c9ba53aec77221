"""The torch library that holds our ops, and the one way to define one.

An op is a schema, an implementation that picks a backend, and a fake that gives shapes; autograd lives in an
``autograd.Function`` outside, which costs half as much a call as ``torch.library.custom_op``.
"""

from __future__ import annotations

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
            device = next(a for a in args if isinstance(a, Tensor)).device.type
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return implementation(*args)
            return implementation(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"dsts_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dsts_kernels, name).default


def autocast_features(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where autocast is on; weights are converted where they are gathered."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
