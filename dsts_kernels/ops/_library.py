"""The torch library that holds our ops, and the one way to define one.

An op is a schema, an implementation that picks a backend, a fake that gives shapes and, where it has one, a derivative.
:func:`define` registers all of it with the dispatcher, where compilers, exporters, tracers, modes and transforms find
it, and gives back an :class:`Op`, which takes the short way past the dispatcher where nothing listens there.
"""

from __future__ import annotations

import contextlib
import operator
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..backends import choose

# "dsts_kernels", unless a loader of kernels gave the package another name, as it may hold several versions.
NAMESPACE = re.sub(r"\W", "_", __package__.rpartition(".")[0])
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
PLAIN = (Tensor, Parameter)
NO_DERIVATIVE = "NoDerivative"  # how autograd's nodes of ops without one are called: learning.second_order asks


class Derivative(NamedTuple):
    """The derivative of an op: what its forward pass keeps, and what its backward pass does with it."""

    setup_context: Callable[..., None]  # (ctx, inputs, output), and `kept` where it keeps
    backward: Callable[..., tuple]  # (ctx, *gradients), one gradient or None for every input
    keeps: bool = False  # backends with a method `<op>_keeping` hand on what they worked out


def _quiet() -> frozenset[int]:
    """The dispatch keys that are on for every op of a thread where nothing listens, as integers: those of inference
    mode, and those outside it."""
    key = torch._C.DispatchKey
    always = torch._C.DispatchKeySet(key.BackendSelect)
    return frozenset((always.raw_repr(), (always | torch._C.DispatchKeySet(key.ADInplaceOrView)).raw_repr()))


QUIET = _quiet()


