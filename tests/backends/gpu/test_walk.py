"""How many functions of ours lie between a module and the launch of a kernel: a reader walks through all of them."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch

import dsts_kernels

from ...support.inputs import SIZE
from ...support.stand_ins import KERNELS, emulated, pair

pytestmark = emulated
PACKAGE = str(Path(dsts_kernels.__file__).parent)
FUSED = hasattr(KERNELS, "route")  # a backend with one launch for the choice and its gates, and one for the way back
CHOICE = ("route",) if FUSED else ("semhash_gate", "partial_tap_sums")
BACKWARD = (
    "route_backward" if FUSED else "semhash_gate_backward", "data_gradient", "weight_gradient", "unpack_filters",
)  # fmt: skip
FROZEN = ("partial_tap_sums", "route_and_gather", "conv")
EVALUATION = (*CHOICE, "group_samples", "list_channels", "gather_panel", "pack_filters", "conv")


@pytest.fixture
def depths(monkeypatch) -> dict[str, int]:
    """Frames of this package that each launcher was called through, the launcher's own included."""
    found: dict[str, int] = {}

    def watch(name: str) -> None:
        launcher = getattr(KERNELS, name)

        def counted(*args, **kwargs):
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            found[name] = max(found.get(name, 0), len(frames) + 1)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(KERNELS, name, counted)

    for name in {*EVALUATION, *BACKWARD, *FROZEN}:
        watch(name)
    return found


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_evaluation(mixing_kernel, depths):
    """``FusedDSTS.forward``, a layer's, its part, the op in three, the backend's method, the launcher."""
    _, fused = pair(8, mixing_kernel=mixing_kernel)
    with torch.inference_mode():
        fused.eval()(torch.randn(2, 8, *SIZE))
    assert set(depths) == set(EVALUATION)
    assert max(depths.values()) <= 9, depths


def test_training(depths):
    """One more than in evaluation, in which autograd keeps what the backward pass needs."""
    _, fused = pair(8)
    fused.train()(torch.randn(2, 8, *SIZE))
    assert max(depths.values()) <= 9, depths


def test_backward(depths):
    """From the derivative of an op on, as autograd calls that."""
    _, fused = pair(8, mixing_kernel=(3, 1, 1))
    y = fused.train()(torch.randn(2, 8, *SIZE).requires_grad_())
    depths.clear()
    y.sum().backward()
    assert set(BACKWARD) | {"conv", "gather_panel", "list_channels"} <= set(depths)
    assert max(depths.values()) <= 8, depths


def test_frozen(depths):
    _, fused = pair(8)
    fast = fused.eval().freeze()
    with torch.inference_mode():
        fast(torch.randn(2, 8, *SIZE))
    assert set(depths) == set(FROZEN)
    assert max(depths.values()) <= 9, depths
