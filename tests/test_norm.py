"""A layer's norm on a flat view of its features: the same numbers, for BatchNorm that nobody watches; its layout."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dsts_kernels import FusedDSTS
from dsts_kernels import norm as norms
from dsts_kernels.testing import assert_close

from .support.profiling import profile

SHAPES = {
    "any": (3, 12, 2, 5, 3),
    "frame": (2, 8, 1, 3, 4),
    "row": (2, 8, 3, 1, 4),
    "column": (2, 8, 3, 4, 1),
    "position": (4, 8, 1, 1, 1),
    "channel": (2, 1, 3, 4, 5),
}
SETTINGS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "bare": {"affine": False},
    "batch": {"track_running_stats": False},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def channels_last(x: Tensor) -> Tensor:
    """As our convolutions make them: dense, with true strides also where a size is 1."""
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def kernel_of(z: Tensor) -> str:
    """What torch's ``batch_norm_choose_impl`` says of ``z``: aten/src/ATen/native/cuda/Normalization.cu."""
    if z.numel() >= 2**31:
        return "general"
    if z.is_contiguous():
        return "channels-last" if z.stride(1) == 1 else "contiguous"
    return "channels-last" if z.dim() == 4 and z.is_contiguous(memory_format=torch.channels_last) else "general"


@pytest.fixture
def on_torch_kernels(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """As where torch's own CUDA kernels normalise; returns what every BatchNorm gets and the gradient it gets back."""
    monkeypatch.setattr(norms, "misses_fast_kernels", lambda z: True)
    seen, original = [], F.batch_norm

    def watched(z, *args, **kwargs):
        out, call = original(z, *args, **kwargs), [z, None]
        seen.append(call)
        if out.requires_grad:
            out.register_hook(lambda grad: call.__setitem__(1, grad))
        return out

    monkeypatch.setattr(F, "batch_norm", watched)
    return seen


def trained(normalize, norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of two training steps, and the output of an evaluation."""
    norm, x = copy.deepcopy(norm).train(), x.detach().requires_grad_()
    for _ in range(2):
        y = normalize(norm, x)
        y.backward(grad)
    found = [y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]
    return [*found, normalize(norm.eval(), x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", [SHAPES[name] for name in SHAPES if name != "position"], ids=str)
def test_flat_is_the_same(shape, settings, dtype):
    """Output, gradients, running statistics and their count, over two steps and an evaluation after them."""
    norm, x = nn.BatchNorm3d(shape[1], dtype=dtype, **settings), channels_last(torch.randn(shape, dtype=dtype))
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    grad = channels_last(torch.randn(shape, dtype=dtype))
    flat = trained(norms.flat_batch_norm, norm, x, grad)
    plain = trained(lambda norm, z: norm(z), norm, x, grad)
    assert len(flat) == len(plain) and flat[0].shape == x.shape and flat[0].stride() == x.stride()
    for mine, theirs in zip(flat, plain, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine.double(), theirs.double(), dtype=dtype, factor=2)
    wide = trained(lambda norm, z: norm(z), norm.double(), x.double(), grad.double())
    for mine, exact in zip(flat, wide, strict=True):
        assert_close(mine.double(), exact.double(), dtype=dtype, factor=4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_view_is_what_torch_looks_for(shape):
    """Features as they come get general kernels, their flat view the channels-last ones; and nothing is copied."""
    z = channels_last(torch.randn(shape))
    assert norms.lies_flat(z) and not norms.lies_flat(z[:1])
    flat = z.flatten(2, 3)
    assert flat.data_ptr() == z.data_ptr() and flat.unflatten(2, z.shape[2:4]).stride() == z.stride()
    assert kernel_of(flat) == "channels-last" or flat.is_contiguous()
    if min(shape[1:]) > 1:
        assert kernel_of(z) == "general" and kernel_of(flat) == "channels-last"


def test_forward_and_backward_get_it(on_torch_kernels):
    """In a module's training step both what is normalised and the gradient that comes back lie as torch looks for."""
    dsts, x = FusedDSTS(24, num_layers=2, num_neurons=3).train(), torch.randn(4, 24, 2, 5, 3, requires_grad=True)
    dsts(x).square().sum().backward()
    assert len(on_torch_kernels) == 2
    for z, grad in on_torch_kernels:
        assert z.shape == grad.shape == (4, 24, 10, 3)
        assert kernel_of(z) == kernel_of(grad) == "channels-last"


def test_a_profile_is_of_what_runs(on_torch_kernels):
    """The profiler sees the norm that runs without it, not one with other kernels."""
    z, norm = channels_last(torch.randn(SHAPES["any"])), nn.BatchNorm3d(SHAPES["any"][1])
    wanted = norms.normalize(norm, z)
    with profile():
        found = norms.normalize(norm, z)
    assert torch.equal(found, wanted)
    assert [given.dim() for given, _ in on_torch_kernels] == [4, 4]


def test_module_is_the_same(on_torch_kernels, monkeypatch):
    """A training step and an evaluation with the view and without: output, gradients, statistics."""
    results, x = [], torch.randn(4, 24, 2, 5, 3)
    dsts = FusedDSTS(24, num_layers=2, num_neurons=3)
    for flat in (True, False):
        monkeypatch.setattr(norms, "misses_fast_kernels", lambda z, flat=flat: flat)
        mine, features = copy.deepcopy(dsts).train(), x.clone().requires_grad_()
        torch.manual_seed(1)
        y = mine(features)
        y.square().sum().backward()
        with torch.no_grad():
            evaluated = mine.eval()(x)
        results.append([y, evaluated, features.grad, *(p.grad for p in mine.parameters()), *mine.buffers()])
    assert [z.dim() for z, _ in on_torch_kernels] == [4, 4, 4, 4, 5, 5, 5, 5]
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine.double(), theirs.double(), dtype=torch.float32, factor=10)


class Doubled(nn.BatchNorm3d):
    """A norm of a user's own."""

    def forward(self, z):
        assert z.dim() == 5
        return 2 * super().forward(z)


class Instance(nn.Module):
    """A norm that is no BatchNorm."""

    def forward(self, z):
        assert z.dim() == 5
        return F.instance_norm(z)


def hooked(register: str, norm: nn.Module, seen: list) -> nn.Module:
    getattr(norm, register)(lambda module, *given: seen.append(given))
    return norm


def with_forward(norm: nn.Module) -> nn.Module:
    """Replaced on the object, as tools that wrap calls do it."""
    original = norm.forward
    norm.forward = lambda z: original(z)
    return norm


CALLED = {
    "subclass": lambda seen: Doubled(24),
    "other": lambda seen: Instance(),
    "synchronised": lambda seen: nn.SyncBatchNorm(24),
    "forward hook": lambda seen: hooked("register_forward_hook", nn.BatchNorm3d(24), seen),
    "forward pre-hook": lambda seen: hooked("register_forward_pre_hook", nn.BatchNorm3d(24), seen),
    "backward hook": lambda seen: hooked("register_full_backward_hook", nn.BatchNorm3d(24), seen),
    "backward pre-hook": lambda seen: hooked("register_full_backward_pre_hook", nn.BatchNorm3d(24), seen),
    "forward of its own": lambda seen: with_forward(nn.BatchNorm3d(24)),
    "parametrized": lambda seen: nn.utils.parametrizations.weight_norm(nn.BatchNorm3d(24), dim=None),
}


@pytest.mark.parametrize("kind", CALLED)
def test_others_are_called_as_they_are(kind, on_torch_kernels):
    """Hooks see five dimensions, and norms that are more than torch's own get them."""
    seen = []
    dsts = FusedDSTS(24, num_layers=1, num_neurons=3)
    dsts.layers[0].norm = CALLED[kind](seen)
    x = torch.randn(4, 24, 2, 5, 3, requires_grad=True)
    dsts.eval() if kind == "synchronised" else dsts.train()  # it synchronises on GPUs only
    dsts(x).square().sum().backward()
    assert all(z.dim() == 5 for z, _ in on_torch_kernels)
    if kind.endswith("hook"):
        ((given, *_),) = seen
        assert given[0].shape == (4, 24, 2, 5, 3)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks_see_the_norm(register, on_torch_kernels):
    seen = []
    dsts = FusedDSTS(24, num_layers=1, num_neurons=3)
    handle = register(lambda module, *given: seen.append(module))
    try:
        dsts(torch.randn(4, 24, 2, 5, 3))
    finally:
        handle.remove()
    assert dsts.layers[0].norm in seen


def test_converted_to_synchronised(on_torch_kernels):
    """torch's own conversion finds and replaces the norm, which goes on as torch has it."""
    dsts = FusedDSTS(24, num_layers=2, num_neurons=3)
    dsts(torch.randn(4, 24, 2, 5, 3))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(dsts)
    assert all(
        type(layer.norm) is nn.SyncBatchNorm and int(layer.norm.num_batches_tracked) == 1 for layer in converted.layers
    )
    before = len(on_torch_kernels)
    converted.eval()(torch.randn(4, 24, 2, 5, 3))
    assert [z.dim() for z, _ in on_torch_kernels[before:]] == [5, 5]


def test_only_on_torch_kernels():
    """Without them a module on a CPU is given what it was: nothing of this."""
    assert not norms.misses_fast_kernels(torch.randn(2, 3, 1, 2, 2, dtype=torch.bfloat16))


def test_features_that_do_not_lie_so(on_torch_kernels):
    """Channels-first features, some that lie apart, and a batch of one are normalised as they are."""
    norm = nn.BatchNorm3d(12)
    norms.normalize(norm, torch.randn(2, 12, 3, 4, 5))
    norms.normalize(norm, channels_last(torch.randn(2, 12, 3, 4, 10))[..., ::2])
    norms.normalize(norm, channels_last(torch.randn(1, 12, 3, 4, 5)))
    assert [z.dim() for z, _ in on_torch_kernels] == [5, 5, 5]
