"""The torch library that holds our ops, and the one way to define one.

An op is a schema, an implementation that picks a backend, and a fake that gives shapes; autograd lives in an
``autograd.Function`` outside, which costs half as much a call as ``torch.library.custom_op``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.amp import is_autocast_available

LIBRARY = torch.library.Library("dsts_kernels", "DEF")
PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """A callable op: through the dispatcher where something listens there, straight to its implementation else.

    The dispatcher costs 1 to 5 us a call, the more the more arguments, which a small layer feels. Compilers, exporters,
    fake and meta tensors, subclasses and the profiler see the op; plain eager calls do not need it.
    """

    def __init__(self, overload: torch._ops.OpOverload, run: Callable) -> None:
        self.overload, self._run = overload, run

    def __call__(self, *args):
        x = args[0]
        plain = not torch.compiler.is_compiling() and type(x) in PLAIN and not x.is_meta
        if not plain or torch.autograd._profiler_enabled():
            return self.overload(*args)
        return self._run(*args)


def define(schema: str, implementation: Callable, fake: Callable) -> Op:
    """Define ``dsts_kernels::<schema>``, whose first argument is a tensor; returns the callable op."""
    name = schema.split("(", 1)[0]

    def run(*args):
        # Beneath the op autograd and autocast would otherwise still see the calls inside.
        if torch.is_grad_enabled() or autocast_on(args[0]):
            with torch.no_grad(), without_autocast(args[0]):
                return implementation(*args)
        return implementation(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"dsts_kernels::{name}", fake, lib=LIBRARY)
    return Op(getattr(torch.ops.dsts_kernels, name).default, run)


def apply(function: type[torch.autograd.Function], forward: Callable, *args):
    """``function.apply(*args)`` where a gradient may be wanted, else ``forward(*args)``, which costs 3.5 us less."""
    tracked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if tracked or torch.autograd.forward_ad._current_level >= 0:
        return function.apply(*args)
    return forward(*args)


# Asked once: older versions of torch.compile cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone") if is_autocast_available(name)
)


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``, where there is such a thing."""
    device = x.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A block in which autocast is off; entering one costs more than asking."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else contextlib.nullcontext()


def autocast_features(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where autocast is on; weights are converted where they are gathered.

    As in torch, float64 is left alone.
    """
    cast = autocast_on(x) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if cast else x
