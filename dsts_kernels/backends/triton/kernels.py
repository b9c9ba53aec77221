"""This backend's launchers, each from beside its kernel, as :class:`dsts_kernels.backends.gpu.Kernels` wants them."""

from __future__ import annotations

from ..gpu.kernels import launchers
from . import HELPERS

globals().update(launchers(__package__, HELPERS))
