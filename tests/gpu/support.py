"""What the GPU suite shares: when it runs and in which dtypes, the float64 reference, inputs, and modules in pairs.

The reference runs in float64 beside what it checks. Its convolutions are put together here from matrix products, one
a tap: a GPU multiplies float64 matrices at full rate, while a library's float64 convolutions are nobody's concern and
may be a hundred times slower. ``test_oracle.py`` holds that they are convolutions.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.margins import separate_draws, separate_features
from dsts_kernels import Draws, FusedDSTS, Routing, reference
from dsts_kernels.backends import BACKENDS
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

DEVICE = torch.device("cuda")
GPU_BACKENDS = ("triton", "cuda")
NO_GPU = "no CUDA GPU here: torch.cuda.is_available() is False"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POSITIONS = 100  # of a small sample, roughly
RELU_GRADIENTS = {torch.float32: 2000, torch.float16: 40, torch.bfloat16: 10}
"""Factors on the tolerance of gradients behind a ReLU: an activation within rounding of zero falls on either side of
it, and each that does moves a whole element (see ``benchmarks/parity.py``)."""


def why_not(backend: str, dtype: torch.dtype) -> str | None:
    """The backend's own reason for not running here in ``dtype``; ``None`` when it runs."""
    return BACKENDS[backend].why_not("gated_conv3d", DEVICE, dtype)


def half() -> torch.dtype:
    """bfloat16; float16 on a GPU that has no other half precision, where no backend of ours runs bfloat16."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float16


HALF = half()
gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]


def needs_memory(gib: float) -> None:
    """Skips a test that this GPU has no room for."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, {free:.0f} are free")


def conv3d(x: Tensor, weight: Tensor, padding: int | Sequence[int] = 0) -> Tensor:
    """``torch.nn.functional.conv3d`` of the reference's kinds as matrix products."""
    kernel = weight.shape[2:]
    pads = (padding,) * 3 if isinstance(padding, int) else tuple(padding)
    t, h, w = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], pads, kernel, strict=True))
    padded = F.pad(x, [p for p in reversed(pads) for _ in range(2)]) if any(pads) else x
    out = x.new_zeros(x.shape[0], weight.shape[0], t * h * w)
    for i, j, k in itertools.product(*map(range, kernel)):
        window = padded[:, :, i : i + t, j : j + h, k : k + w].flatten(2)  # (B, C, P)
        out = torch.baddbmm(out, weight[:, :, i, j, k].expand(x.shape[0], -1, -1), window)
    return out.unflatten(2, (t, h, w))


@contextlib.contextmanager
def products() -> Iterator[None]:
    """The reference convolves with :func:`conv3d` inside the block."""
    before = reference.F
    reference.F = SimpleNamespace(conv3d=conv3d, relu=F.relu, one_hot=F.one_hot)
    try:
        yield
    finally:
        reference.F = before


