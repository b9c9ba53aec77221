"""Several processes, a part of each batch in every one: means of losses and gradients, lengths of gradients.

``DistributedDataParallel`` holds all parameters in every process; their gradients are averaged here. ``fully_shard``
(FSDP2) leaves a shard of each parameter with every process and averages gradients as it shards them; what lies outside
its groups is whole everywhere, and averaged here too.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..layer import DSTSLayer
from .sharded import is_sharded, local

__all__ = ["average", "average_centers", "average_gradients", "clip", "norm", "process_groups", "recover", "reshard"]

BUCKET = 1 << 23  # elements of one message


def process_groups(module: nn.Module) -> list[dist.ProcessGroup]:
    """Groups whose processes share a batch, one for each dimension of a mesh; none where this process is alone.

    Raises:
        ValueError: a wrapper that is not supported, or where it is not; says what is.
    """
    outermost = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    parts = list(module.modules())
    if any(hasattr(part, "_fsdp_wrapped_module") for part in parts):
        raise ValueError("module: got FullyShardedDataParallel, wanted torch.distributed.fsdp.fully_shard (FSDP2)")
    if any(isinstance(part, DistributedDataParallel) and part is not outermost for part in parts):
        raise ValueError(f"module: got DistributedDataParallel inside {type(module).__name__}, wanted it outermost")
    sharded = {name: p for name, p in module.named_parameters() if is_sharded(p)}
    if isinstance(outermost, DistributedDataParallel):
        if sharded:
            raise ValueError("module: got DistributedDataParallel with sharded parameters, wanted one of them")
        return [outermost.process_group]
    if not sharded:
        return []
    first = next(iter(sharded.values()))
    for name, p in sharded.items():
        # Of two dimensions the first may replicate (HSDP); a second sharding is that of tensor parallelism.
        fits = p.device_mesh.ndim == 1 or (p.device_mesh.ndim == 2 and p.placements[0].is_replicate())
        if not (fits and p.device_mesh == first.device_mesh and any(fully_sharded(module))):
            raise ValueError(
                f"module: got {name} on {p.device_mesh} as {p.placements}, wanted every sharded parameter of "
                "fully_shard over one mesh of data-parallel processes"
            )
    return [first.device_mesh.get_group(dim) for dim in range(first.device_mesh.ndim)]


def fully_sharded(module: nn.Module) -> Iterator[nn.Module]:
    """The modules on which ``fully_shard`` was called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (part for part in module.modules() if fsdp is not None and isinstance(part, fsdp.FSDPModule))


def reshard(module: nn.Module) -> None:
    """Free what ``fully_shard`` gathered and still holds: it is of old parameters, and of old ``requires_grad``."""
    for part in fully_sharded(module):
        part.reshard()


def recover(module: nn.Module) -> None:
    """After an error in a pass, which may have left ``fully_shard`` between two states: every parameter is sharded.

    Where this version of torch has no way back from the middle of a pass, :func:`reshard` does what can be done.
    """
    for part in fully_sharded(module):
        if hasattr(part, "reset_iter_state"):
            with contextlib.suppress(RuntimeError):  # it is no root, which does it for all that it holds
                part.reset_iter_state()
    reshard(module)


@torch.no_grad()
def average_centers(module: nn.Module) -> None:
    """The centres of scores (``score_center``) become their means over the processes that share ``module``'s batches.

    A running mean of means is the mean of running means, so this gives what one process would have of the whole batch,
    where all have gone through the same passes with as many samples. A ``"balance"`` centre takes the mean of the
    processes' steps instead: each counts the choices of its own samples. :class:`UpstreamDownstream` averages so, and
    each training pass of ``DistributedDataParallel`` shares its batch by itself. What is left is a loop with
    ``fully_shard`` and graphs (``dsts.graphed``) inside ``DistributedDataParallel``: once a step, by every process.

    Raises:
        ValueError: a wrapper that is not supported.
    """
    centers = [part.center for part in module.modules() if isinstance(part, DSTSLayer) and part.center is not None]
    groups = process_groups(module)
    if not (centers and groups):
        return
    flat = torch.cat(centers)
    average(flat, groups)
    torch._foreach_copy_(centers, list(flat.split([len(center) for center in centers])))


def average(value: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    """``value`` becomes its mean over the processes of ``groups``."""
    for group in groups:
        dist.all_reduce(value, group=group)
        value /= dist.get_world_size(group)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup]) -> None:
    """The gradients of ``parameters`` become their means; those of sharded ones are already.

    One that is missing here counts as zero; one that every process lacks stays missing, so no optimizer moves it.
    """
    parameters = [p for p in parameters if not is_sharded(p)]
    if not parameters:
        return
    waiting: dict[torch.dtype, list[Tensor]] = {}
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    for group in groups:
        dist.all_reduce(used, dist.ReduceOp.MAX, group=group)

    def send(gradients: list[Tensor]) -> None:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        average(flat, groups)
        start = 0
        for g in gradients:
            g.copy_(flat[start : start + g.numel()].view(g.shape))
            start += g.numel()

    for p, anywhere in zip(parameters, used.tolist(), strict=True):
        if not anywhere:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket = waiting.setdefault(p.grad.dtype, [])
        bucket.append(p.grad)
        if sum(g.numel() for g in bucket) >= BUCKET:
            send(waiting.pop(p.grad.dtype))
    for bucket in waiting.values():
        send(bucket)


@torch.no_grad()
def norm(tensors: Sequence[Tensor]) -> float:
    """Length of ``tensors`` as one vector, the parts of other processes included, in float64."""

    def square(some: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(local(t), dtype=torch.float64).square() for t in some]).sum()

    whole, parts = [t for t in tensors if not is_sharded(t)], [t for t in tensors if is_sharded(t)]
    total = float(square(whole)) if whole else 0.0
    if parts:
        mine = square(parts)
        for dim, placement in enumerate(parts[0].placements):
            if placement.is_shard():
                dist.all_reduce(mine, group=parts[0].device_mesh.get_group(dim))
        total += float(mine)
    return math.sqrt(total)


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """``torch.nn.utils.clip_grad_norm_``, also where some parameters are sharded and others not."""
    if not any(map(is_sharded, parameters)):
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    gradients = [p.grad for p in parameters if p.grad is not None]
    length = norm(gradients)
    if math.isfinite(length) and length + 1e-6 > limit:
        for g in gradients:
            local(g).mul_(limit / (length + 1e-6))
    return length