def _only_devices() -> bool:
    """Whether every function mode is one of ``torch.set_default_device`` or ``with torch.device(...)``."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def listened(tensors: Sequence[Tensor | None], profiled: bool = True) -> bool:
    """Whether anything must see an op on ``tensors``, so that it has to go through the dispatcher.

    Compilers and exporters; dispatch and function modes (a FLOP counter), but for a default device, which moves no op
    that names its own; transforms (``torch.func``); ``torch.jit.trace``; the profiler; tensor subclasses, fake and meta
    tensors; and tensors whose memory does not hold their values: a lazy negative, a lazy zero. The profiler is left out
    where not ``profiled``: what it would time must be what runs without it.
    """
    if torch.compiler.is_compiling() or (profiled and torch.autograd._profiler_enabled()):
        return True
    modes = torch._C._dispatch_tls_local_include_set().raw_repr()
    if modes not in QUIET or (torch._C._is_torch_function_mode_enabled() and not _only_devices()):
        return True
    for a in tensors:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            if a.is_neg():
                return True
        elif a is not None:
            return True
    first = tensors[0]
    return not (first.is_cpu or first.is_cuda) or first._is_zerotensor()


def tracked(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a derivative may be wanted: a gradient, or in forward mode a tangent."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


FLOPS: dict[Any, Callable[..., int]] = {}  # formulas by op


def offer_formulas() -> None:
    """Hand :data:`FLOPS` to torch's counter where one counts; what a user gave it comes first.

    Registered ahead they would import it, and it imports Triton, which takes half a second.
    """
    if "torch.utils.flop_counter" not in sys.modules:
        return
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            for packet, formula in FLOPS.items():
                registry.setdefault(packet, formula)


class Op:
    """A callable op: through the dispatcher where something listens there, straight to its implementation else.

    The dispatcher costs 1 to 5 us a call, the more the more arguments, which a small layer feels.
    """

    def __init__(self, overload: torch._ops.OpOverload, run: Callable, tensors: Callable, functions: tuple) -> None:
        self.overload, self._run, self._tensors = overload, run, tensors
        self._function, self._transformed = functions

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.overload(*args)
        tensors = self._tensors(args)
        if listened(tensors):
            offer_formulas()
            transformed = self._transformed is not None and torch._C._are_functorch_transforms_active()
            return self._transformed.apply(*args) if transformed else self.overload(*args)
        if self._function is not None and tracked(tensors):
            return self._function.apply(*args)
        return self._run(*args)


def define(
    schema: str,
    implementation: Callable | None,
    fake: Callable,
    *,
    strided: tuple[str, ...] = (),
    derivative: Derivative | None = None,
    differentiable: bool = True,
    flops: Callable[..., int] | None = None,
) -> Op:
    """Define ``dsts_kernels::<schema>``; returns the callable op.

    Args:
        implementation: of checked arguments. Every tensor is dense, but those named in ``strided``. ``None``: it is the
            method of this name of the backend that the first tensor's device and dtype, and the last argument, choose.
        fake: shapes of what it returns, from the shapes of its arguments.
        strided: arguments whose strides the implementation reads, any of them: features.
        derivative: ``None`` refuses: an error names the op where a derivative is asked for.
        differentiable: false for an op of inference, whose results are cut off from autograd.
        flops: floating-point operations of a call, for ``torch.utils.flop_counter``: the op's arguments, and
            ``out_val``, what it returned.
    """
    name = schema.split("(", 1)[0]
    names = _tensor_arguments(schema)
    assert set(strided) <= set(names), (strided, names)
    dense = tuple(i for name, i in names.items() if name not in strided)
    count, method = len(_arguments(schema)), f"{name}_keeping"

    def run(*args, **keeping):
        for i in dense:  # native code reads plain memory
            if args[i] is not None and not args[i].is_contiguous():
                args = (*args[:i], args[i].contiguous(), *args[i + 1 :])
        call = implementation
        if call is None:
            *args, backend = args if len(args) == count else (*args, None)
            chosen = choose(name, args[0].device, args[0].dtype, backend, args[0].shape)
            call = getattr(chosen, method, None) if keeping else None
            if call is None:
                call, keeping = getattr(chosen, name), {}
        # Beneath the op autograd and autocast would otherwise still see the calls inside.
        if torch.is_grad_enabled() or autocast_on(args[0]):
            with torch.no_grad(), without_autocast(args[0]):
                return call(*args, *keeping.values())
        return call(*args, *keeping.values())

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    pick = operator.itemgetter(*names.values()) if len(names) > 1 else lambda args: args[:1]
    functions = _register_autograd(name, packet.default, run, pick, derivative, differentiable)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _by_slices(packet.default), lib=LIBRARY)
    if flops is not None:
        FLOPS[packet] = flops
    return Op(packet.default, run, pick, functions)


def _arguments(schema: str) -> list[list[str]]:
    """Type and name of every argument of an op."""
    return [argument.split("=")[0].split() for argument in schema.split("(", 1)[1].split(")", 1)[0].split(",")]


def _tensor_arguments(schema: str) -> dict[str, int]:
    """Positions of the tensors among an op's arguments, by name."""
    return {name: i for i, (kind, name) in enumerate(_arguments(schema)) if kind in ("Tensor", "Tensor?")}


def _register_autograd(
    name: str,
    overload: torch._ops.OpOverload,
    run: Callable,
    tensors: Callable,
    derivative: Derivative | None,
    differentiable: bool,
) -> tuple[type | None, type | None]:
    """Registers what autograd does with an op.

    Returns the ``autograd.Function`` of calls past the dispatcher, and that of ``torch.func``.
    """

    def below(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def cut_off(*args):
        offer_formulas()
        return below(*args)

    if not differentiable:
        LIBRARY.impl(name, cut_off, "Autograd")
        return None, None
    kind = NO_DERIVATIVE if derivative is None else "Op"
    derivative = derivative or _refused(name)
    steps = _steps(name, derivative)
    seen = type(f"{kind}_{name}", (torch.autograd.Function,), {**steps, "forward": _keeping(below, derivative)})
    transformed = type(
        f"{kind}_{name}",
        (torch.autograd.Function,),
        {
            **steps,
            "forward": staticmethod(below),
            "setup_context": staticmethod(derivative.setup_context),
            "vmap": staticmethod(_by_slices(overload)),
        },
    )

    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    def autograd(*args):
        offer_formulas()
        args += defaults[len(args) :]  # the dispatcher leaves out what is as the schema has it
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{NAMESPACE}::{name}: got a torch.func transform of the registered op, as of an exported module; "
                "wanted one of dsts_kernels.functional or of the module itself"
            )
        return seen.apply(*args) if tracked(tensors(args)) else below(*args)

    LIBRARY.impl(name, autograd, "Autograd")
    plain = type(
        f"{kind}_{name}", (torch.autograd.Function,), {**steps, "forward": _keeping(run, derivative, derivative.keeps)}
    )
    return plain, transformed


