"""What ops are tried on: gates, stride orders, neurons and noise, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIZE = (2, 3, 4)  # frames, rows, columns: one tile, not full
TILES = (3, 5, 4)  # several tiles of an interpreted or emulated kernel, ragged on every side
Device = str | torch.device


def drawn_in(dtype: torch.dtype) -> torch.dtype:
    """float64 has digits that float32 has not; half precision is rounded from float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*size: int, dtype: torch.dtype = torch.float32, device: Device = "cpu", scale: float = 1.0) -> Tensor:
    """Normal noise, rounded to ``dtype``."""
    return (torch.randn(size, dtype=drawn_in(dtype), device=device) * scale).to(dtype)


def hard_gate(b: int, c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(b, c) < 0.5).to(dtype)


def soft_gate(b: int, c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some channels saturated at exactly 0 and 1."""
    return (torch.rand(b, c, dtype=drawn_in(dtype)) * 1.4 - 0.2).clamp(0, 1).to(dtype)


def mixed_gate(b: int, c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hard and soft samples in turn."""
    return torch.where(torch.arange(b)[:, None] % 2 == 0, hard_gate(b, c, dtype), soft_gate(b, c, dtype))


GATES: dict[str, Callable[..., Tensor]] = {
    "mixed": mixed_gate,
    "hard": hard_gate,
    "soft": soft_gate,
    "all-spatial": lambda b, c, dtype=torch.float32: torch.ones(b, c, dtype=dtype),
    "all-temporal": lambda b, c, dtype=torch.float32: torch.zeros(b, c, dtype=dtype),
    "all-half": lambda b, c, dtype=torch.float32: torch.full((b, c), 0.5, dtype=dtype),
}
NEURONS: dict[str, Callable[[int, int], Tensor]] = {
    "any": lambda b, n: torch.randint(n, (b,)),
    "one": lambda b, n: torch.full((b,), n - 1),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-first": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "strided": lambda x: x.repeat(1, 2, 1, 1, 2)[:, ::2, :, :, ::2],
    "transposed": lambda x: x.permute(4, 0, 3, 1, 2).contiguous().permute(1, 3, 4, 2, 0),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
FORMATS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last_3d}


def neurons_of(neuron: str | Sequence[int], batch: int, neurons: int, device: Device = "cpu") -> Tensor:
    """``(batch,)`` indices: as given, or a name of :data:`NEURONS`."""
    chosen = NEURONS[neuron](batch, neurons) if isinstance(neuron, str) else torch.tensor(neuron, dtype=torch.int64)
    return chosen.to(device)


def gated_inputs(
    batch: int = 3,
    channels: int = 24,
    outputs: int = 24,
    size: Sequence[int] = SIZE,
    dtype: torch.dtype = torch.float32,
    gate: str = "mixed",
    neuron: str | Sequence[int] = "any",
    neurons: int = 3,
    device: Device = "cpu",
) -> list[Tensor]:
    """``x, gate, neuron, spatial, temporal``; weights are scaled so that outputs are of size one."""
    scale = (6 * channels) ** -0.5
    return [
        randn(batch, channels, *size, dtype=dtype, device=device),
        GATES[gate](batch, channels, dtype).to(device),
        neurons_of(neuron, batch, neurons, device),
        randn(neurons, outputs, channels, 1, 3, 3, dtype=dtype, device=device, scale=scale),
        randn(neurons, outputs, channels, 3, 1, 1, dtype=dtype, device=device, scale=scale),
    ]


def mixing_inputs(
    batch: int = 3,
    outputs: int = 24,
    size: Sequence[int] = SIZE,
    kernel: Sequence[int] = (1, 1, 1),
    dtype: torch.dtype = torch.float32,
    neuron: str | Sequence[int] = "any",
    neurons: int = 3,
    device: Device = "cpu",
) -> list[Tensor]:
    """``z, neuron, mixing``; outputs are of size one."""
    scale = (outputs * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    return [
        randn(batch, outputs, *size, dtype=dtype, device=device),
        neurons_of(neuron, batch, neurons, device),
        randn(neurons, outputs, outputs, *kernel, dtype=dtype, device=device, scale=scale),
    ]


def every_second(x: Tensor, dim: int = -1) -> Tensor:
    """The same values as every second of a tensor twice as long in ``dim``; the others are wrong."""
    dim %= x.dim()
    return torch.stack((x, x + 99), dim + 1).select(dim + 1, 0)
