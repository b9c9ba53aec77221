"""The convolutions themselves, on dense panels: oneDNN's or cuDNN's, through torch (the direct path).

A panel holds gathered channels, channels-last: ``(b, T, H, W, c)``. A weight panel is ``(O, taps, c)``. The
1x3x3 and 1x1x1 kernels run as 2-d convolutions over ``b*T`` frames and the 3x1x1 kernel as a 3x1 convolution
over ``(T, H*W)`` images, which is the same memory seen differently: nothing is copied. Weight gradients use
channels-first panels ``(b, c, T, H, W)``, which measure up to three times faster there.

Large filters are run in blocks: oneDNN loses up to a third of its rate once a filter, or its gradient, falls out
of the cache that the cores share. The sizes below were measured (docs/performance.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = tuple[int, int, int]
SPATIAL: Kernel = (1, 3, 3)
TEMPORAL: Kernel = (3, 1, 1)
POINT: Kernel = (1, 1, 1)

FILTER_BLOCK = 2_400_000  # weights of a filter that runs in one piece
# Multiply-adds of a 1x1x1 convolution up to which a product of matrices is faster, for oneDNN takes longer to call.
SMALL_PRODUCT = 1 << 20
GRADIENT_BLOCK = 256  # the fewest input channels a weight gradient is cut into; fewer run at half the rate


def filter_blocks(channels: int, weights_a_channel: int) -> list[slice]:
    """Output (or input) channels cut so that no filter exceeds :data:`FILTER_BLOCK` weights."""
    return _even_slices(channels, -(-channels * weights_a_channel // FILTER_BLOCK))


def gradient_blocks(channels: int) -> list[slice]:
    """Listed channels cut into the pieces a weight gradient runs in."""
    return _even_slices(channels, channels // GRADIENT_BLOCK)


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


def small_product(panel: Tensor, others: int, kernel: Kernel) -> bool:
    """Whether a convolution, with ``others`` channels at its other end, is a small product of matrices, on a CPU."""
    return kernel == POINT and panel.is_cpu and panel.numel() * others <= SMALL_PRODUCT


def forward(panel: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
    """``(b, T, H, W, c)`` with ``(O, taps, c)`` to ``(b, T, H, W, O)``, zero padded."""
    if small_product(panel, weight.shape[0], kernel):
        return F.linear(panel, weight[:, 0])
    filters, padding = _filter(weight, kernel)
    return _as_panel(F.conv2d(_as_images(panel, kernel), filters, padding=padding), panel.shape)


def data_gradient(grad: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
    """``(b, T, H, W, O)`` with ``(O, taps, c)`` to ``(b, T, H, W, c)``."""
    if small_product(grad, weight.shape[2], kernel):
        return torch.matmul(grad, weight[:, 0])
    filters, padding = _filter(weight, kernel)
    return _as_panel(F.conv_transpose2d(_as_images(grad, kernel), filters, padding=padding), grad.shape)


def weight_gradient(panel: Tensor, grad: Tensor, kernel: Kernel) -> Tensor:
    """``(b, c, T, H, W)`` and ``(b, O, T, H, W)`` to ``(O, c, *kernel)``."""
    shape = (grad.shape[1], panel.shape[1], *kernel)
    if kernel == TEMPORAL:
        gradient = torch.nn.grad.conv2d_weight(panel.flatten(3), (*shape[:3], 1), grad.flatten(3), padding=(1, 0))
        return gradient.view(shape)
    return torch.nn.grad.conv3d_weight(panel, shape, grad, padding=tuple(k // 2 for k in kernel))
