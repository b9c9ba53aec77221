"""Means over processes: of a loss, and of the gradients of one side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 23  # elements of one message


def average(value: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """``value`` becomes its mean over the processes of ``group``."""
    dist.all_reduce(value, group=group)
    value /= dist.get_world_size(group)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """The gradients of ``parameters`` become their means.

    One that is missing here counts as zero; one that every process lacks stays missing, so no optimizer moves it.
    """
    waiting: dict[torch.dtype, list[Tensor]] = {}
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)

    def send(gradients: list[Tensor]) -> None:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        average(flat, group)
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
