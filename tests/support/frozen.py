"""Frozen modules for tests of their states: with lively gates, alone and in a model; one process that is a group."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dsts_kernels import FrozenDSTS, FusedDSTS
from dsts_kernels.frozen_state import EXTRA
from dsts_kernels.testing import assert_close

from .modules import pair

FILES = Path(__file__).parents[1] / "files"  # written by version 0.1, two layers, gates with strides
SIZE = (4, 20, 3, 5, 4)
OPTIONS = {
    "default": {},
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "scoring-1x3x3": dict(scoring_kernel=(1, 3, 3), scoring_width=2, score_reduction="mean"),
    "no-skip-no-norm": dict(skip=False, norm=None),
    "bare-one-layer": dict(norm=None, activation=None, num_layers=1, num_neurons=1),
    "half": dict(dtype=torch.bfloat16),
    "float64": dict(dtype=torch.float64),
}


def live(dtype: torch.dtype = torch.float32, side: bool = False, **options) -> FusedDSTS:
    """A module with lively gates; with ``side``, of one neuron they are all spatial and of another all temporal."""
    dsts = pair(SIZE[1], dtype, **options)[1].eval()
    if side:
        with torch.no_grad():
            for layer in dsts.layers:
                layer.gate[0], layer.gate[-1] = 1, -1
    return dsts


def features(fast: FrozenDSTS) -> torch.Tensor:
    return torch.randn(SIZE).to(fast.dtype)


def snapshot(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module: nn.Module, before: dict) -> None:
    now = module.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def in_a_model(fast: FrozenDSTS) -> nn.Module:
    return nn.Sequential(nn.Conv3d(SIZE[1], SIZE[1], 1), nn.ModuleDict({"dsts": fast}))


def repacked(fast: FrozenDSTS, packing: str) -> FrozenDSTS:
    other = copy.deepcopy(fast)
    for layer in other.layers:
        layer.repack(packing)
    return other


def described(state: dict, change) -> None:
    fields = json.loads(bytes(state[EXTRA].tolist()))
    change(fields)
    state[EXTRA] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def one_gate(gate: torch.Tensor) -> torch.Tensor:
    """Two channels of a neuron change sides, so that filters are as long as before."""
    n = int((gate.sum(1) % gate.shape[1]).argmax())
    gate[n, [int(gate[n].argmax()), int(gate[n].argmin())]] = gate.new_tensor([0.0, 1.0])
    return gate


def lively(channels: int = 12, **options) -> FusedDSTS:
    return pair(channels, torch.float32, **options)[1].eval()


def check_freezes(dsts: FusedDSTS, channels: int = 12, **frozen) -> None:
    """Frozen, it gives what it gives in evaluation, and every buffer is dense."""
    x = torch.randn(4, channels, 3, 5, 4)
    with torch.no_grad():
        live = dsts.eval()(x)
    fast = dsts.freeze(**frozen)
    assert all(b.is_contiguous() and not b.is_neg() and not b.is_conj() for b in fast.buffers())
    assert all(own.is_contiguous() for layer in fast.layers for own in layer.weights() if own is not None)
    assert_close(fast(x), live)


@contextlib.contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
