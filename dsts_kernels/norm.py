"""A layer's norm on features that lie channels-last: the same BatchNorm, by kernels of torch's that are faster.

torch chooses a BatchNorm kernel for CUDA by memory format, and looks for four-dimensional channels-last only
(``batch_norm_choose_impl`` in ``aten/src/ATen/native/cuda/Normalization.cu``): features of five dimensions get
general kernels, although their memory is the same. BatchNorm treats all positions of a channel alike, so frames and
rows may be one dimension: ``z.flatten(2, 3)`` is a view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .backends.gpu import switches
from .ops._library import listened

# Of all modules: torch 2.6 has no function that asks for any of them.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def normalize(norm: nn.Module, z: Tensor) -> Tensor:
    """``norm(z)`` of ``z (B, O, T, H, W)``.

    BatchNorm that anybody could watch, or that is more than torch's own, is called as it is: hooks, subclasses,
    :class:`torch.nn.SyncBatchNorm`, and norms that are compiled or traced.
    """
    if takes_flat(norm, z):
        return flat_batch_norm(norm, z)
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_contiguous():
        z = z.contiguous()  # BatchNorm on a CPU reads such a weight wrongly beside channels-last features
    return norm(z)


def takes_flat(norm: nn.Module, z: Tensor) -> bool:
    """Whether torch would miss its channels-last kernels, and nobody would see that ``norm`` was given a view."""
    return misses_fast_kernels(z) and not listened((z,), profiled=False) and is_plain(norm) and lies_flat(z)


def misses_fast_kernels(z: Tensor) -> bool:
    """Whether torch's own kernels normalise ``z``: on CUDA in bfloat16, for cuDNN takes float32 and float16."""
    return z.is_cuda and z.dtype == torch.bfloat16 and switches.current().flat_norm


def is_plain(norm: nn.Module) -> bool:
    """Whether ``norm`` is torch's own BatchNorm without hooks."""
    if type(norm) is not nn.BatchNorm3d or "forward" in vars(norm):
        return False
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return not (hooks or any(GLOBAL_HOOKS))


def lies_flat(z: Tensor) -> bool:
    """Whether ``z (B, O, T, H, W)`` is dense and channels-last, so that its flat view is channels-last too.

    Not a batch of one, whose stride a view would make up: see ``ops.routing_weight.identity``.
    """
    return z.shape[0] > 1 and z.is_contiguous(memory_format=torch.channels_last_3d)


def flat_batch_norm(norm: nn.BatchNorm3d, z: Tensor) -> Tensor:
    """``norm.forward(z)``, computed on ``(B, O, T*H, W)``: outputs, gradients and running statistics are the same.

    The two-dimensional norm has the parameters, buffers and settings of ``norm``, not copies.
    """
    flat = object.__new__(nn.BatchNorm2d)
    object.__setattr__(flat, "__dict__", vars(norm))
    return flat.forward(z.flatten(2, 3)).unflatten(2, z.shape[2:4])
