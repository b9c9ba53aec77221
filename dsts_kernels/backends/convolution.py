"""The convolutions themselves, on dense panels: oneDNN's or cuDNN's, through torch (the direct path).

A panel holds gathered channels, channels-last: ``(b, T, H, W, c)``. A weight panel is ``(O, taps, c)``. The
1x3x3 and 1x1x1 kernels run as 2-d convolutions over ``b*T`` frames and the 3x1x1 kernel as a 3x1 convolution
over ``(T, H*W)`` images, which is the same memory seen differently: nothing is copied. Weight gradients use
channels-first panels ``(b, c, T, H, W)`` in the wide dtypes, which measure up to three times faster there, and
channels-last ones in half types, whose kernels take no other layout without reordering it.

Large filters are run in blocks: oneDNN loses up to a third of its rate once a filter, or its gradient, falls out
of the cache that the cores share. The sizes below were measured (docs/log/cpu.md). In half types panels are
widened with zeros to whole tiles. A filter that stays is reordered once (:func:`prepare`), which oneDNN else does at
every call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = tuple[int, int, int]
SPATIAL: Kernel = (1, 3, 3)
TEMPORAL: Kernel = (3, 1, 1)
POINT: Kernel = (1, 1, 1)


def taps_of(kernel: Kernel) -> int:
    return kernel[0] * kernel[1] * kernel[2]


FILTER_BLOCK = 2_400_000  # float32 weights of a filter that runs in one piece
# Multiply-adds of a 1x1x1 convolution up to which a product of matrices is faster, for oneDNN takes longer to call.
SMALL_PRODUCT = 1 << 20
GRADIENT_BLOCK = 256  # the fewest input channels a weight gradient is cut into; fewer run at half the rate
TILE_CHANNELS = 32  # of a half type: 64 bytes, a row of an AMX tile and a register of AVX-512


def on_units(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether panels of such a kind are there for the units of a CPU that multiply half types."""
    return dtype.itemsize < 4 and device.type == "cpu"


