"""Which backend runs what on the GPU: the one asked for, the default, plain PyTorch for float64; and they agree."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS, OPS, choose, explain, use_backend
from dsts_kernels.backends.gpu.measured import winner
from dsts_kernels.testing import assert_close

from ..support.modules import (
    assert_same_gradients,
    assert_same_routing,
    draws_for,
    features_for,
    reference_output,
    reference_step,
    training_step,
    wide_draws,
)
from .support import DEVICE, DTYPES, GPU_BACKENDS, HALF, pair, randn, why_not

pytestmark = pytest.mark.gpu

SIZE = (4, 40, 3, 6, 5)
CONVOLUTIONS = ("gated_conv3d_keeping", "gated_conv3d_backward", "mixing_conv3d", "mixing_conv3d_backward")
ROUTING = ("semhash_gate", "semhash_gate_backward", "tap_sums")
IN_ONE_LAUNCH = ("route", "route_backward")  # of Triton, in place of ROUTING


def expected(op: str, dtype: torch.dtype, size: tuple[int, ...] | None = None) -> str:
    """The default: of the backends that run ``dtype`` the faster as measured, or the first; else plain PyTorch."""
    able = [name for name in BACKENDS if name in GPU_BACKENDS and why_not(name, dtype) is None]
    won = winner(op, DEVICE, dtype, size) if able else None
    return won if won in (*able, "eager") else (able[0] if able else "eager")


@pytest.fixture
def both(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Both GPU backends; skipped where one cannot run in the test's dtype."""
    dtype = request.node.callspec.params.get("dtype", HALF) if hasattr(request.node, "callspec") else HALF
    for name in GPU_BACKENDS:
        if (reason := why_not(name, dtype)) is not None:
            pytest.skip(f"{name}: {reason}")
    return GPU_BACKENDS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Ops by the names of the backends that ran them: spies on both."""
    seen: dict[str, list[str]] = {}
    for name in GPU_BACKENDS:
        for op in (*CONVOLUTIONS, *ROUTING, *IN_ONE_LAUNCH, "frozen_layer"):
            original = getattr(BACKENDS[name], op)

            def spy(*args, name=name, op=op, original=original):
                seen.setdefault(op, []).append(name)
                return original(*args)

            monkeypatch.setitem(vars(BACKENDS[name]), op, spy)
    return seen


@pytest.mark.parametrize("op", OPS)
def test_by_name(gpu_backend, op):
    """Every dtype that it takes; one that it refuses is an error with its reason, and explain() gives that too."""
    for dtype in (*DTYPES, torch.float64):
        reason = why_not(gpu_backend, dtype)
        if reason is None:
            assert choose(op, DEVICE, dtype, gpu_backend).name == gpu_backend
            continue
        assert f"{gpu_backend}: no, {reason}" in explain(op, DEVICE, dtype)
        with pytest.raises(RuntimeError, match=f"backend='{gpu_backend}' cannot run {op} .* in {dtype}"):
            choose(op, DEVICE, dtype, gpu_backend)


@pytest.mark.parametrize("op", OPS)
def test_default(op):
    """What was measured faster, else the first that can; float64 stays with plain PyTorch."""
    for dtype in DTYPES:
        for size in (None, SIZE, (8, 1024, 8, 16, 16)):
            assert choose(op, DEVICE, dtype, None, size).name == expected(op, dtype, size)
    assert choose(op, DEVICE, torch.float64).name == "eager"


def check_calls(backend: str | None, calls: dict[str, list[str]], wanted: dict[str, str]) -> None:
    """A training step and a frozen evaluation run every op on what is wanted, at least once a layer."""
    dsts = pair(backend, 40, HALF)[1]
    dsts(randn(*SIZE, dtype=HALF)).sum().backward()
    routed = BACKENDS[wanted["tap_sums"]].fuses_routing(SIZE[0], dsts.layers[0].num_neurons)
    assert calls.keys() == {*CONVOLUTIONS, *(IN_ONE_LAUNCH if routed else ROUTING)}
    dsts.eval().freeze()(randn(*SIZE, dtype=HALF))
    for op, ran in calls.items():
        name = "tap_sums" if op in IN_ONE_LAUNCH else op.removesuffix("_backward").removesuffix("_keeping")
        assert set(ran) == {wanted[name]} and len(ran) >= 3, (op, ran)
    assert len(calls["frozen_layer"]) == 3


def test_it_really_runs(gpu_backend, calls):
    """Asked for by name, nothing else runs a single op."""
    check_calls(gpu_backend, calls, dict.fromkeys(OPS, gpu_backend))


def test_the_default_really_runs(calls):
    """Left to choose, every op runs on its own default."""
    wanted = {op: expected(op, HALF, SIZE) for op in OPS}
    if "eager" in wanted.values():
        pytest.skip("no GPU backend can run here, or plain PyTorch was measured faster at this size")
    check_calls(None, calls, wanted)


def test_float64_runs_on_eager():
    """A float64 module on the GPU is the reference to float64's tolerance; asking for a GPU backend is an error."""
    ref, fused = pair(None, 12, torch.float64)
    x, grad = randn(*SIZE).double()[:, :12], randn(*SIZE).double()[:, :12]
    draws = draws_for(ref, x, torch.float64)
    theirs, _, wanted = reference_step(ref, x, draws, grad)
    mine, _, found = training_step(fused, x, wide_draws(draws), grad)
    assert_close(mine, theirs, factor=10)
    assert_same_gradients(found, wanted, torch.float64, 100)
    fast = fused.eval().freeze()
    assert_close(fast(x), ref.eval()(x), factor=10)
    for name in GPU_BACKENDS:
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run .* in torch.float64"):
            FusedDSTS(12, num_neurons=2, backend=name, device=DEVICE, dtype=torch.float64)(x)


