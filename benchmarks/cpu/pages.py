"""What fresh pages of gradients cost a training step: memory used again beside memory from the system, in turns.

``python -m benchmarks.cpu.pages`` prints processor time, time in the system and page faults of a step of one layer.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch

from benchmarks.report.machine import describe
from dsts_kernels import FusedDSTS
from dsts_kernels.backends import memory
from dsts_kernels.routing import sample_draws

NEURONS = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.pages", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 16), metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in describe(torch.device("cpu")).items() if value))
    torch.manual_seed(0)
    dsts = FusedDSTS(options.channels, num_layers=1, num_neurons=NEURONS)
    x = torch.randn(options.batch, options.channels, *options.grid)
    grad, draws = torch.randn_like(x), sample_draws(options.batch, options.channels, NEURONS, 1)

    def step(again: bool) -> None:
        memory.KEEPS_MAPS = again
        dsts.zero_grad(set_to_none=True)
        dsts(x.detach().requires_grad_(), draws=draws).backward(grad)

    seen: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for turn in range(options.turns + 1):
        for again, found in seen.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
            step(again)
            spent, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF)
            if turn:
                system = after.ru_stime - before.ru_stime
                found.append((1e3 * spent, 1e3 * system, after.ru_minflt - before.ru_minflt))
    print("| memory of gradients | ms of a processor | in the system | page faults |")
    print("| --- | ---: | ---: | ---: |")
    for again, found in seen.items():
        ms, system, faults = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {'used again' if again else 'fresh'} | {ms:.0f} | {system:.0f} | {faults:.0f} |")


if __name__ == "__main__":
    main()