def _refused(name: str) -> Derivative:
    """The derivative of an op that has none: an error where one is asked for."""

    def backward(ctx, *gradients):
        raise NotImplementedError(
            f"{NAMESPACE}::{name} has no derivative: got a backward pass through it, as for a second derivative; "
            "wanted first derivatives only (the literal dsts_kernels.reference.DSTS has second ones)"
        )

    return Derivative(lambda ctx, inputs, output: None, backward)


def _keeping(forward: Callable, derivative: Derivative, keeps: bool = False) -> staticmethod:
    """A ``forward(ctx, ...)``, which costs half as much a call as a ``setup_context`` of its own.

    With ``keeps`` the forward pass hands on what it worked out besides. Through the dispatcher an op returns what its
    schema says and no more, so there the backward pass works it out anew.
    """

    def forward_and_keep(ctx, *args):
        output, kept = forward(*args, needs=ctx.needs_input_grad) if keeps else forward(*args), ()
        if keeps and type(output) is tuple:
            output, *kept = output
        if type(output) is Tensor and output._is_view():  # or nobody could change it in place
            output = output.data
        derivative.setup_context(ctx, args, output, *kept)
        return output

    return staticmethod(forward_and_keep)


def _steps(name: str, derivative: Derivative) -> dict[str, staticmethod]:
    """Both directions of an op's derivative, the second of which none has."""

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"{NAMESPACE}::{name} has no forward-mode derivative: got a tangent (torch.func.jvp, jacfwd or "
            "torch.autograd.forward_ad), wanted reverse mode (torch.func.grad, vjp, jacrev or backward)"
        )

    return {"backward": staticmethod(derivative.backward), "jvp": staticmethod(jvp)}


def _by_slices(op: Callable) -> Callable:
    """A rule for ``torch.func.vmap``: the op on every slice, one after the other."""

    def rule(info, in_dims, *args):
        if not info.batch_size:
            raise ValueError(f"vmap: got a dimension of size 0 over {op}, wanted one slice at least")
        pairs = list(zip(args, in_dims, strict=True))
        slices = [
            op(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in pairs))
            for i in range(info.batch_size)
        ]
        if isinstance(slices[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])
        return torch.stack(slices), 0

    return rule


def apply(function: type[torch.autograd.Function], expression: Callable, *args):
    """``function.apply(*args)`` where a gradient is wanted and nothing listens, else ``expression(*args)``.

    The expression is plain torch and has the same value and gradient, as compilers and transforms want it; the function
    is the faster of the two.
    """
    return function.apply(*args) if tracked(args) and not listened(args) else expression(*args)


def empty_features(x: Tensor, outputs: int) -> Tensor:
    """``(B, O, T, H, W)`` like ``x``, channels-last: what fakes of convolutions return."""
    b, _, t, h, w = x.shape
    last = torch.channels_last_3d
    return torch.empty((b, outputs, t, h, w), dtype=x.dtype, device=x.device, memory_format=last)


# Asked once: older versions of torch.compile cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone") if is_autocast_available(name)
)


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``, where there is such a thing."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # a tenth of what follows
        return False
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
