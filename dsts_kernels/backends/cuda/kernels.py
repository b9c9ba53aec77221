"""This backend's launchers, each from the file that has its kernel's name in ``csrc/cuda``: tensors in, tensors out.

What :class:`..gpu.kernels.Kernels` asks for. Each call hands addresses, sizes and strides by name to one launch of
``dsts_kernels._C.cuda`` on the current stream.
"""

from __future__ import annotations

from ..gpu.kernels import launchers

globals().update(launchers(__package__, helpers=("launch",)))
