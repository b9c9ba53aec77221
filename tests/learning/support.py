"""A small model with DSTS, optimizers for both sides, and batches with their randomness given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsts_kernels import Draws, FusedDSTS
from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, upstream_parameters

CLASSES = 4
RATE = 0.1


class Net(nn.Module):
    """A convolution, DSTS with its draws given, pooling, a classifier."""

    def __init__(self, channels: int = 6, dtype: torch.dtype = torch.float64, **options: object) -> None:
        super().__init__()
        options = {"num_layers": 2, "num_neurons": 3} | options
        self.stem = nn.Conv3d(3, channels, (1, 3, 3), padding=(0, 1, 1), dtype=dtype)
        self.dsts = FusedDSTS(channels, dtype=dtype, **options)
        self.head = nn.Linear(channels, CLASSES, dtype=dtype)

    def forward(self, x: Tensor, *draws: Tensor) -> Tensor:
        """``draws`` are noise ``(B, L, C)``, hard ``(B, L)`` and gumbel ``(B, L, N)``, samples first."""
        given = Draws(*(field.transpose(0, 1) for field in draws)) if draws else None
        return self.head(self.dsts(self.stem(x), given).mean((2, 3, 4)))


def batch(size: int, *, channels: int = 6, layers: int = 2, neurons: int = 3, dtype: torch.dtype = torch.float64):
    """``((clips, noise, hard, gumbel), targets)``."""
    noise = torch.randn(size, layers, channels, dtype=dtype)
    hard = torch.rand(size, layers) < 0.5
    gumbel = -torch.empty(size, layers, neurons, dtype=dtype).exponential_().log()
    return (torch.randn(size, 3, 2, 4, 4, dtype=dtype), noise, hard, gumbel), torch.arange(size) % CLASSES


def sgd(module: nn.Module, rate: float = RATE, **options: object) -> dict[str, torch.optim.Optimizer]:
    sides = {"upstream_optimizer": upstream_parameters(module), "downstream_optimizer": downstream_parameters(module)}
    return {k: torch.optim.SGD([p for p in v if p.requires_grad], rate, **options) for k, v in sides.items()}


def learner(module: nn.Module, **options: object) -> UpstreamDownstream:
    return UpstreamDownstream(module, F.cross_entropy, **sgd(module), **options)


def everything(module: nn.Module, *optimizers: torch.optim.Optimizer) -> list:
    """Copies of all that a step may change: weights, buffers, optimizer states, generators."""
    found = [t.detach().clone() for t in module.state_dict().values()]
    for optimizer in optimizers:
        for own in optimizer.state.values():
            found += [v.clone() if isinstance(v, Tensor) else v for v in own.values()]
    return [*found, torch.get_rng_state()]


def same(first: list, second: list) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )
