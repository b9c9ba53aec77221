"""The DSTS module word for word in plain PyTorch: the yardstick that everything else is checked against.

Nothing here is clever. Every neuron's scoring convolution is really run, both operators see all channels
under a mask, the mixing convolution follows. It imports nothing else of the package, works in float64, and
shares constructor arguments and ``state_dict`` with :class:`dsts_kernels.FusedDSTS`.

Source: *Dynamic Spatio-Temporal Specialization Learning for Fine-Grained Action Recognition* (ECCV 2022).
"""

from __future__ import annotations

import math
import re
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DSTS", "DSTSLayer", "Draws", "Routing", "gate_values", "sample_draws", "saturating_sigmoid"]


class Draws(NamedTuple):
    """One training step's randomness: noise ``(L, B, C)``, hard ``(L, B)`` bool, gumbel ``(L, B, N)``."""

    noise: Tensor
    hard: Tensor
    gumbel: Tensor


class Routing(NamedTuple):
    """What the layers chose: neuron ``(L, B)``, scores ``(L, B, N)``, gate ``(L, B, C)``."""

    neuron: Tensor
    scores: Tensor
    gate: Tensor


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_padding(kernel: tuple[int, int, int]) -> tuple[int, int, int]:
    return (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)


def saturating_sigmoid(q: Tensor) -> Tensor:
    """``r = max(0, min(1, 1.2*sigmoid(q) - 0.1))``; its gradient is 0 unless ``0 < r < 1``."""
    r = 1.2 * torch.sigmoid(q) - 0.1
    return torch.where((r > 0) & (r < 1), r, r.detach().clamp(0, 1))


def numbers(indices: Tensor) -> list[int]:
    """Python's numbers: brought over together, then read one by one, as torch 2.6 has no ``tolist`` under
    ``torch.func``."""
    return [int(index) for index in indices.cpu()]


def gate_values(logits: Tensor, noise: Tensor | None, hard: Tensor | None) -> Tensor:
    """Gates ``(B, C)`` from the chosen neurons' logits ``(B, C)``; hard ``(B,)``, ``None`` meaning every sample.

    A hard gate takes the value ``b`` and the gradient of ``r`` (straight-through).
    """
    q = logits if noise is None else logits + noise.to(logits.dtype)
    r = saturating_sigmoid(q)
    b = (q > 0).to(q.dtype)
    straight_through = b + (r - r.detach())
    return straight_through if hard is None else torch.where(hard[:, None], straight_through, r)


def sample_draws(
    x: Tensor, num_layers: int, num_neurons: int, noise_std: float, hard_fraction: float, gumbel_scale: float = 1.0
) -> Draws:
    """Fresh randomness from torch's generator: an exact share of hard samples, the odd one by a coin."""
    batch, channels = x.shape[:2]
    noise = torch.randn(num_layers, batch, channels, device=x.device, dtype=score_dtype(x.dtype)) * noise_std
    coin = torch.rand(num_layers, 1, device=x.device)
    rank = torch.rand(num_layers, batch, device=x.device).argsort(dim=1).argsort(dim=1)
    hard = rank < torch.floor(hard_fraction * batch + coin)
    gumbel = (
        -torch.empty(num_layers, batch, num_neurons, device=x.device, dtype=score_dtype(x.dtype)).exponential_().log()
    )
    return Draws(noise, hard, gumbel * gumbel_scale)


def offsets_of(gate_offset: float | tuple[float, ...], num_neurons: int) -> Tensor:
    """Where each neuron's gate logits start: as given, or evenly from ``-gate_offset`` to ``gate_offset``."""
    if isinstance(gate_offset, (tuple, list)):
        return torch.tensor(gate_offset, dtype=torch.float64, device="cpu")
    if num_neurons == 1:
        return torch.zeros(1, dtype=torch.float64, device="cpu")
    return torch.linspace(-gate_offset, gate_offset, num_neurons, dtype=torch.float64, device="cpu")


