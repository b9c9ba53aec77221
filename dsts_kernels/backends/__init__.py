"""Which implementation runs an op: predicates that say why not, a choice, and an override.

Ops call :func:`choose` beneath the dispatcher, so a compiled graph sees one op whatever runs it. The order of
preference is: the ``backend=`` argument, :func:`use_backend`, the environment variable ``DSTS_BACKEND``, the
first backend in :data:`BACKENDS` that can run, or one that was measured faster on such a GPU (:mod:`.gpu.measured`). A
backend asked for by name that cannot run is an error.
"""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar

import torch

from .base import OPS, Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .eager import EagerBackend
from .gpu import GpuBackend
from .gpu.measured import winner
from .triton import TritonBackend

__all__ = ["BACKENDS", "OPS", "Backend", "available", "choose", "explain", "use_backend"]

BACKENDS: dict[str, Backend] = {b.name: b for b in (CpuBackend(), TritonBackend(), CudaBackend(), EagerBackend())}

# Public functions by the op that does their work.
COMPOSED = {"relevance_scores": "tap_sums", "saturating_sigmoid": "semhash_gate"}


def _known(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    return name


def available() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, best first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.missing() is None)


_backend: ContextVar[str | None] = ContextVar("dsts_kernels.use_backend", default=None)
_latest: str | None = None  # what was set last, in whatever thread
_used = False  # whether anything was ever set: until then no op needs to look


def _set(name: str | None) -> None:
    global _latest, _used
    _backend.set(name)
    _latest, _used = name, True


class use_backend:
    """Make every op run on the backend ``name`` (``None``: choose again), from here on or for a ``with`` block.

    It holds for this thread or asyncio task, as ``torch.set_grad_enabled`` does, and for what ``backward()`` runs in
    it, in autograd's threads on a GPU too. Threads that Python starts do not inherit it: the environment variable
    ``DSTS_BACKEND`` holds for all of them. Processes inherit it by ``fork``, as the workers of a ``DataLoader`` on
    Linux do, and not by ``spawn``. A function under ``torch.compile`` that calls it breaks its graph there: put the
    block around the call.

    >>> import dsts_kernels
    >>> with dsts_kernels.backends.use_backend("eager"):
    ...     gate = dsts_kernels.functional.saturating_sigmoid(torch.zeros(2, 3))

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run on this machine; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            reason = BACKENDS[_known(name, "use_backend(name)")].missing()
            if reason is not None:
                raise RuntimeError(f"use_backend(name): {name!r} cannot run here: {reason}")
        self.name = name
        self._before = [_backend.get()]
        self._entered = False
        _set(name)

    def __enter__(self) -> use_backend:
        if self._entered:  # again: what it comes back to is what holds now
            self._before.append(_backend.get())
        self._entered = True
        _set(self.name)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _set(self._before.pop() if self._before else None)


def _in_effect() -> str | None:
    """What :class:`use_backend` set for this thread, or for the call of ``backward()`` that this thread works for."""
    name = _backend.get()
    if name is None and _used:
        if torch._C._is_key_in_tls("context"):  # an autograd thread: of the call of backward(), as torch keeps it
            name = torch._C._get_obj_in_tls("context").get(_backend)
        elif torch._C._current_autograd_node() is not None:  # older versions of torch do not tell whose call it is
            name = _latest if isinstance(threading.current_thread(), threading._DummyThread) else None
    return name


def _requested(argument: str | None) -> tuple[str | None, str]:
    if argument is not None:
        return argument, "backend"
    name = _in_effect()
    if name is not None:
        return name, "use_backend(name)"
    return _environment("DSTS_BACKEND"), "DSTS_BACKEND"


def _environment(name: str) -> str | None:
    """An environment variable as it is now, ``None`` where it is empty or not set.

    Every op asks. ``os.environ.get`` takes ten times as long as its own dictionary where a variable is not set.
    """
    if (data := getattr(os.environ, "_data", None)) is not None and os.environ.encodekey(name) not in data:
        return None
    return os.environ.get(name) or None


def _faster(first: Backend, op: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """``first``, or the backend that was measured faster on such a chip, where that can run."""
    if device.type == "cpu" or not isinstance(first, GpuBackend):
        return first
    other = BACKENDS.get(winner(op, device, dtype) or first.name)
    return first if other is None or other.why_not(op, device, dtype) is not None else other


def choose(op: str, device: torch.device, dtype: torch.dtype, requested: str | None = None) -> Backend:
    """The backend that runs ``op`` on tensors of this device and dtype.

    Raises:
        ValueError: an unknown name was asked for.
        RuntimeError: the backend asked for cannot run this; the message says why.
    """
    name, source = _requested(requested)
    if name is not None:
        backend = BACKENDS[_known(name, source)]
        reason = backend.why_not(op, device, dtype)
        if reason is not None:
            raise RuntimeError(f"{source}={name!r} cannot run {op} on {device} in {dtype}: {reason}")
        return backend
    for backend in BACKENDS.values():
        if backend.why_not(op, device, dtype) is None:
            return _faster(backend, op, device, dtype)
    raise RuntimeError(explain(op, device, dtype))


def explain(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """What would run ``op``, and for every other backend the reason why not: a few lines of text.

    >>> print(dsts_kernels.backends.explain("gated_conv3d", "cpu", torch.float32))  # doctest: +SKIP
    gated_conv3d on cpu in torch.float32 runs on 'cpu'
      cpu: can run
      eager: can run (plain PyTorch: every step a pass over memory of its own)
    """
    if op not in OPS and op not in COMPOSED:
        raise ValueError(f"op: got {op!r}, wanted one of {', '.join((*OPS, *COMPOSED))}")
    op = COMPOSED.get(op, op)
    device = torch.device(device)
    lines = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(op, device, dtype)
        lines.append(f"  {name}: can run ({backend.remark})" if reason is None else f"  {name}: no, {reason}")
    try:
        head = f"{op} on {device} in {dtype} runs on {choose(op, device, dtype).name!r}"
    except RuntimeError as error:
        head = str(error) if _requested(None)[0] else f"no backend can run {op} on {device} in {dtype}"
    return "\n".join([head, *lines])
