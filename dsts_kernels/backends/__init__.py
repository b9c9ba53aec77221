"""Which implementation runs an op: predicates that say why not, a choice, and an override.

Ops call :func:`choose` beneath the dispatcher, so a compiled graph sees one op whatever runs it. The order of
preference is: the ``backend=`` argument, :func:`use_backend`, the environment variable ``DSTS_BACKEND``, the
first backend in :data:`BACKENDS` that can run, or one that was measured faster on such a GPU at such a size
(:mod:`.gpu.measured`), plain PyTorch among them. A backend asked for by name that cannot run is an error.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from contextvars import ContextVar

import torch

from .algorithm import use_algorithm
from .base import OPS, Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .eager import EagerBackend
from .gpu import GpuBackend, measured
from .triton import TritonBackend

__all__ = ["BACKENDS", "OPS", "Backend", "available", "choose", "explain", "use_algorithm", "use_backend"]

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


class _Setting:
    """What a plain ``use_backend(name)`` asked for; ``thread`` is the only one that it holds in yet, ``None``: all."""

    def __init__(self, name: str | None) -> None:
        self.name, self.thread = name, threading.get_ident()


_settings: dict[_Setting, None] = {}  # for good, the latest last; a dict, whose steps need no lock
_blocks: ContextVar[tuple[use_backend, ...]] = ContextVar("dsts_kernels.use_backend", default=())  # innermost last
_entered: list[use_backend] = []  # the blocks of every thread, the latest last


class use_backend:
    """Make every op run on the backend ``name`` (``None``: choose again), for good or for a ``with`` block.

    As a statement of its own it holds for the process: for this thread at once, and for all others, running or new, but
    those in a block. A block holds for its thread or its asyncio task alone, whatever others do meanwhile, and for
    what ``backward()`` runs in it, in autograd's threads on a GPU too; Python's threads that are started in a block do
    not inherit it. Processes inherit either by ``fork``, as the workers of a ``DataLoader`` on Linux do, and neither
    by ``spawn``, where ``DSTS_BACKEND`` reaches them. A function under ``torch.compile`` that holds a block breaks its
    graph there: put the block around the call.

    An object may be entered several times, by several threads as well; once entered it is a block and no longer for
    good.

    >>> import dsts_kernels
    >>> with dsts_kernels.backends.use_backend("eager"):
    ...     gate = dsts_kernels.functional.saturating_sigmoid(torch.zeros(2, 3))

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run on this machine; the message says why.
    """

    _setting: _Setting | None = None

    def __init__(self, name: str | None) -> None:
        if name is not None:
            reason = BACKENDS[_known(name, "use_backend(name)")].missing()
            if reason is not None:
                raise RuntimeError(f"use_backend(name): {name!r} cannot run here: {reason}")
        self.name = name
        # Nobody can tell yet whether a block follows. Until it does, or the object is used or let go, it is for good
        # in this thread only: other threads must never see a block's name.
        self._setting = _Setting(name)
        _settings[self._setting] = None

    def __enter__(self) -> use_backend:
        if self._setting is not None:
            _settings.pop(self._setting, None)
            self._setting = None
        _blocks.set((*_blocks.get(), self))
        _entered.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Ends this block, also where those within have not ended yet."""
        left = list(_blocks.get())
        if self in left:
            del left[len(left) - 1 - left[::-1].index(self)]
            _blocks.set(tuple(left))
            with contextlib.suppress(ValueError):  # another task, which began in the block, was first
                _entered.remove(self)

    def __del__(self) -> None:
        if self._setting is not None:
            self._setting.thread = None
            for older in list(_settings):
                if older is self._setting:
                    break
                _settings.pop(older, None)


def _block() -> use_backend | None:
    """The innermost block around what this thread does."""
    found = _blocks.get()
    if not found and _entered:
        if torch._C._is_key_in_tls("context"):  # an autograd thread: of the call of backward(), as torch keeps it
            found = torch._C._get_obj_in_tls("context").get(_blocks, ())
        elif torch._C._current_autograd_node() is not None:  # older versions of torch do not tell whose call it is
            found = _entered[-1:] if isinstance(threading.current_thread(), threading._DummyThread) else ()
    return found[-1] if found else None


def _for_good() -> str | None:
    """What the last plain ``use_backend`` asked for that holds in this thread."""
    for setting in reversed(list(_settings)):
        if setting.thread == threading.get_ident():
            setting.thread = None  # an op came, and no block before it
        if setting.thread is None:
            return setting.name
    return None


def _requested(argument: str | None) -> tuple[str | None, str]:
    if argument is not None:
        return argument, "backend"
    block = _block()
    name = block.name if block is not None else _for_good() if _settings else None
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


def _faster(first: Backend, op: str, device: torch.device, dtype: torch.dtype, size: Sequence[int] | None) -> Backend:
    """``first``, or the backend that was measured faster on such a chip at such a size, where that can run."""
    if device.type == "cpu" or not isinstance(first, GpuBackend):
        return first
    other = BACKENDS.get(measured.winner(op, device, dtype, size) or first.name)
    return first if other is None or other.why_not(op, device, dtype) is not None else other


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = None,
    size: Sequence[int] | None = None,
) -> Backend:
    """The backend that runs ``op`` on tensors of this device and dtype.

    Args:
        requested: a backend asked for by name.
        size: of the features, ``(B, C, T, H, W)``, of which a frozen layer's choice asks the channels alone; ``None``
            leaves out what was measured by size.

    Raises:
        ValueError: an unknown name was asked for.
        RuntimeError: the backend asked for cannot run this; the message says why.
    """
    name, source = _requested(requested)
    kept = device.type == "cuda" and isinstance(name, (str, type(None)))
    known = _chosen.get((op, device, dtype, name)) if kept else None
    if known is None:
        known = _choose(op, device, dtype, name, source)
        if kept:
            _chosen[op, device, dtype, name] = known
    return known if name is not None else _faster(known, op, device, dtype, size)


# What was chosen on GPUs, which stay as they are: every op asks, and no kernel starts meanwhile.
_chosen: dict[tuple[str, torch.device, torch.dtype, str | None], Backend] = {}


def _choose(op: str, device: torch.device, dtype: torch.dtype, name: str | None, source: str) -> Backend:
    """:func:`choose` by what every backend says."""
    if name is not None:
        backend = BACKENDS[_known(name, source)]
        reason = backend.why_not(op, device, dtype)
        if reason is not None:
            raise RuntimeError(f"{source}={name!r} cannot run {op} on {device} in {dtype}: {reason}")
        return backend
    for backend in BACKENDS.values():
        if backend.why_not(op, device, dtype) is None:
            return backend
    raise RuntimeError(explain(op, device, dtype))


def explain(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    size: Sequence[int] | None = None,
) -> str:
    """What would run ``op``, and for every other backend the reason why not: a few lines of text.

    On a GPU the last line says what was measured there. ``size`` is that of features, ``(B, C, T, H, W)``.

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
        can = reason is None
        lines.append(f"  {name}: can run ({backend.note(op, device, dtype)})" if can else f"  {name}: no, {reason}")
    try:
        head = f"{op} on {device} in {dtype} runs on {choose(op, device, dtype, size=size).name!r}"
    except RuntimeError as error:
        head = str(error) if _requested(None)[0] else f"no backend can run {op} on {device} in {dtype}"
    if (found := measured.describe(op, device, dtype)) is not None:
        lines.append(f"  faster by size: {found}")
    return "\n".join([head, *lines])