class DSTSLayer(nn.Module):
    """One literal layer. Arguments as in :class:`dsts_kernels.DSTSLayer`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        num_neurons: int = 10,
        scoring_kernel: tuple[int, int, int] = (1, 1, 1),
        scoring_width: int = 1,
        mixing_kernel: tuple[int, int, int] = (1, 1, 1),
        norm: str | None = "batch",
        activation: str | None = "relu",
        score_reduction: str = "sum",
        gumbel_tau: float = 1.0,
        routing_gradient: str = "selected",
        noise_std: float = 1.0,
        gumbel_scale: float = 1.0,
        score_center: bool | str = False,
        center_in_training: bool = False,
        center_momentum: float = 0.1,
        gate_offset: float | tuple[float, ...] = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        n, c, o = num_neurons, in_channels, out_channels
        self.num_neurons, self.activation = num_neurons, activation
        self.score_reduction, self.gumbel_tau = score_reduction, gumbel_tau
        self.routing_gradient = routing_gradient
        self.noise_std, self.gumbel_scale, self.gate_offset = noise_std, gumbel_scale, gate_offset
        self.started_with = noise_std, gumbel_scale
        self.score_center = "mean" if score_center is True else score_center
        self.center_in_training, self.center_momentum = center_in_training, center_momentum

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.scoring = weight(n, scoring_width * o, c, *scoring_kernel)
        self.gate = weight(n, c)
        self.spatial = weight(n, o, c, 1, 3, 3)
        self.temporal = weight(n, o, c, 3, 1, 1)
        self.mixing = weight(n, o, o, *mixing_kernel)
        self.norm = nn.BatchNorm3d(o, device=device, dtype=dtype) if norm == "batch" else None
        if self.score_center:
            wide = score_dtype(self.gate.dtype)
            self.register_buffer("center", torch.zeros(n, device=device, dtype=wide))
            self.register_buffer("center_batches", torch.zeros((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions as ``torch.nn.Conv3d`` starts them; gates near the threshold (**assumption**) or an offset."""
        for w in (self.scoring, self.spatial, self.temporal, self.mixing):
            bound = 1.0 / math.sqrt(w[0, 0].numel())
            nn.init.uniform_(w, -bound, bound)
        nn.init.normal_(self.gate, std=0.1)
        with torch.no_grad():
            self.gate.add_(offsets_of(self.gate_offset, self.num_neurons).to(self.gate)[:, None])
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.score_center:
            self.center.zero_()
            self.center_batches.zero_()

    @property
    def noise(self) -> Tensor:
        """What a state has of it, by the name that it has there: ``noise_std`` and ``gumbel_scale``."""
        return torch.tensor([self.noise_std, self.gumbel_scale], dtype=torch.float64, device="cpu")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (self.noise_std, self.gumbel_scale) != self.started_with:
            destination[prefix + "noise"] = self.noise

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if prefix + "noise" in state_dict:
            self.noise_std, self.gumbel_scale = state_dict.pop(prefix + "noise").tolist()
        if not self.score_center and prefix + "center" in state_dict:
            what = f"{prefix}center: got a state with one, wanted none: score_center=True keeps it"
            warnings.warn(what, stacklevel=2)
        for name in ("center", "center_batches"):
            if not self.score_center:
                state_dict.pop(prefix + name, None)
            elif prefix + "scoring" in state_dict and prefix + name not in state_dict:
                device = state_dict[prefix + "scoring"].device  # with assign=True it becomes the layer's
                state_dict[prefix + name] = torch.zeros_like(getattr(self, name), device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def follow(self, v: Tensor) -> None:
        """**Ours, not the paper's**: the centre takes in the scores ``(B, N)`` of a training batch."""
        v = v.detach()[v.isfinite().all(1)]
        if not len(v):
            return
        self.center_batches += 1
        seen = int(self.center_batches)
        if self.score_center == "mean":
            self.center += max(self.center_momentum, 1 / seen) * (v.mean(0) - self.center)
        elif seen == 1:
            self.center += v.mean(0) - self.center
        else:  # up for neurons that evaluation would choose for more than their share, down for the others
            away = v - self.center
            taken = torch.nn.functional.one_hot(away.argmax(1), self.num_neurons).to(v.dtype).mean(0)
            spread = away.var(0, correction=0).mean().sqrt()
            self.center += self.center_momentum * spread * torch.sign(taken - 1 / self.num_neurons)

    def scores(self, x: Tensor) -> Tensor:
        """``v_i = sum over all outputs of conv(m_i, x)``: ``(B, N)``, in float32 or better."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(score_dtype(self.scoring.dtype))
            v = []
            for i in range(self.num_neurons):
                m = self.scoring[i].to(wide.dtype)
                response = F.conv3d(wide, m, padding=same_padding(m.shape[2:]))
                v.append(response.mean((1, 2, 3, 4)) if self.score_reduction == "mean" else response.sum((1, 2, 3, 4)))
            return torch.stack(v, dim=1)

    def neuron_output(self, i: int, x: Tensor, gate: Tensor) -> Tensor:
        """``z'`` of neuron ``i`` for samples ``x (B, C, T, H, W)`` under gates ``(B, C)``."""
        g = gate[:, :, None, None, None]
        z = F.conv3d(g * x, self.spatial[i], padding=(0, 1, 1))
        z = z + F.conv3d((1 - g) * x, self.temporal[i], padding=(1, 0, 0))
        return F.conv3d(z, self.mixing[i], padding=same_padding(self.mixing.shape[3:]))

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """One layer on ``x (B, C, T, H, W)``; ``draws`` hold this layer's slices and are unused in evaluation."""
        v = raw = self.scores(x)
        if self.score_center and (self.center_in_training or not self.training):
            v = raw - self.center
        if self.training and self.score_center:
            self.follow(raw)
        if self.training:
            noise, hard, gumbel = draws
            y = torch.softmax((v + gumbel) / self.gumbel_tau, dim=1)
            neuron = (v + gumbel).argmax(dim=1)
        else:
            noise, hard, y = None, None, None
            neuron = v.argmax(dim=1)

        gate = gate_values(self.gate[neuron], noise, hard)
        if self.training and self.routing_gradient == "all":
            out = self.weigh_all(x, noise, hard, y, neuron)
        else:
            out = self.run_chosen(x, gate, neuron)
            if self.training:
                w = y.gather(1, neuron[:, None])[:, 0]
                w = 1 + (w - w.detach())
                out = out * w.to(out.dtype)[:, None, None, None, None]
        if self.norm is not None:
            out = self.norm(out)
        if self.activation == "relu":
            out = F.relu(out)
        return (out, Routing(neuron, v, gate)) if return_routing else out

    def run_chosen(self, x: Tensor, gate: Tensor, neuron: Tensor) -> Tensor:
        """Every sample through its own neuron; the samples of a neuron share its convolutions."""
        rows, outputs = [], []
        for i in sorted(set(numbers(neuron))):
            chosen = (neuron == i).nonzero()[:, 0]
            rows.append(chosen)
            outputs.append(self.neuron_output(i, x[chosen], gate[chosen]))
        if not rows:
            return self.neuron_output(0, x, gate)
        return torch.cat(outputs)[torch.cat(rows).argsort()]

    def weigh_all(self, x: Tensor, noise: Tensor, hard: Tensor, y: Tensor, neuron: Tensor) -> Tensor:
        """``sum_i y_i z'_i`` with straight-through one-hot ``y``: every neuron is evaluated."""
        one_hot = F.one_hot(neuron, self.num_neurons).to(y.dtype)
        weights = one_hot + (y - y.detach())
        out = 0
        for i in range(self.num_neurons):
            gate = gate_values(self.gate[i].expand(x.shape[0], -1), noise, hard)
            z = self.neuron_output(i, x, gate)
            out = out + weights[:, i].to(z.dtype)[:, None, None, None, None] * z
        return out


class DSTS(nn.Module):
    """The literal DSTS module. Arguments, ``state_dict`` and call as in :class:`dsts_kernels.FusedDSTS`."""

    def __init__(
        self,
        in_channels: int,
        *,
        num_layers: int = 3,
        num_neurons: int = 10,
        scoring_kernel: tuple[int, int, int] = (1, 1, 1),
        scoring_width: int = 1,
        mixing_kernel: tuple[int, int, int] = (1, 1, 1),
        norm: str | None = "batch",
        activation: str | None = "relu",
        skip: bool = True,
        noise_std: float = 1.0,
        hard_fraction: float = 0.5,
        score_reduction: str = "sum",
        gumbel_tau: float = 1.0,
        routing_gradient: str = "selected",
        gumbel_scale: float = 1.0,
        score_center: bool | str = False,
        center_in_training: bool = False,
        center_momentum: float = 0.1,
        gate_offset: float | tuple[float, ...] = 0.0,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_neurons, self.skip, self.hard_fraction = num_neurons, skip, hard_fraction
        self.layers = nn.ModuleList(
            DSTSLayer(
                in_channels,
                num_neurons=num_neurons,
                scoring_kernel=scoring_kernel,
                scoring_width=scoring_width,
                mixing_kernel=mixing_kernel,
                norm=norm,
                activation=activation,
                score_reduction=score_reduction,
                gumbel_tau=gumbel_tau,
                routing_gradient=routing_gradient,
                noise_std=noise_std,
                gumbel_scale=gumbel_scale,
                score_center=score_center,
                center_in_training=center_in_training,
                center_momentum=center_momentum,
                gate_offset=gate_offset,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )

    def set_noise(self, *, noise_std: float | None = None, gumbel_scale: float | None = None) -> None:
        """Change the noise of later passes; ``None`` leaves it."""
        for layer in self.layers:
            layer.noise_std = layer.noise_std if noise_std is None else float(noise_std)
            layer.gumbel_scale = layer.gumbel_scale if gumbel_scale is None else float(gumbel_scale)

    def upstream_parameters(self) -> list[nn.Parameter]:
        """Scoring kernels and gates, or the parameters that they are computed from: leaves, each once."""
        own = re.compile(r"layers\.\d+\.(_orig_mod\.)?(parametrizations\.)?(scoring|gate)(_orig|_g|_v|\..+)?")
        upstream = {id(p) for name, p in self.named_parameters(remove_duplicate=False) if own.fullmatch(name)}
        return [p for p in self.parameters() if id(p) in upstream]

    def downstream_parameters(self) -> list[nn.Parameter]:
        """Everything else that trains."""
        upstream = {id(p) for p in self.upstream_parameters()}
        return [p for p in self.parameters() if id(p) not in upstream]

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to the same shape."""
        if self.training and draws is None:
            first = self.layers[0]
            draws = sample_draws(
                x, len(self.layers), self.num_neurons, first.noise_std, self.hard_fraction, first.gumbel_scale
            )
        h, routings = x, []
        for index, layer in enumerate(self.layers):
            mine = Draws(draws.noise[index], draws.hard[index], draws.gumbel[index]) if self.training else None
            h, routing = layer(h, mine, return_routing=True)
            routings.append(routing)
        if self.skip:
            h = h + x
        if not return_routing:
            return h
        return h, Routing(*(torch.stack(field) for field in zip(*routings, strict=True)))
