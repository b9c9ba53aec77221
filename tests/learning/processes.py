"""Processes that take part in one group over gloo and run what they are told, so that many tests start them once."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def serve(rank: int, world: int, port: int, jobs, results) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    while (job := jobs.get()) is not None:
        function, arguments = job
        try:
            results.put((rank, None, function(*arguments)))
        except BaseException:
            results.put((rank, traceback.format_exc(), None))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while something still refers to its group


class Processes:
    """``world`` processes, started when first needed and anew after a failure."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.workers: list = []

    def start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        port, self.results = free_port(), context.Queue()
        self.jobs = [context.Queue() for _ in range(self.world)]
        self.workers = [
            context.Process(target=serve, args=(rank, self.world, port, self.jobs[rank], self.results), daemon=True)
            for rank in range(self.world)
        ]
        for worker in self.workers:
            worker.start()

    def run(self, function: Callable, *arguments: object) -> list:
        """What ``function(*arguments)`` returns in each process, by rank; the first error of any is raised."""
        if not self.workers:
            self.start()
        for queue in self.jobs:
            queue.put((function, arguments))
        found = {}
        for _ in range(self.world):
            rank, error, result = self.results.get(timeout=300)
            if error is not None:
                self.kill()  # the others may wait for it for ever
                raise AssertionError(f"process {rank}:\n{error}")
            found[rank] = result
        return [found[rank] for rank in range(self.world)]

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.workers = []

    def stop(self) -> None:
        if not self.workers:
            return
        for queue in self.jobs:
            queue.put(None)
        for worker in self.workers:
            worker.join(60)
        self.kill()