def gated_conv(x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    """The literal gated convolution, one sample at a time, all channels under a mask."""
    rows = []
    for b, n in enumerate(neuron.tolist()):
        g = gate[b, :, None, None, None]
        z = conv3d((g * x[b])[None], spatial[n], padding=(0, 1, 1))
        rows.append(z + conv3d(((1 - g) * x[b])[None], temporal[n], padding=(1, 0, 0)))
    return torch.cat(rows) if rows else x.new_empty(0, spatial.shape[1], *x.shape[2:])


def mixing_conv(z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
    """The literal mixing convolution, one sample at a time."""
    padding = tuple(k // 2 for k in mixing.shape[3:])
    rows = [conv3d(z[b : b + 1], mixing[n], padding=padding) for b, n in enumerate(neuron.tolist())]
    return torch.cat(rows) if rows else torch.empty_like(z)


def randn(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal noise on the GPU, rounded to ``dtype``."""
    return (torch.randn(*size, device=DEVICE) * scale).to(dtype)


def hard_gate(b: int, c: int) -> Tensor:
    return (torch.rand(b, c, device=DEVICE) < 0.5).float()


def soft_gate(b: int, c: int) -> Tensor:
    """Some channels saturated at exactly 0 and 1."""
    return (torch.rand(b, c, device=DEVICE) * 1.4 - 0.2).clamp(0, 1)


GATES = {
    "mixed": lambda b, c: torch.where(
        torch.arange(b, device=DEVICE)[:, None] % 2 == 0, hard_gate(b, c), soft_gate(b, c)
    ),
    "hard": hard_gate,
    "soft": soft_gate,
    "all-spatial": lambda b, c: torch.ones(b, c, device=DEVICE),
    "all-temporal": lambda b, c: torch.zeros(b, c, device=DEVICE),
    "all-half": lambda b, c: torch.full((b, c), 0.5, device=DEVICE),
}
LAYOUTS = {
    "channels-first": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "strided": lambda x: x.repeat(1, 2, 1, 1, 2)[:, ::2, :, :, ::2],
    "transposed": lambda x: x.permute(4, 0, 3, 1, 2).contiguous().permute(1, 3, 4, 2, 0),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
FORMATS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last_3d}


def gated_inputs(
    size: Sequence[int],
    outputs: int,
    dtype: torch.dtype,
    gate: str = "mixed",
    one_neuron: bool = False,
    neurons: int = 3,
) -> list[Tensor]:
    """``x, gate, neuron, spatial, temporal``; weights are scaled so that outputs are of size one."""
    b, c = size[:2]
    neuron = torch.full((b,), neurons - 1) if one_neuron else torch.randint(neurons, (b,))
    return [
        randn(*size, dtype=dtype),
        GATES[gate](b, c).to(dtype),
        neuron.to(DEVICE),
        randn(neurons, outputs, c, 1, 3, 3, dtype=dtype, scale=(6 * c) ** -0.5),
        randn(neurons, outputs, c, 3, 1, 1, dtype=dtype, scale=(6 * c) ** -0.5),
    ]


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64, indices as they are, detached."""
    return [t.detach().double() if t.is_floating_point() else t for t in tensors]


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Gates, scores and statistics that leave nothing trivial."""
    for layer in module.layers:
        layer.gate.normal_()
        summed = layer.scoring.shape[1] * POSITIONS if layer.score_reduction == "sum" else 1
        layer.scoring.mul_(8 / summed)  # scores of size one: a softmax that saturates leaves no gradient
        if layer.norm is not None:
            layer.norm.running_mean.normal_(std=0.2)
            layer.norm.running_var.uniform_(0.1, 0.4)
            layer.norm.weight.uniform_(0.5, 1.5)
            layer.norm.bias.normal_(std=0.3)


def pair(backend: str | None, channels: int, dtype: torch.dtype, **options) -> tuple[reference.DSTS, FusedDSTS]:
    """A reference in float64 and a module in ``dtype`` with the same, rounded weights; ``None`` lets it choose."""
    options = dict(num_neurons=4, score_reduction="mean") | options
    ref = reference.DSTS(channels, dtype=torch.float64, device=DEVICE, **options)
    fused = FusedDSTS(channels, dtype=dtype, device=DEVICE, backend=backend, **options)
    enliven(ref)
    fused.load_state_dict(ref.state_dict())
    ref.load_state_dict(fused.state_dict())
    return ref, fused


@contextlib.contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics are afterwards what they were before."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])


def draws_for(ref: reference.DSTS, x: Tensor, dtype: torch.dtype, hard_fraction: float = 0.5) -> Draws:
    """Draws that any dtype holds exactly and that leave no scores of the reference nearly tied."""
    layer = ref.layers[0]
    draws = sample_draws(
        x.shape[0], x.shape[1], layer.gate.shape[0], len(ref.layers), hard_fraction=hard_fraction, device=DEVICE
    )
    draws = draws._replace(noise=draws.noise.to(dtype).float())

    def routing(draws: Draws) -> Routing:
        with torch.no_grad(), products(), kept_statistics(ref.train()):
            return ref(x.double(), wide_draws(draws), return_routing=True)[1]

    return separate_draws(routing, draws)


def wide_draws(draws: Draws) -> Draws:
    return Draws(draws.noise.double(), draws.hard, draws.gumbel.double())


def features_for(ref: reference.DSTS, x: Tensor) -> Tensor:
    """``x`` on which no scores of the reference are nearly tied in evaluation."""

    def routing(x: Tensor) -> Routing:
        with torch.no_grad(), products():
            return ref.eval()(x.double(), return_routing=True)[1]

    return separate_features(routing, x)


def training_step(
    module: nn.Module, x: Tensor, draws: Draws, grad: Tensor
) -> tuple[Tensor, Routing, dict[str, Tensor]]:
    """Output, routing and every gradient by name, ``"x"`` that of the input."""
    leaf = x.detach().requires_grad_()
    y, routing = module(leaf, draws, return_routing=True)
    trained = {"x": leaf} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, list(trained.values()), grad.to(y.dtype))
    return y.detach(), routing, dict(zip(trained, found, strict=True))


def reference_step(ref: reference.DSTS, x: Tensor, draws: Draws, grad: Tensor):
    """:func:`training_step` of the reference in float64; its running statistics move on."""
    with products():
        return training_step(ref.train(), x.double(), wide_draws(draws), grad.double())


def reference_output(ref: reference.DSTS, x: Tensor) -> tuple[Tensor, Routing]:
    """Evaluation of the reference in float64."""
    with torch.no_grad(), products():
        return ref.eval()(x.double(), return_routing=True)


def assert_same_routing(mine: Routing, theirs: Routing, dtype: torch.dtype) -> None:
    """The same neurons; gates within the tolerance, scores within that of their largest."""
    assert torch.equal(mine.neuron, theirs.neuron)
    assert mine.scores.dtype == torch.float32
    assert_close(mine.scores, theirs.scores, dtype=dtype, name="scores", factor=2)
    assert_close(mine.gate, theirs.gate, dtype=dtype, name="gate")


def assert_same_gradients(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype, factor: float, leave_out: str = "nothing"
) -> None:
    """Every gradient by name. Norms are taken on the device, for a stack of gradients is gigabytes: what
    ``assert_close`` sees is ``||ref|| + ||out - ref||`` beside ``||ref||``, which is the same relative error."""
    assert mine.keys() == theirs.keys()
    for name in theirs:
        if leave_out not in name:
            out, ref = mine[name], theirs[name].double()
            assert out.shape == ref.shape, name
            size = ref.norm()[None]
            error = (out.double() - ref).norm()[None]
            assert_close(size + error, size, dtype=dtype, name=f"gradient of {name}", factor=factor)
