"""Which algorithm convolves on CPUs, where the caller cares: a block around ops, as ``freeze(algorithm=...)`` for one
frozen module. Left to itself, a backend takes the cheaper one (:meth:`.cpu.CpuBackend.convolution`).
"""

from __future__ import annotations

from contextvars import ContextVar

ALGORITHMS = ("auto", "direct", "winograd")
_wanted: ContextVar[str] = ContextVar("dsts_kernels.use_algorithm", default="auto")


class use_algorithm:
    """A block in which convolutions on CPUs run by ``name``: ``"auto"``, ``"direct"`` or ``"winograd"``.

    It holds for gated ones, and for mixing kernels but those of 1x1x1, which are products of matrices by any name; for
    its thread or asyncio task; for evaluation and training. A backward pass asks again, so call ``backward()`` in the
    block too. Frozen modules of ``algorithm="auto"`` follow it; others were packed for one. On a GPU every convolution
    is direct.

    >>> with dsts_kernels.backends.use_algorithm("direct"):
    ...     z = dsts_kernels.functional.gated_conv3d(x, gate, neuron, spatial, temporal)

    Raises:
        ValueError: no algorithm has that name.
        RuntimeError: from an op in the block: ``"winograd"`` for float64 on the CPU backend, which has none.
    """

    def __init__(self, name: str) -> None:
        if name not in ALGORITHMS:
            raise ValueError(f"use_algorithm(name): got {name!r}, wanted {' or '.join(map(repr, ALGORITHMS))}")
        self.name = name
        self._before: list[str] = []

    def __enter__(self) -> use_algorithm:
        self._before.append(_wanted.get())
        _wanted.set(self.name)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _wanted.set(self._before.pop())


def wanted_algorithm() -> str:
    """What the innermost block of this thread asks for."""
    return _wanted.get()
