"""Which algorithm convolves on CPUs, where the caller cares: a block around ops, as ``freeze(algorithm=...)`` for one
frozen module. Left to itself, a backend takes the cheaper one (:meth:`.cpu.CpuBackend.convolution`).
"""

from __future__ import annotations

from contextvars import ContextVar

ALGORITHMS = ("auto", "direct", "winograd")
_blocks: ContextVar[tuple[use_algorithm, ...]] = ContextVar("dsts_kernels.use_algorithm", default=())  # innermost last


class use_algorithm:
    """A block in which convolutions on CPUs run by ``name``: ``"auto"``, ``"direct"`` or ``"winograd"``.

    It holds for gated ones, and for mixing kernels but those of 1x1x1, which are products of matrices by any name; for
    its thread or asyncio task, several of which may share the object; for evaluation and training. A backward pass asks
    again, so call ``backward()`` in the block too. Frozen modules of ``algorithm="auto"`` follow it; others were packed
    for one. On a GPU every convolution is direct.

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

    def __enter__(self) -> use_algorithm:
        _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Ends this block, also where those within have not ended yet."""
        left = list(_blocks.get())
        if self in left:
            del left[len(left) - 1 - left[::-1].index(self)]
            _blocks.set(tuple(left))


def wanted_algorithm() -> str:
    """What the innermost block of this thread asks for."""
    found = _blocks.get()
    return found[-1].name if found else "auto"
