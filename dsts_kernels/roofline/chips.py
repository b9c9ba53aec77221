"""GPUs as their vendor describes them, what we estimate about them, and what a launch takes on one.

A launch takes as long as the slowest of four: products on the busiest multiprocessor, bytes of device memory, bytes
that L2 delivers, and trips to memory that wait for one another; plus a tail in which none of these is at work. Products
of the CUDA kernels take the cycles of their compiled loops (:mod:`.loops`), from what is assumed to the unfavourable
end of it; those of Triton's an assumed share of the peak.
"""

from __future__ import annotations

from typing import NamedTuple

from ..backends.gpu.grids import SMEM_KIB
from ..backends.triton.tuning import Tile


class Chip(NamedTuple):
    """Peaks as published; estimates are named where the chips are."""

    title: str
    capability: int  # times ten
    half: float  # TFLOP/s, dense, on tensor cores; fields are named as kinds of products are
    tf32: float
    ieee: float  # TFLOP/s of float32 multiply-adds
    bandwidth: float  # GB/s of device memory
    processors: int
    l2: float  # MB
    l2_bandwidth: float  # GB/s
    matrix: int  # half multiply-adds a cycle of a multiprocessor
    threads: int = 2048  # that a multiprocessor holds

    @property
    def architecture(self) -> str:
        """Whose tiles it runs."""
        return f"sm_{self.capability}"

    @property
    def smem(self) -> int:
        """KiB of shared memory of a multiprocessor."""
        return SMEM_KIB[self.capability]

    @property
    def clock(self) -> float:
        """Cycles a microsecond, at which the peak holds."""
        return self.half * 1e6 / (2 * self.matrix * self.processors)


CHIPS = {
    # V100 data sheet (SXM2) and whitepaper; L2: 2048 bytes a clock (as the A100 whitepaper compares), boost 1.53 GHz.
    # 8 tensor cores of 64 multiply-adds. It has no tf32.
    "v100": Chip("V100 SXM2", 70, 125.0, 15.7, 15.7, 900.0, 80, 6.0, 2048 * 1.53, 512),
    # T4 data sheet and Turing whitepaper: as many multiply-adds, half the threads. Estimate: L2 of 1024 bytes a clock
    # at 1.59 GHz. 70 W may not hold that clock.
    "t4": Chip("T4", 75, 65.0, 8.1, 8.1, 320.0, 40, 4.0, 1024 * 1.59, 512, 1024),
    # A100 data sheet (SXM4, 80 GB) and whitepaper; L2: 5120 bytes a clock, boost 1.41 GHz
    "a100": Chip("A100 SXM4", 80, 312.0, 156.0, 19.5, 2039.0, 108, 40.0, 5120 * 1.41, 1024),
    # H100 data sheet (SXM5; half of its sparse figures) and whitepaper; L2: estimate, A100's width at 1.755 GHz
    "h100": Chip("H100 SXM5", 90, 989.4, 494.7, 66.9, 3350.0, 132, 50.0, 5120 * 1.755, 2048),
    # H200 data sheet (SXM): the same processor with other memory, so the rest is the H100's
    "h200": Chip("H200 SXM", 90, 989.4, 494.7, 66.9, 4800.0, 132, 50.0, 5120 * 1.755, 2048),
}
BACKENDS = ("triton", "cuda")


def backend_on(chip: Chip, wanted: str | None = None) -> str:
    """Triton needs compute capability 8.0; before it there are the CUDA kernels only."""
    return "cuda" if chip.capability < 80 else wanted or "triton"


# Estimates from here on. Others measured 798 TFLOP/s in a large bf16 product on an H100 (0.81 of its peak), and 229
# (bf16) to 273 (fp16) on an A100 (0.73 to 0.87; triton-lang/triton#743).
SUSTAINED = 0.8  # of a peak rate of products, by Triton's kernels
COPIED = 0.9  # of the bandwidth of device memory and of L2
START_US = 1.5  # of an empty kernel
GAP_US = 1.0  # between kernels of a stream, or of a CUDA graph
HOST_US, HOST_TORCH_US = 15.0, 5.0  # of the host, to launch one of our kernels, or of torch's, without a graph
DRAM_US, L2_US = 0.7, 0.3  # of one trip to memory that nothing hides


class Launch(NamedTuple):
    """What one launch does; bytes are those of its tensors that it touches."""

    kernel: str
    num_ctas: int  # 0 of torch's kernels
    dram: float
    l2: float
    flop: float = 0.0  # useful, in matrix products
    busiest: float = 0.0  # FLOP of the busiest multiprocessor: padding, whole K blocks and waves included
    waves: float = 0.0
    tile: Tile | None = None
    cycles: float = 0.0  # of the busiest multiprocessor in its main loops, where they are modelled
    worst: float = 0.0  # the same with everything assumed unfavourable
    chain: float = 0.0  # microseconds of dependent trips, while bandwidth is in use
    tail: float = START_US  # microseconds that overlap with nothing
    count: int = 1  # kernels of torch's that it stands for


class Prediction(NamedTuple):
    us: float
    bound: str
    parts: dict[str, float]  # microseconds of each bound alone
    worst: float  # microseconds, with everything that the cycle model assumes unfavourable


def product_rate(kind: str, chip: Chip) -> float:
    """FLOP a microsecond that a large product sustains."""
    return SUSTAINED * getattr(chip, kind) * 1e6


def alone(launch: Launch, kind: str, chip: Chip) -> float:
    """Microseconds of its useful products: at the peak where its loops are modelled, else at what products sustain."""
    return launch.flop / (getattr(chip, kind) * 1e6 if launch.cycles else product_rate(kind, chip))


def predict(launch: Launch, kind: str, chip: Chip) -> Prediction:
    parts = {
        "compute": launch.busiest * chip.processors / product_rate(kind, chip),
        "DRAM": launch.dram / (COPIED * chip.bandwidth * 1e3),
        "L2": launch.l2 / (COPIED * chip.l2_bandwidth * 1e3),
        "latency": launch.chain,
    }
    if launch.cycles:
        parts["compute"] = launch.cycles / chip.clock
    slowest = max(parts, key=lambda bound: parts[bound])
    us = parts[slowest] + launch.tail
    bound = "latency" if launch.tail > parts[slowest] else slowest
    worst = max(parts[slowest], launch.worst / chip.clock) + launch.tail
    return Prediction(us, bound, parts | {"latency": launch.chain + launch.tail}, worst)
