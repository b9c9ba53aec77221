"""What the processes of a group run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dsts_kernels import FusedDSTS, insert_dsts
from dsts_kernels.testing import assert_close

from .models import CLIP, OPTIONS, Clips


def data_parallel() -> list[torch.Tensor]:
    """Gradients under DDP are the mean of each process's own, DSTS's among them; refuses DSTS that comes too late."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Clips()
    insert_dsts(model, "stage1", example=CLIP, **OPTIONS)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(rank)
    x = torch.randn(CLIP)

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(100 + rank)  # the draws of DSTS
        ddp.zero_grad()
        ddp(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with ddp.no_sync():
        own = gradients()
    together = gradients()
    for name, grad in own.items():
        dist.all_reduce(grad)
        assert_close(together[name], grad / world, name=name, factor=100)
    assert any("dsts" in name and grad.norm() > 0 for name, grad in together.items())
    try:
        insert_dsts(ddp, "module.stage2", layout="BCTHW", channels=6, **OPTIONS)
    except ValueError as error:
        assert "model: got DistributedDataParallel at '', wanted the model before it is wrapped" in str(error)
    else:
        raise AssertionError("DSTS was put in, unknown to DistributedDataParallel")
    assert sum(isinstance(m, FusedDSTS) for m in ddp.modules()) == 1
    return list(together.values())


def sharded() -> None:
    """A model that ``fully_shard`` took is refused; DSTS that was there before trains as part of it."""
    from torch.distributed.fsdp import fully_shard

    model = Clips()
    insert_dsts(model, "stage1", example=CLIP, **OPTIONS)
    fully_shard(model)
    model(torch.randn(CLIP)).square().sum().backward()
    assert model.stage1[1].dsts.layers[0].gate.grad.full_tensor().norm() > 0
    try:
        insert_dsts(model, "stage2", layout="BCTHW", channels=6, **OPTIONS)
    except ValueError as error:
        assert "model: got FSDPClips at '', wanted the model before it is wrapped" in str(error)
    else:
        raise AssertionError("DSTS was put in, unknown to fully_shard")
