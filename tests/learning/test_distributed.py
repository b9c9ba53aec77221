"""Two processes with half a batch each take the step that one takes with the whole."""

from __future__ import annotations

import copy
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from dsts_kernels.learning import UpstreamDownstream

from .support import Net, batch, learner, sgd

WORLD, STEPS = 2, 3


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def part(pair: tuple, rank: int) -> tuple:
    """This process's half of a batch, its randomness included."""
    inputs, targets = pair
    own = slice(rank * len(targets) // WORLD, (rank + 1) * len(targets) // WORLD)
    return tuple(field[own] for field in inputs), targets[own]


def run(rank: int, port: int, how: str, net: Net, batches: list, queue) -> None:
    torch.set_num_threads(1)
    net, batches = copy.deepcopy((net, batches))  # tensors come in memory that processes share
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        module = DistributedDataParallel(net)
        results = []
        if how == "spare":  # no process uses it: decay must not move it
            net.spare = torch.nn.Linear(2, 2, dtype=torch.float64)
            module = DistributedDataParallel(net)
            before = net.spare.weight.detach().clone()
            steps = UpstreamDownstream(module, F.cross_entropy, **sgd(module, weight_decay=0.1, momentum=0.9))
            for train, val in batches:
                steps.step(part(train, rank), part(val, rank))
            assert torch.equal(before, net.spare.weight)
            with pytest.raises(ValueError, match="DistributedDataParallel inside Sequential"):
                UpstreamDownstream(torch.nn.Sequential(module), F.cross_entropy, **sgd(module))
        elif how == "joint":  # DDP's own synchronisation: no unused parameters, whatever neurons were chosen
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            for train, _ in batches:
                inputs, targets = part(train, rank)
                optimizer.zero_grad()
                F.cross_entropy(module(*inputs), targets).backward()
                optimizer.step()
        else:
            steps = UpstreamDownstream(module, F.cross_entropy, **sgd(module), second_order=how == "second order")
            results = [tuple(steps.step(part(train, rank), part(val, rank))) for train, val in batches]
            if how == "not finite":
                train, val = batches[0]
                train[0][0][0] = float("inf")  # in the first process's half only
                with pytest.raises(FloatingPointError, match="train_batch"):
                    steps.step(part(train, rank), part(val, rank))
        queue.put((rank, results, [p.detach().numpy() for p in net.parameters()]))
        queue.close()
        queue.join_thread()
        dist.barrier()
        os._exit(0)  # gloo's threads may abort a process that ends while something still refers to its group
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def started(how: str, net: Net, batches: list) -> list:
    """What each process found, in order of ranks."""
    context = torch.multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    workers = [context.Process(target=run, args=(rank, port, how, net, batches, queue)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    found = sorted((queue.get(timeout=120) for _ in workers), key=lambda one: one[0])
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return found


def test_a_parameter_that_nobody_uses_stays():
    """As without DDP: no gradient, so neither decay nor momentum. DDP within another module is refused."""
    started("spare", Net(norm=None), [(batch(4), batch(4)) for _ in range(STEPS)])


@pytest.mark.parametrize("how", ["upstream-downstream", "second order", "joint", "not finite"])
def test_same_global_batch_same_parameters(how):
    net = Net(norm=None)  # BatchNorm's statistics are each process's own, as everywhere under DDP
    alone = copy.deepcopy(net)
    batches = [(batch(6), batch(4)) for _ in range(STEPS)]
    found = started(how, net, batches)
    if how == "joint":
        optimizer = torch.optim.SGD(alone.parameters(), 0.1)
        for train, _ in batches:
            optimizer.zero_grad()
            F.cross_entropy(alone(*train[0]), train[1]).backward()
            optimizer.step()
    else:
        steps = learner(alone, second_order=how == "second order")
        steps.exact_second_order = False
        expected = [steps.step(train, val) for train, val in batches]
        for _, results, _ in found:
            for mine, theirs in zip(results, expected, strict=True):
                torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-6, atol=1e-9)
    (_, _, first), (_, _, second) = found
    for name, a, b, own in zip(dict(alone.named_parameters()), first, second, alone.parameters(), strict=True):
        assert (a == b).all(), name  # processes never drift apart
        torch.testing.assert_close(torch.from_numpy(a), own.detach(), rtol=1e-7, atol=1e-9, msg=name)
