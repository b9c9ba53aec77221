"""What processes run in ``test_centers``: each brings its part of a batch, the whole of which one module gets too."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dsts_kernels.learning import average_centers

from .sharded_jobs import part
from .support import Net, batch, learner


def net(**options: object) -> Net:
    """The same in every process."""
    torch.manual_seed(3)
    return Net(norm=None, score_reduction="mean", **options)


def centers(module: Net) -> list[Tensor]:
    return [t for layer in module.dsts.layers for t in (layer.center, layer.center_batches)]


def compare(module: Net, alone: Net) -> None:
    """The buffers of the whole batch; the very same bits in each process."""
    for mine, theirs in zip(centers(module), centers(alone), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(one, everyone[0]) for one in everyone)
    assert all(layer.center.count_nonzero() for layer in module.dsts.layers)


def batches(count: int = 4) -> list:
    """Batches of six, of which the first process gets two samples and the second four where they are not halved."""
    torch.manual_seed(11)
    return [(batch(6), batch(4)) for _ in range(count)]


def uneven(pair: tuple) -> tuple:
    inputs, targets = pair
    own = slice(0, 2) if dist.get_rank() == 0 else slice(2, 6)
    return tuple(field[own] for field in inputs), targets[own]


def joint(options: dict, compiled: bool) -> None:
    """A plain loop: its own passes reduce, of parts of different sizes too; DDP's broadcast changes nothing."""
    module = net(**options)
    alone = copy.deepcopy(module)
    run = DistributedDataParallel(torch.compile(module, backend="aot_eager") if compiled else module)
    for train, _ in batches():
        alone(*train[0])
        run(*uneven(train)[0]).sum().backward()
        compare(module, alone)
    module.eval()
    if dist.get_rank() == 0:  # evaluation asks nobody
        module(*batches(1)[0][0][0])


def algorithm_1(options: dict, sharded: bool) -> None:
    """Line 8 of every step moves the centre on, by the whole batch; what lines 4 and 6 did is taken back."""
    module = net(**options)
    alone = copy.deepcopy(module)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in module.dsts.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(module, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(module)
    steps, expected = learner(wrapped), learner(alone)
    for train, val in batches(3):
        expected.step(train, val)
        steps.step(part(train), part(val))
        compare(module, alone)
    assert alone.dsts.layers[0].center_batches == 3


def sharded_loop() -> None:
    """A plain loop over ``fully_shard`` averages once a step."""
    module = net(score_center=True)
    alone = copy.deepcopy(module)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wrapped = fully_shard(module, mesh=mesh)
    for train, _ in batches():
        inputs, targets = part(train)
        alone(*train[0])
        F.cross_entropy(wrapped(*inputs), targets).backward()
        average_centers(wrapped)
        compare(module, alone)
