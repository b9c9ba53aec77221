"""Fixtures of tests that run whole ops with Gluon kernels on the stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """A chip of three multiprocessors, with small tiles; returns what launches of Gluon kernels were seen."""
    from dsts_kernels.backends.triton import load
    from dsts_kernels.backends.triton.gluon import plan

    from . import data_gradients, packed, weight_gradients

    launch, tile, spies = load("launch"), packed.SMALL, []
    monkeypatch.setattr(launch, "chip", lambda device: ("sm_90", 3))
    monkeypatch.setattr(plan, "TILES", (tile,))
    monkeypatch.setattr(plan, "WEIGHT_TILES", (weight_gradients.SMALL,))
    monkeypatch.setattr(plan, "STEP_COST", {tile.n: 1.0})
    monkeypatch.setattr(plan, "END_COST", {tile.n: 1.0})

    def descriptor(tensor: torch.Tensor, block: tuple[int, ...]) -> object:  # that the interpreter can read
        return launch.TensorDescriptor(tensor, list(tensor.shape), launch.dense_strides(tensor.shape), list(block))

    monkeypatch.setattr(launch, "descriptor", descriptor)
    monkeypatch.setattr(load("route_and_gather"), "can_ask_first", lambda x: False)  # asks in PTX

    class Spy:
        def __init__(self, file: str, name: str) -> None:
            self.file, self.name = file, name

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            spies.append(packed.OnCpu(packed.kernels(file=self.file)[self.name], len(spies)))
            return spies[-1][grid]

    for file, name in (
        ("conv.py", "conv_gluon_kernel"),
        (data_gradients.FILE, data_gradients.KERNEL),
        (weight_gradients.FILE, weight_gradients.KERNEL),
    ):
        monkeypatch.setattr(load(f"gluon.{file.removesuffix('.py')}"), name, Spy(file, name))
    kept = launch.gluon_runs, plan.wave_grid, load("gluon.weight_gradient").gradient_launch
    for one in kept:
        one.cache_clear()
    yield spies
    for one in kept:
        one.cache_clear()