def filter_blocks(channels: int, weights_a_channel: int, units: bool) -> list[slice]:
    """Output (or input) channels cut so that no filter exceeds :data:`FILTER_BLOCK` weights, or its bytes."""
    return _even_slices(channels, -(-channels * weights_a_channel // (2 * FILTER_BLOCK if units else FILTER_BLOCK)))


def gradient_blocks(channels: int, units: bool) -> list[slice]:
    """Listed channels cut into the pieces a weight gradient runs in: one in half types, whose filters are half."""
    return _even_slices(channels, 1 if units else channels // GRADIENT_BLOCK)


def panel_width(channels: int, units: bool) -> int:
    """Channels of a panel of so many listed ones: whole tiles for such units, the rest being zeros."""
    return -(-channels // TILE_CHANNELS) * TILE_CHANNELS if units else channels


def _even_slices(count: int, pieces: int) -> list[slice]:
    step = -(-count // max(1, pieces))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)] if count else []


def _as_images(panel: Tensor, kernel: Kernel) -> Tensor:
    """``(b, T, H, W, c)`` as channels-last images ``(n, c, h, w)`` for a 2-d convolution."""
    b, t, h, w, c = panel.shape
    if kernel[0] > 1:
        images = panel.view(b, t, h * w, c)
    elif kernel[2] > 1:
        images = panel.view(b * t, h, w, c)
    else:  # many small images cost more than one large one
        images = panel.view(1, b * t * h * w, 1, c)
    return images.permute(0, 3, 1, 2)


def _as_panel(images: Tensor, shape: torch.Size) -> Tensor:
    b, t, h, w = shape[:4]
    return images.permute(0, 2, 3, 1).contiguous().view(b, t, h, w, images.shape[1])


def _filter(weight: Tensor, kernel: Kernel) -> tuple[Tensor, tuple[int, int]]:
    """``(O, taps, c)`` as a channels-last 2-d filter ``(O, c, kh, kw)`` and its padding."""
    kh, kw = (kernel[0], 1) if kernel[0] > 1 else kernel[1:]
    filters = weight.view(weight.shape[0], kh, kw, weight.shape[2]).permute(0, 3, 1, 2)
    return filters, (kh // 2, kw // 2)


class Prepared(NamedTuple):
    """A filter for many calls: an opaque tensor of oneDNN's where it reorders, else one that is channels-last."""

    filters: Tensor
    padding: tuple[int, int]


def prepare(weight: Tensor, panel: Tensor, kernel: Kernel) -> Prepared:
    """``(O, taps, c)`` for :func:`forward` on panels like ``panel``; on others it is still right, and as fast or so."""
    filters, padding = _filter(weight.contiguous(), kernel)
    if reorders(weight.dtype):
        size = list(_as_images(panel, kernel).shape)
        filters = torch.ops.mkldnn._reorder_convolution_weight(filters, list(padding), [1, 1], [1, 1], 1, size)
    return Prepared(filters, padding)


def reorders(dtype: torch.dtype) -> bool:
    """Whether this oneDNN reorders filters of a dtype ahead of calls: it refuses half types that it only emulates."""
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight") or not torch._C._get_mkldnn_enabled():
        return False
    if dtype not in _reorders:
        try:
            filters = torch.zeros(1, 1, 1, 1, dtype=dtype, device="cpu")
            torch.ops.mkldnn._reorder_convolution_weight(filters, [0, 0], [1, 1], [1, 1], 1, [1, 1, 1, 1])
            _reorders[dtype] = True
        except RuntimeError:
            _reorders[dtype] = False
    return _reorders[dtype]


_reorders: dict[torch.dtype, bool] = {}


def small_product(panel: Tensor, others: int, kernel: Kernel) -> bool:
    """Whether a convolution, with ``others`` channels at its other end, is a small product of matrices, on a CPU."""
    return kernel == POINT and panel.is_cpu and panel.numel() * others <= SMALL_PRODUCT


def forward(panel: Tensor, weight: Tensor | Prepared, kernel: Kernel) -> Tensor:
    """``(b, T, H, W, c)`` with ``(O, taps, c)`` to ``(b, T, H, W, O)``, zero padded."""
    if not isinstance(weight, Prepared) and small_product(panel, weight.shape[0], kernel):
        return F.linear(panel, weight[:, 0])
    filters, padding = weight if isinstance(weight, Prepared) else _filter(weight, kernel)
    images = _as_images(panel, kernel)
    if filters.layout == torch._mkldnn:
        convolve = torch.ops.mkldnn._convolution_pointwise
        result = convolve(images, filters, None, list(padding), [1, 1], [1, 1], 1, "none", [], "")
    else:
        result = F.conv2d(images, filters, padding=padding)
    return _as_panel(result, panel.shape)


def data_gradient(grad: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
    """``(b, T, H, W, O)`` with ``(O, taps, c)`` to ``(b, T, H, W, c)``."""
    if small_product(grad, weight.shape[2], kernel):
        return torch.matmul(grad, weight[:, 0])
    filters, padding = _filter(weight, kernel)
    return _as_panel(F.conv_transpose2d(_as_images(grad, kernel), filters, padding=padding), grad.shape)


def weight_gradient(panel: Tensor, grad: Tensor, kernel: Kernel) -> Tensor:
    """``(O, c, *kernel)`` of a panel and a gradient: channels-last for :func:`on_units`, else channels-first."""
    if on_units(panel.dtype, panel.device):
        images, outward = _as_images(panel, kernel), _as_images(grad, kernel)
        kh, kw = (kernel[0], 1) if kernel[0] > 1 else kernel[1:]
        size = (grad.shape[4], panel.shape[4], kh, kw)
        gradient = torch.nn.grad.conv2d_weight(images, size, outward, padding=(kh // 2, kw // 2))
        return gradient.view(*size[:2], *kernel)
    shape = (grad.shape[1], panel.shape[1], *kernel)
    if kernel == TEMPORAL:
        gradient = torch.nn.grad.conv2d_weight(panel.flatten(3), (*shape[:3], 1), grad.flatten(3), padding=(1, 0))
        return gradient.view(shape)
    return torch.nn.grad.conv3d_weight(panel, shape, grad, padding=tuple(k // 2 for k in kernel))
