"""This backend's launchers, each from beside its kernel, as :class:`dsts_kernels.backends.gpu.Kernels` wants them."""

from __future__ import annotations

from .conv import conv, conv_grid
from .data_gradient import data_gradient
from .filters import pack_filters, unpack_filters
from .gather_panel import gather_panel
from .lists import group_samples, list_channels
from .route import route_and_gather
from .semhash import semhash_gate, semhash_gate_backward
from .tap_sums import partial_tap_sums
from .weight_gradient import weight_gradient

__all__ = [
    "conv",
    "conv_grid",
    "data_gradient",
    "gather_panel",
    "group_samples",
    "list_channels",
    "pack_filters",
    "partial_tap_sums",
    "route_and_gather",
    "semhash_gate",
    "semhash_gate_backward",
    "unpack_filters",
    "weight_gradient",
]
