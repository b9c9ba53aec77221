"""What the rows of the GPU benchmark share: weights in two precisions, features that rotate, draws, oracles.

Weights are made once in half precision, bfloat16 or on a GPU before Ampere float16; the literal module under autocast
and the oracle hold the same values in float32.
Features are one pool of samples a shape, laid channels-last and cut into inputs of any batch size, so that a batch
of one also changes its neurons from step to step. Those samples that are compared have no nearly tied scores.
"""

from __future__ import annotations

import contextlib
import copy
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.features import make_features
from benchmarks.gpu.timing import rotation_count
from benchmarks.margins import separate_draws, separate_features
from benchmarks.parity import Oracle, evaluation_oracle, smooth, training_oracle
from benchmarks.shapes import NAMED_SHAPES, Problem
from benchmarks.variants import build, make_draws, make_reference
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import GpuBackend
from dsts_kernels.reference import DSTS, Draws, Routing
from dsts_kernels.testing import exact_float32

__all__ = ["BATCHES", "GPU_BACKENDS", "TRAINING_BATCH", "Workload", "gpu_backends", "half_precision"]

BATCHES = (1, 8, 32)
TRAINING_BATCH = 8
ORACLE_CHUNK = 8
SEPARATION_ROUNDS = 4
GPU_BACKENDS = tuple(name for name, backend in BACKENDS.items() if isinstance(backend, GpuBackend))


def half_precision(device: torch.device) -> torch.dtype:
    """bfloat16; float16 on a GPU whose tensor cores have no other, before compute capability 8.0."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def gpu_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Every GPU backend by name: why it cannot run ``dtype`` there, ``None`` where it can."""
    return {name: BACKENDS[name].why_not("frozen_layer", device, dtype) for name in GPU_BACKENDS}


def plain(x: Tensor) -> Tensor:
    """Channels first, where cuDNN has the most float32 kernels: the oracle runs there."""
    return x.contiguous()


class Workload:
    """Made on first use; ``channels`` and ``grids`` are smaller only in tests."""

    def __init__(
        self,
        device: torch.device,
        l2_bytes: int,
        channels: int = 1024,
        grids: dict[str, tuple[int, int, int]] = NAMED_SHAPES,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = half_precision(device) if dtype is None else dtype
        self.device, self.l2_bytes, self.channels, self.grids = device, l2_bytes, channels, grids
        self.features_text = "none"
        self.made: dict[tuple, object] = {}

    def problem(self, shape: str, batch: int) -> Problem:
        return Problem(shape, self.grids[shape], batch=batch, channels=self.channels)

    @cached_property
    def half(self) -> DSTS:
        """The literal module in half precision: the weights of every row."""
        return make_reference(self.problem(next(iter(self.grids)), 1), self.dtype, self.device)

    @cached_property
    def single(self) -> DSTS:
        """The same values in float32: what autocast and the oracle run on."""
        return copy.deepcopy(self.half).float()

    def once(self, key: tuple, make):
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def routing(self, x: Tensor) -> Routing:
        """The oracle's routing in evaluation, a few samples at a time."""
        module = self.single.eval()
        with torch.no_grad(), exact_float32():
            parts = [module(plain(part).float(), return_routing=True)[1] for part in x.split(ORACLE_CHUNK)]
        return Routing(*(torch.cat(field, dim=1) for field in zip(*parts, strict=True)))

    def rotation(self, shape: str, batch: int) -> int:
        """Inputs of this batch size that together exceed twice the L2 cache."""
        elements = torch.Size(self.problem(shape, batch).feature_shape).numel()
        return rotation_count(elements * self.dtype.itemsize, self.l2_bytes)

    def pool(self, shape: str) -> Tensor:
        """All samples of a shape, ``(samples, C, T, H, W)``."""

        def make() -> Tensor:
            samples = max(batch * self.rotation(shape, batch) for batch in BATCHES)
            x, self.features_text = make_features(self.problem(shape, samples).feature_shape)
            x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last_3d)
            compared = max(BATCHES)
            x[:compared] = separate_features(self.routing, x[:compared])
            return x

        return self.once(("pool", shape), make)

    def inputs(self, shape: str, batch: int) -> list[Tensor]:
        """Inputs that take turns; the first is compared with the oracle."""
        return list(self.pool(shape)[: batch * self.rotation(shape, batch)].split(batch))

    def evaluation_output(self, shape: str, batch: int) -> Tensor:
        """What the oracle gives for the first input, in float32: samples do not depend on their batch."""

        def make() -> Tensor:
            chunks = self.pool(shape)[: max(BATCHES)].split(ORACLE_CHUNK)
            with exact_float32():
                return torch.cat([evaluation_oracle(self.single, plain(x)).output for x in chunks])

        return self.once(("evaluation", shape), make)[:batch]

    def output_gradient(self, shape: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = self.problem(shape, TRAINING_BATCH).feature_shape
        # Of mean 1: a score's gradient is one sum over all features, and a sum that cancels is all rounding.
        grad = (torch.randn(size, generator=generator) + 1).to(self.device, self.dtype)
        return grad.contiguous(memory_format=torch.channels_last_3d)

    def literal(self, shape: str) -> DSTS:
        return build("literal", "training", self.problem(shape, TRAINING_BATCH), self.single)

    def draws(self, shape: str) -> Draws:
        """Draws that leave no scores nearly tied, with BatchNorm on its running and on the batch's statistics.

        Gradients are compared under the first, outputs under the second (see :mod:`benchmarks.parity`).
        """

        def make() -> Draws:
            draws = make_draws(self.problem(shape, TRAINING_BATCH), self.device, self.dtype)
            # A module in half precision rounds noise to its own dtype, and a hard gate near zero would fall otherwise.
            draws = draws._replace(noise=draws.noise.to(self.dtype).float())
            module, x = self.literal(shape), plain(self.inputs(shape, TRAINING_BATCH)[0]).float()

            def route(draws: Draws, block=contextlib.nullcontext) -> Routing:
                with torch.no_grad(), exact_float32(), block():
                    return module(x, draws=draws, return_routing=True)[1]

            for _ in range(SEPARATION_ROUNDS):
                before = draws
                draws = separate_draws(lambda d: route(d, lambda: smooth(module)), draws)
                draws = separate_draws(route, draws)
                if draws is before:
                    break
            return draws

        return self.once(("draws", shape), make)

    def training_oracle(self, shape: str) -> Oracle:
        def make() -> Oracle:
            x = plain(self.inputs(shape, TRAINING_BATCH)[0])
            with exact_float32():
                return training_oracle(self.literal(shape), x, self.draws(shape), self.output_gradient(shape))

        return self.once(("training", shape), make)

    def drop(self, module: nn.Module | None = None) -> None:
        """Gives memory of finished rows back to the device."""
        if module is not None:
            module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
