"""What an aarch64 CPU would run for one frozen layer, counted under QEMU: no time, which an emulator does not know.

Build ``qemu_count.c`` as its head says. Then run this twice for each backend, with an aarch64 Python that has torch and
this package, under QEMU's user mode. The difference of two numbers of calls leaves out what starting costs::

    qemu-aarch64 -cpu neoverse-n1 -L ROOT -plugin ./qemu_count.so ROOT/usr/bin/python3 -m benchmarks.cpu.qemu cpu 1
    qemu-aarch64 -cpu neoverse-n1 -L ROOT -plugin ./qemu_count.so ROOT/usr/bin/python3 -m benchmarks.cpu.qemu cpu 3
"""

from __future__ import annotations

import argparse

import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import use_backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.qemu", description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("cpu", "eager"), help="eager: the library's direct convolution")
    parser.add_argument("calls", type=int, help="of the layer")
    parser.add_argument("--size", type=int, nargs=4, default=(256, 8, 14, 14), metavar=("C", "T", "H", "W"))
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = FusedDSTS(given.size[0], num_layers=1, num_neurons=2).eval().freeze()
    x = torch.randn(1, *given.size)
    with torch.no_grad(), use_backend(given.backend):
        for _ in range(given.calls):
            layer(x)


if __name__ == "__main__":
    main()
