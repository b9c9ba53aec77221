"""Tensors that lie in parts on several processes, as ``torch.distributed.fsdp.fully_shard`` lays parameters."""

from __future__ import annotations

import sys

from torch import Tensor

__all__ = ["is_sharded", "local", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``; where nothing has imported those (which takes a while) there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor
