"""What the interpreter's tests share: modules that need triton, inputs, and the literal answers in float64.

Importing this skips a test module where kernels cannot run in the interpreter. Triton decides at its import whether it
interprets, so ``TRITON_INTERPRET=1`` must be set from outside: ``TRITON_INTERPRET=1 pytest tests/backends/triton``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.triton import LAUNCHERS, load
from dsts_kernels.testing import TOLERANCES, assert_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)
tl = pytest.importorskip("triton.language", reason="triton is not installed")
triton = importlib.import_module("triton")
MODULES = {name: load(name) for name in (*LAUNCHERS, "schedule")}
launch = MODULES["launch"]

TRITON = BACKENDS["triton"]
DTYPES = (torch.float32, torch.float16)  # the interpreter gets bfloat16 products wrong
interpreted = pytest.mark.usefixtures("interpreter")
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
        out = TRITON.gated_conv3d(*inputs)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last_3d)
        assert_close(out, ref, name="output")
        found.append(out)
    if any(needs):
        grad = torch.randn(ref.shape).to(dtype)
        mine = TRITON.gated_conv3d_backward(grad, *inputs, list(needs))
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


class Spy:
    """Stands in for a kernel: launches it, with constants of ours, and keeps what it was given."""

    def __init__(self, kernel: object, **constants: object) -> None:
        self.kernel, self.constants, self.launches = kernel, constants, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: object, **constants: object) -> None:
            self.launches.append((grid, constants))
            self.kernel[grid](*args, **constants | self.constants)

        return run


def spy_on(monkeypatch: pytest.MonkeyPatch, name: str, **constants: object) -> Spy:
    """A :class:`Spy` in place of the kernel ``name`` wherever it is launched from."""
    places = [module for module in MODULES.values() if hasattr(module, name)]
    spy = Spy(getattr(places[0], name), **constants)
    for module in places:
        monkeypatch.setattr(module, name, spy)
    return spy


KERNELS = sorted({name for module in MODULES.values() for name in vars(module) if name.endswith("_kernel")})
