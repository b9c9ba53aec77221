"""What tests of launches without a GPU share: what Triton would compile, a driver, every op in turn."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import pytest
import torch

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.triton import LAUNCHERS, load
from dsts_kernels.routing import sample_draws

from ...support.inputs import LAYOUTS, gated_inputs
from ...support.targets import INTERPRETED, require_triton

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
require_triton()
tl, triton = map(importlib.import_module, ("triton.language", "triton"))
launch = load("launch")
MODULES = [load(name) for name in LAUNCHERS]
IN_GLUON = [load(f"gluon.{name}") for name in ("conv", "data_gradient", "weight_gradient")]
REMEMBERED = [
    (module, name, function)
    for module in (*MODULES, *IN_GLUON)
    for name, function in vars(module).items()
    if name.endswith("_launch") and function.__module__ == module.__name__
]
DEVICE, STREAM = 3, 77


def forget_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test nothing is remembered from others, whose compiler was another one."""
    for module, name, function in REMEMBERED:
        monkeypatch.setattr(module, name, launch.remembered(function.__wrapped__))


class Driver:
    """Of a device that is not there."""

    device = DEVICE

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        assert device == self.device
        return STREAM


@functools.cache
def binder_of(kernel: object) -> Callable:
    """What Triton reads a specialization off, for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


def specialization(kernel: object, args: tuple, constants: dict) -> str:
    """What Triton compiles for these arguments: types, alignment, constants and options."""
    _, found, options = binder_of(kernel)(*args, **constants)
    return f"{kernel.__name__}: {found} {sorted(options.items())}"


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, one element away from where memory is aligned."""
    storage = t.new_empty(t.numel() + 1)[1:]
    return storage.as_strided(t.shape, t.stride()).copy_(t) if t.is_contiguous() else storage.view(t.shape).copy_(t)


def everything(channels: int, outputs: int, size: tuple[int, int, int], batch: int, dtype: torch.dtype, change) -> None:
    """Every op of the backend, forward and backward."""
    backend, kernels = BACKENDS["triton"], load("kernels")
    x, gate, neuron, spatial, temporal = gated_inputs(batch, channels, outputs, size, dtype)
    x, gate, spatial = change(x), change(gate), change(spatial)
    draws = sample_draws(batch, channels, 3, 1)
    noise, hard, gumbel = (field[0] for field in draws)
    scoring = torch.zeros(3, channels, 1)
    for drawn in ((None, None, None), (noise, hard, gumbel)):
        kernels.route(x, scoring, gate[:1].expand(3, -1).contiguous(), *drawn, 1, 1.0, True)
    scores, sums, grads = torch.zeros(batch, 3), torch.zeros(batch, channels), (torch.zeros(batch, 3), gate, gate[:, 0])
    for gradients in (grads, (None, *grads[1:])):
        kernels.route_backward(
            gradients, scores, gumbel, neuron, sums, scoring, gate[:1].expand(3, -1).contiguous(), noise, 1, 1.0,
            (True, True, True),
        )  # fmt: skip
    for taps in (1, 9):
        backend.tap_sums(x, taps)
    for noise, hard in ((None, None), (draws.noise[0], draws.hard[0])):
        backend.semhash_gate(gate, None, noise, hard)
        backend.semhash_gate_backward(gate, gate, torch.zeros(batch, dtype=torch.int64), noise)
    y = backend.gated_conv3d(x, gate, neuron, spatial, temporal)
    for needs in ([True] * 4, [True, False, False, False], [False, False, True, False]):
        backend.gated_conv3d_backward(y, x, gate, neuron, spatial, temporal, needs)
    for kernel in ((1, 1, 1), (1, 3, 3)):
        mixing = torch.zeros(3, outputs, outputs, *kernel, dtype=dtype)
        backend.mixing_conv3d(y, neuron, mixing)
        backend.mixing_conv3d_backward(y, y, neuron, mixing, [True, True])


CASES = [
    (channels, outputs, size, batch, dtype, layout)
    for channels, outputs in ((16, 24), (17, 16), (1, 1))
    for size, batch in (((2, 4, 4), 3), ((1, 1, 1), 1), ((2, 4, 4), 16))
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (*LAYOUTS, "shifted")
]


def all_cases() -> None:
    for channels, outputs, size, batch, dtype, layout in CASES:
        change = shifted if layout == "shifted" else LAYOUTS[layout]
        of_features = change if change is shifted else lambda t, change=change: change(t) if t.dim() == 5 else t
        everything(channels, outputs, size, batch, dtype, of_features)