def test_eager_agrees(gpu_backend):
    """Plain PyTorch on the same device gives what a GPU backend gives."""
    ref, fused = pair(None, 40, torch.float32, activation=None)
    x, grad = randn(*SIZE), randn(*SIZE)
    draws = draws_for(ref, x, torch.float32)
    found = []
    for name in (gpu_backend, "eager"):
        with use_backend(name):
            found.append(training_step(fused, x, draws, grad))
    assert_close(found[0][0], found[1][0], factor=2)
    assert_same_gradients(found[0][2], found[1][2], torch.float32, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_agrees(both, dtype):
    """Forward on one GPU backend, backward on the other: what either gives alone, within the tolerance."""
    ref, fused = pair(None, 40, dtype, activation=None)
    x, grad = randn(*SIZE, dtype=dtype), randn(*SIZE, dtype=dtype)
    draws = draws_for(ref, x, dtype)
    _, _, wanted = reference_step(ref, x, draws, grad)
    outputs = []
    for first, second in (both, both[::-1]):
        leaf = x.detach().requires_grad_()
        with use_backend(first):
            y, routing = fused(leaf, draws, return_routing=True)
        trained = {"x": leaf} | {name: p for name, p in fused.named_parameters() if p.requires_grad}
        with use_backend(second):
            found = torch.autograd.grad(y, list(trained.values()), grad)
        assert_same_gradients(dict(zip(trained, found, strict=True)), wanted, dtype, 5)
        outputs.append((y.detach(), routing))
    assert_close(outputs[0][0], outputs[1][0], factor=2)
    assert_same_routing(outputs[0][1], outputs[1][1], dtype)


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_for_the_other(both, dtype, mixing_kernel):
    """Packed for one GPU backend, run on either: the same packing, and results within the tolerance."""
    ref, fused = pair(None, 72, dtype, mixing_kernel=mixing_kernel)
    x = features_for(ref, randn(5, 72, 3, 6, 5, dtype=dtype))
    theirs, their_routing = reference_output(ref, x)
    packed = []
    for name in both:
        with use_backend(name):
            packed.append(fused.eval().freeze())
    assert {layer.packing for fast in packed for layer in fast.layers} == {"tiled"}
    for mine, other in zip(packed[0].state_dict().values(), packed[1].state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    for fast in packed:
        found = []
        for name in both:
            with use_backend(name):
                y, routing = fast(x, return_routing=True)
            assert_close(y, theirs, factor=2)
            assert_same_routing(routing, their_routing, dtype)
            found.append(y)
        assert_close(found[0], found[1], factor=2)


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_other_tensors_are_left_to_others(name):
    """A CPU tensor never reaches a GPU backend."""
    cpu = torch.device("cpu")
    assert choose("gated_conv3d", cpu, torch.float32).name != name
    assert BACKENDS[name].why_not("gated_conv3d", cpu, torch.float32) is not None
