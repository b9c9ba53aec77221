"""How the kernels behave on the device: streams, graphs, launches, synchronisation, and other devices."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu.timing import captured, device_events
from dsts_kernels import FusedDSTS
from dsts_kernels.functional import gated_conv3d
from dsts_kernels.testing import assert_close, relative_error

from ..support.modules import draws_for, enliven, training_step
from ..support.oracles import literal_gated, wide
from .support import DEVICE, HALF, gated_inputs, pair, randn

pytestmark = pytest.mark.gpu

CHANNELS, SIZE = 256, (4, 256, 8, 7, 7)
LAST = torch.channels_last_3d
LIBRARY_CONVOLUTION = re.compile(
    r"cudnn|implicit_convolve|xmma_(fprop|dgrad|wgrad)|im2col|vol2col|nchwToNhwc", re.IGNORECASE
)
LIBRARY_PRODUCT = re.compile(r"cutlass|cublas|xmma|nvjet|sm\d\d_", re.IGNORECASE)
ROUNDS = 20


def features(*size: int) -> torch.Tensor:
    return randn(*size, dtype=HALF).contiguous(memory_format=LAST)


@pytest.fixture
def fast(gpu_backend):
    """A frozen module in half precision."""
    return pair(gpu_backend, CHANNELS, HALF)[1].eval().freeze()


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Torch raises in the block where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_frozen(fast):
    """Different inputs on two streams at once, again and again: the bits of running alone."""
    inputs = [features(*SIZE) for _ in range(2)]
    alone = [fast(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        found = []
        for _ in range(3):
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(fast(x))
        torch.cuda.synchronize()
        assert all(torch.equal(y, alone[i % 2]) for i, y in enumerate(found))


def test_two_streams_training(gpu_backend):
    """Forward and backward on two streams at once: the bits of running alone."""
    dtype = HALF
    ref, fused = pair(gpu_backend, 96, dtype, norm=None)
    work = []
    for _ in range(2):
        x, grad = features(8, 96, 8, 7, 7), features(8, 96, 8, 7, 7)
        work.append((x, draws_for(ref, x, dtype), grad))
    alone = [training_step(fused, *each) for each in work]
    streams = [torch.cuda.Stream() for _ in work]
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        found = []
        for stream, each in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                found.append(training_step(fused, *each))
        torch.cuda.synchronize()
        for mine, theirs in zip(found, alone, strict=True):
            assert torch.equal(mine[0], theirs[0])
            assert [name for name, g in mine[2].items() if not torch.equal(g, theirs[2][name])] == []


@pytest.mark.parametrize(
    "options",
    [{}, {"scoring_kernel": (1, 3, 3)}, {"mixing_kernel": (1, 3, 3)}, {"mixing_kernel": (3, 1, 1)}],
    ids=["default", "scoring-1x3x3", "mixing-1x3x3", "mixing-3x1x1"],
)
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=str)
def test_cuda_graph(gpu_backend, options, memory_format):
    """The whole frozen module in one graph, replayed on other inputs that choose other neurons."""
    fast = pair(gpu_backend, 64, HALF, **options)[1].eval().freeze()
    static = features(5, 64, 3, 6, 5).contiguous(memory_format=memory_format)
    graph, (y, routing) = captured(lambda: fast(static, return_routing=True))
    for scale in (1.0, -1.0, 3.0, 0.5):
        x = scale * features(5, 64, 3, 6, 5)
        static.copy_(x)
        graph.replay()
        wanted, wanted_routing = fast(x.contiguous(memory_format=memory_format), return_routing=True)
        assert torch.equal(y, wanted) and torch.equal(routing.neuron, wanted_routing.neuron)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("grid", [(8, 16, 16), (16, 7, 7)], ids=["tpn", "swin"])
def test_launches(gpu_backend, grid, batch):
    """At most two launches a layer and one more, copies and fills counted; none of them a library's."""
    dsts = FusedDSTS(1024, num_neurons=4, device=DEVICE, dtype=HALF, backend=gpu_backend)
    enliven(dsts)
    fast, x = dsts.eval().freeze(), features(batch, 1024, *grid)
    for _ in range(3):
        fast(x)
    names = [name for name, _ in device_events(lambda: fast(x))]
    assert 0 < len(names) <= 2 * 3 + 1, names
    assert not [n for n in names if LIBRARY_CONVOLUTION.search(n) or LIBRARY_PRODUCT.search(n)], names


def test_training_runs_no_library_convolution(gpu_backend):
    """Forward and backward without a convolution of cuDNN's."""
    _, fused = pair(gpu_backend, CHANNELS, HALF, norm=None)
    x = features(*SIZE).requires_grad_()

    def step() -> None:
        fused(x).sum().backward()

    step()
    names = [name for name, _ in device_events(step)]
    assert names and not [n for n in names if LIBRARY_CONVOLUTION.search(n)], names


def test_frozen_does_not_synchronise(fast):
    """Routing stays on the device, in both memory formats."""
    inputs = [features(*SIZE), features(*SIZE).contiguous()]
    for x in inputs:  # compiles
        fast(x, return_routing=True)
    with no_synchronisation():
        for x in inputs:
            fast(x)
            fast(x, return_routing=True)


@pytest.mark.parametrize("sampled", [False, True], ids=["draws-given", "draws-sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_training_does_not_synchronise(gpu_backend, dtype, sampled):
    """Forward, backward and evaluation without the host waiting."""
    ref, fused = pair(gpu_backend, CHANNELS, dtype)
    x, grad = randn(*SIZE, dtype=dtype), randn(*SIZE, dtype=dtype)
    draws = None if sampled else draws_for(ref, x, dtype)
    training_step(fused, x, draws, grad)  # compiles
    fused.eval()(x)
    with no_synchronisation():
        training_step(fused.train(), x, draws, grad)
        with torch.no_grad():
            fused.eval()(x)


def test_other_device(gpu_backend):
    """Tensors on a device that is not the current one: results there, and the current one stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    ref, fused = pair(gpu_backend, 64, HALF)
    x = features(4, 64, 3, 6, 5)
    draws, grad = draws_for(ref, x, HALF), torch.ones_like(x)
    here = training_step(fused, x, draws, grad)
    frozen = fused.eval().freeze()(x)
    other = fused.train().to("cuda:1")
    moved = [x.to("cuda:1"), type(draws)(*(field.to("cuda:1") for field in draws)), grad.to("cuda:1")]
    there = training_step(other, *moved)
    assert torch.cuda.current_device() == 0 and there[0].device == torch.device("cuda:1")
    assert_close(there[0].to("cuda:0"), here[0])
    for name in here[2]:
        assert_close(there[2][name].to("cuda:0"), here[2][name], factor=5)
    assert_close(other.eval().freeze()(moved[0]).to("cuda:0"), frozen)


def test_float32_precision_setting(gpu_backend):
    """``torch.set_float32_matmul_precision("high")`` allows TF32 where a GPU has it: about 1e-3, then float32 again."""
    inputs = gated_inputs(2, 256, 128, (4, 16, 16))
    ref = literal_gated(*wide(inputs))
    exact = relative_error(gated_conv3d(*inputs, backend=gpu_backend), ref)
    torch.set_float32_matmul_precision("high")
    loose = relative_error(gated_conv3d(*inputs, backend=gpu_backend), ref)
    torch.set_float32_matmul_precision("highest")
    again = relative_error(gated_conv3d(*inputs, backend=gpu_backend), ref)
    assert exact == again < 1e-5
    has_tf32 = torch.cuda.get_device_capability() >= (8, 0)
    assert 1e-5 < loose < 3e-3 if has_tf32 else loose == exact
