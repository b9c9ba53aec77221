"""What tests of every GPU backend share: the backend, inputs, modules in pairs, and the literal answers in float64.

Kernels run on CPU tensors: Triton's in its interpreter where ``TRITON_INTERPRET=1``, else those of the CUDA backend,
emulated. Triton decides at its import whether it interprets, so that must be set from outside: ``TRITON_INTERPRET=1
pytest tests/backends/triton tests/backends/gpu``. Emulated tests take a C++ compiler and are asked for by ``pytest -m
emulated``; collecting them compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels import FusedDSTS, reference
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import GpuBackend
from dsts_kernels.testing import TOLERANCES, assert_close

from ...conftest import require_triton
from ..conftest import TRITON


def triton_backend() -> GpuBackend:
    """Triton's kernels, in its interpreter."""
    require_triton()
    return BACKENDS["triton"]


def cuda_backend() -> GpuBackend:
    """The CUDA backend's kernels, emulated: see ``tests/emulator``."""
    from .emulation import EmulatedBackend

    return EmulatedBackend()


BACKEND = triton_backend() if TRITON else cuda_backend()
KERNELS = BACKEND.kernels

# The interpreter gets bfloat16 products wrong; before sm_80, where the CUDA backend has none, the fixture skips.
HALF = (torch.float16,) if TRITON else (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
emulated = [pytest.mark.usefixtures("emulation"), *([] if TRITON else [pytest.mark.emulated])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SIZE = (2, 3, 4)  # frames, rows, columns: one tile, not full
TILES = (3, 5, 4)  # several tiles, ragged on every side


def hard_gate(b: int, c: int) -> Tensor:
    return (torch.rand(b, c) < 0.5).float()


def soft_gate(b: int, c: int) -> Tensor:
    """Some channels saturated at exactly 0 and 1."""
    return (torch.rand(b, c) * 1.4 - 0.2).clamp(0, 1)


GATES: dict[str, Callable[[int, int], Tensor]] = {
    "mixed": lambda b, c: torch.where(torch.arange(b)[:, None] % 2 == 0, hard_gate(b, c), soft_gate(b, c)),
    "hard": hard_gate,
    "soft": soft_gate,
    "all-spatial": torch.ones,
    "all-temporal": torch.zeros,
    "all-half": lambda b, c: torch.full((b, c), 0.5),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-first": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "strided": lambda x: x.repeat(1, 2, 1, 1, 2)[:, ::2, :, :, ::2],
    "transposed": lambda x: x.permute(4, 0, 3, 1, 2).contiguous().permute(1, 3, 4, 2, 0),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


def gated_inputs(
    batch: int = 3,
    channels: int = 24,
    outputs: int = 24,
    size: Sequence[int] = SIZE,
    dtype: torch.dtype = torch.float32,
    gate: str = "mixed",
    neuron: Sequence[int] | None = None,
    neurons: int = 3,
) -> list[Tensor]:
    """``x, gate, neuron, spatial, temporal``; outputs are of size one."""
    scale = (6 * channels) ** -0.5
    return [
        torch.randn(batch, channels, *size).to(dtype),
        GATES[gate](batch, channels).to(dtype),
        torch.randint(neurons, (batch,)) if neuron is None else torch.tensor(neuron, dtype=torch.int64),
        (torch.randn(neurons, outputs, channels, 1, 3, 3) * scale).to(dtype),
        (torch.randn(neurons, outputs, channels, 3, 1, 1) * scale).to(dtype),
    ]


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64, indices as they are, detached."""
    return [t.detach().double() if t.is_floating_point() else t for t in tensors]


def literal_gated(x: Tensor, gate: Tensor, neuron: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    """One sample at a time, all channels under a mask."""
    rows = []
    for b, n in enumerate(neuron.tolist()):
        g = gate[b, :, None, None, None]
        z = F.conv3d((g * x[b])[None], spatial[n], padding=(0, 1, 1))
        rows.append(z + F.conv3d(((1 - g) * x[b])[None], temporal[n], padding=(1, 0, 0)))
    return torch.cat(rows)


def literal_mixing(z: Tensor, neuron: Tensor, mixing: Tensor) -> Tensor:
    """One sample at a time."""
    padding = tuple(k // 2 for k in mixing.shape[3:])
    return torch.cat([F.conv3d(z[b : b + 1], mixing[n], padding=padding) for b, n in enumerate(neuron.tolist())])


def literal_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients in float64 of every floating input."""
    inputs = wide(inputs)
    trained = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    return list(torch.autograd.grad(function(*inputs), trained, grad.double()))


NAMES = ("x", "gate", "spatial", "temporal")


def check_gated(inputs: Sequence[Tensor], needs: Sequence[bool] = (True,) * 4, forward: bool = True) -> list[Tensor]:
    """The backend's output and gradients against the literal ones; returns what the backend gave."""
    dtype, found = inputs[0].dtype, []
    ref = literal_gated(*wide(inputs))
    if forward:
        out = BACKEND.gated_conv3d(*inputs)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last_3d)
        assert_close(out, ref, name="output")
        found.append(out)
    if any(needs):
        grad = torch.randn(ref.shape).to(dtype)
        mine = BACKEND.gated_conv3d_backward(grad, *inputs, list(needs))
        theirs = literal_gradients(literal_gated, inputs, grad)
        kinds = [inputs[i].dtype for i in (0, 1, 3, 4)]
        for name, need, g, h, kind in zip(NAMES, needs, mine, theirs, kinds, strict=True):
            assert (g is not None) == need, name
            if need:
                assert g.dtype == kind
                coarser = max(dtype, kind, key=TOLERANCES.__getitem__)
                assert_close(g, h, dtype=coarser, name=f"gradient of {name}", factor=2)
                found.append(g)
    return found


@torch.no_grad()
def pair(channels: int, dtype: torch.dtype = torch.float32, **options) -> tuple[reference.DSTS, FusedDSTS]:
    """A reference in float64 and a module with the same rounded weights; gates, scores and statistics are lively."""
    options = dict(num_neurons=3, num_layers=2, score_reduction="mean") | options
    ref = reference.DSTS(channels, dtype=torch.float64, **options)
    fused = FusedDSTS(channels, dtype=dtype, backend=BACKEND.name, **options)
    for layer in ref.layers:
        layer.gate.normal_()
        layer.scoring.mul_(8 if options["score_reduction"] == "mean" else 8 / (layer.scoring.shape[1] * 60))
        if layer.norm is not None:
            layer.norm.running_mean.normal_(std=0.2)
            layer.norm.running_var.uniform_(0.1, 0.4)
            layer.norm.weight.uniform_(0.5, 1.5)
            layer.norm.bias.normal_(std=0.3)
    fused.load_state_dict(ref.state_dict())
    ref.load_state_dict(fused.state_dict())
    return ref, fused


def everything(x: Tensor, inputs: list[Tensor], fast: torch.nn.Module) -> list[Tensor]:
    """What every kernel that counts within a sample makes of ``x``."""
    operands, grad = [x, *inputs[1:]], torch.ones(len(x), 12, *SIZE, dtype=x.dtype)
    found = [*BACKEND.gated_conv3d_backward(grad, *operands, [True] * 4)]
    found += BACKEND.gated_conv3d_backward(grad, *operands, [True, False, False, False])[:1]
    found += BACKEND.gated_conv3d_backward(grad, *operands, [False, True, False, False])[1:2]
    return [*found, BACKEND.gated_conv3d(*operands), BACKEND.tap_sums(x, 1), BACKEND.tap_sums(x, 9), fast(x)]
