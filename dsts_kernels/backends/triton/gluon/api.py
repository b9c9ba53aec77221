"""What differs between the versions of Triton that serve, read from its modules; nothing else here depends on one."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

__all__ = ["barrier"]

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a partition's threads; 3.6 has the latter
