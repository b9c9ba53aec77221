"""Several processes under torchrun: ``DistributedDataParallel`` or FSDP2's ``fully_shard``, jointly or by sides.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --wrap fsdp --learning upstream-downstream
    torchrun --nproc-per-node 8 examples/distributed.py --wrap fsdp --device cuda

DDP holds all weights in every process, FSDP2 a part of each; either way a step is that of the whole batch. Processes
talk over gloo on a CPU and over NCCL on GPUs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, upstream_parameters
from examples.small import parser, report, small_model, stripes


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for layer in model.dsts.layers:  # a layer's weights are gathered when it runs, and let go
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, options) -> list[float]:
    """This process's losses; optimizers are made of wrapped parameters, so of the parts that lie here."""
    upstream = torch.optim.AdamW(upstream_parameters(model), options.rate / 4, weight_decay=0.0)
    downstream = torch.optim.AdamW(downstream_parameters(model), options.rate)
    learner = UpstreamDownstream(
        model, F.cross_entropy, upstream_optimizer=upstream, downstream_optimizer=downstream, clip_norm=5.0
    )
    losses = []
    for _ in range(options.steps):
        clips, labels = stripes(16, options.device)
        if options.learning == "upstream-downstream":
            losses.append(learner.step((clips, labels), stripes(8, options.device)).train_loss)
            continue
        loss = F.cross_entropy(model(clips), labels)
        loss.backward()  # averages gradients over the processes
        for optimizer in (upstream, downstream):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    this = parser(__doc__, steps=40)
    this.add_argument("--wrap", choices=("ddp", "fsdp"), default="ddp")
    this.add_argument("--learning", choices=("joint", "upstream-downstream"), default="joint")
    options = this.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        this.error("LOCAL_RANK: is not set, wanted: torchrun --nproc-per-node 2 examples/distributed.py")
    if options.device.type == "cuda":
        options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(options.device)
    dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    try:
        torch.manual_seed(options.seed)  # the same weights everywhere
        model = wrap(small_model().to(options.device), options.wrap)
        torch.manual_seed(options.seed + 1 + dist.get_rank())  # clips and noise of its own in every process
        losses = train(model, options)
        return report(losses) if dist.get_rank() == 0 else losses
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
