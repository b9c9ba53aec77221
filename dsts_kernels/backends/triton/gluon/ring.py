"""A ring of stages in shared memory between a producer warp and consumers that multiply: what the kernels here share.

A stage holds a K block of both operands. Two barriers a stage: ``ready`` completes a phase when both boxes have landed,
``free`` when the product that read them is done. Step ``n`` of a CTA has stage ``n % STAGES``, phase ``n // STAGES``;
both sides count steps alike, through all tiles.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import launch


@gluon.jit
def open_ring(left, right, STAGES: gl.constexpr):
    """Shared memory for ``STAGES`` boxes of both descriptors, and the barriers ``ready`` and ``free``."""
    gl.static_assert(STAGES >= 2, "a stage is free one step after its own")
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES] + left.block_type.shape, left.layout)  # noqa: RUF005
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES] + right.block_type.shape, right.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()  # copies arrive at barriers by another way than threads that set them up
    return left_ring, right_ring, ready, free


@gluon.jit
def bring(
    left,  # descriptor of [1, *BOX, BK]
    left_corner,
    right,  # descriptor of BN rows of BK
    right_corner,
    left_ring,  # [STAGES, 1, *BOX, BK] shared
    right_ring,  # [STAGES, ..., BN, BK] shared
    ready,  # [STAGES] barriers
    free,  # [STAGES] barriers
    step,
    BYTES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer's part of a step: two boxes of ``BYTES`` in all, as soon as their stage is free."""
    stage = step % STAGES
    mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
    mbarrier.expect(ready.index(stage), BYTES)
    tma.async_copy_global_to_shared(left, left_corner, ready.index(stage), left_ring.index(stage))
    tma.async_copy_global_to_shared(right, right_corner, ready.index(stage), right_ring.index(stage))


@gluon.jit
def multiply(
    left_ring,
    right_ring,
    ready,
    free,
    step,
    steps,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    ACROSS: gl.constexpr = False,
):
    """The consumers' part of ``steps`` steps from ``step`` on: their products' sum ``[BM, BN]``, and the next step.

    Stages are ``[BM, BK]`` and ``[BN, BK]``, or ``ACROSS`` ``[BK, BM]`` and ``[BK, BN]``.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    running = warpgroup_mma_init(gl.zeros([BM, BN], gl.float32, layout))
    for k in range(0, steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        if ACROSS:
            left = left_ring.index(stage).reshape([BK, BM]).permute((1, 0))
            right = right_ring.index(stage).reshape([BK, BN])
        else:
            left = left_ring.index(stage).reshape([BM, BK])
            right = right_ring.index(stage).reshape([BN, BK]).permute((1, 0))
        running = warpgroup_mma(left, right, running, is_async=True)
        running = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=[running]))
        if k > 0:  # all but this step's product are done: the stage of the one before is free
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
        step += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[running])
    if steps > 0:
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
    return acc, step


@functools.cache
def swizzled(rank: int) -> gl.NVMMASharedLayout:
    """Of a box with ``rank`` sides in half types, whose rows of 128 bytes lie as ``wgmma`` reads them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def box_of(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Dense ``tensor`` for TMA boxes of ``block``."""
    if not tensor.is_cuda:
        return _box_of(tensor, tensor.shape, block)
    return box_at(tensor.data_ptr(), tensor.dtype, tensor.shape, block)


def _box_of(base: Tensor | launch.Address, shape: torch.Size, block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(base, list(shape), launch.dense_strides(shape), list(block), swizzled(len(block)))


@functools.lru_cache(maxsize=1024)  # as of :func:`..launch.descriptor`
def box_at(address: int, dtype: torch.dtype, shape: torch.Size, block: tuple[int, ...]) -> TensorDescriptor:
    """:func:`box_of` memory at an address."""
    return _box_of(launch.Address(address, dtype), shape, block)
