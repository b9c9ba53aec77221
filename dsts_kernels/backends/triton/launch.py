"""What launchers share: the chip, the precision of products, and operands as tensor descriptors."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gpu.grids import Box
from . import tuning
from .gluon import plan


@functools.cache
def chip(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessors."""
    if device.type != "cuda":
        return tuning.INTERPRETER, 3
    properties = torch.cuda.get_device_properties(device)
    return tuning.architecture_of((properties.major, properties.minor)), properties.multi_processor_count


@functools.cache
def gluon_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels in Gluon are for this device and dtype, their switch aside."""
    architecture, _ = chip(device)
    return architecture == plan.ARCHITECTURE and plan.unfit(plan.CAPABILITY, dtype) is None


def precision(dtype: torch.dtype) -> str:
    return "ieee" if tuning.kind_of(dtype) == "ieee" else "tf32"


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows of whole 16 bytes, and coordinates that fit."""
    return (tensor.shape[-1] * tensor.element_size()) % 16 == 0 and tensor.data_ptr() % 16 == 0


def dense_strides(shape: torch.Size) -> list[int]:
    """Strides of dense memory. Those that torch gives a side of 1 may be anything, and no descriptor takes that."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def boxed(panel: Tensor, box: Box, columns: int, tma: bool, *, left: bool) -> tuple[object, bool]:
    """A panel ``(B, T, H, W, c)`` as a kernel takes it, and whether that is a tensor descriptor.

    ``left`` says that it is a product's left operand. Triton feeds such an operand to Hopper's ``wgmma`` from registers
    where a descriptor's box is reshaped first, and loads the next block into them while products still read them:
    results change from run to run (seen on an H100 with Triton 3.6). By pointers it is read from shared memory.
    """
    if not (tma and aligned(panel)) or (left and chip(panel.device)[0] == "sm_90"):
        return panel, False
    return TensorDescriptor(panel, list(panel.shape), dense_strides(panel.shape), [1, *box, columns]), True


def described(matrix: Tensor, block: list[int], tma: bool) -> tuple[object, bool]:
    """Likewise for filters."""
    if not (tma and aligned(matrix)):
        return matrix, False
    return TensorDescriptor(matrix, list(matrix.shape), dense_strides(matrix.shape), block), True
