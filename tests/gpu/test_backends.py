"""Which backend runs what on the GPU: Triton where it can, plain PyTorch for float64, and that the chosen one ran."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS, backends
from dsts_kernels.backends import BACKENDS, OPS, choose, explain, use_backend
from dsts_kernels.testing import assert_close

from .support import (
    BACKEND,
    DEVICE,
    DTYPES,
    assert_same_gradients,
    draws_for,
    gpu_only,
    pair,
    randn,
    reference_step,
    training_step,
    wide_draws,
)

pytestmark = gpu_only

SIZE = (4, 40, 3, 6, 5)
TRAINING_OPS = (
    "semhash_gate",
    "semhash_gate_backward",
    "tap_sums",
    "gated_conv3d",
    "gated_conv3d_backward",
    "mixing_conv3d",
    "mixing_conv3d_backward",
)


@pytest.mark.parametrize("op", OPS)
def test_triton_is_preferred(op):
    """In float32, float16 and bfloat16; float64 stays with plain PyTorch, and explain() says so."""
    for dtype in DTYPES:
        assert choose(op, DEVICE, dtype).name == BACKEND
    assert choose(op, DEVICE, torch.float64).name == "eager"
    assert f"{BACKEND}: no, " in explain(op, DEVICE, torch.float64)


@pytest.mark.parametrize("named", [True, False], ids=["asked-for", "by-itself"])
def test_triton_really_runs(named, monkeypatch):
    """A spy on the backend sees every op of a training step and of a frozen evaluation, at least once a layer."""
    calls: dict[str, int] = {}
    for op in (*TRAINING_OPS, "frozen_layer"):
        original = getattr(BACKENDS[BACKEND], op)

        def spy(*args, op=op, original=original):
            calls[op] = calls.get(op, 0) + 1
            return original(*args)

        monkeypatch.setattr(BACKENDS[BACKEND], op, spy)
    dsts = pair(40, torch.bfloat16, backend=BACKEND if named else None)[1]
    dsts(randn(*SIZE, dtype=torch.bfloat16)).sum().backward()
    assert calls.keys() == set(TRAINING_OPS) and min(calls.values()) >= 3, calls
    calls.clear()
    dsts.eval().freeze()(randn(*SIZE, dtype=torch.bfloat16))
    assert calls["frozen_layer"] == 3, calls


def test_float64_runs_on_eager():
    """A float64 module on the GPU is the reference to float64's tolerance, and asking Triton for it is an error."""
    ref, fused = pair(12, torch.float64, backend=None)
    x, grad = randn(*SIZE).double()[:, :12], randn(*SIZE).double()[:, :12]
    draws = draws_for(ref, x, torch.float64)
    theirs, _, wanted = reference_step(ref, x, draws, grad)
    mine, _, found = training_step(fused, x, wide_draws(draws), grad)
    assert_close(mine, theirs, factor=10)
    assert_same_gradients(found, wanted, torch.float64, 100)
    fast = fused.eval().freeze()
    assert_close(fast(x), ref.eval()(x), factor=10)
    with pytest.raises(RuntimeError, match=f"backend='{BACKEND}' cannot run .* in torch.float64"):
        FusedDSTS(12, num_neurons=2, backend=BACKEND, device=DEVICE, dtype=torch.float64)(x)


def test_eager_agrees():
    """Plain PyTorch on the same device gives what Triton gives."""
    ref, fused = pair(40, torch.float32, backend=None, activation=None)
    x, grad = randn(*SIZE), randn(*SIZE)
    draws = draws_for(ref, x, torch.float32)
    mine = training_step(fused, x, draws, grad)
    with use_backend("eager"):
        theirs = training_step(fused, x, draws, grad)
    assert_close(mine[0], theirs[0], factor=2)
    assert_same_gradients(mine[2], theirs[2], torch.float32, 10)


def test_other_tensors_are_left_to_others():
    """A CPU tensor never reaches Triton."""
    assert choose("gated_conv3d", torch.device("cpu"), torch.float32).name != BACKEND
    assert backends.BACKENDS[BACKEND].why_not("gated_conv3d", torch.device("cpu"), torch.float32) is not None
