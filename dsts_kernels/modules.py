"""``FusedDSTS`` and ``DSTSLayer``: the parameters, and the order in which a layer calls its ops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, ops
from .ops import _checks
from .ops._library import autocast_on, listened
from .ops.mixing_conv import MIXING_KERNELS
from .ops.relevance import SCORING_KERNELS
from .routing import Draws, Routing, check_draws, sample_draws

if TYPE_CHECKING:
    from .frozen import FrozenDSTS

__all__ = ["DSTSLayer", "FusedDSTS"]


def _one_of(name: str, value: object, choices: tuple) -> object:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, choices))}")
    return value


def _count(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {_checks.describe(value)}, wanted an int of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")
    return value


def _number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {_checks.describe(value)}, wanted a number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    in_range = (low < value if above else low <= value) and value <= high and math.isfinite(value)
    if not in_range:
        bounds = f"{'above' if above else 'at least'} {low}" + ("" if high == math.inf else f", at most {high}")
        raise ValueError(f"{name}: got {value}, wanted a finite number {bounds}")
    return value


def _kernel(name: str, value: object, choices: tuple) -> tuple[int, int, int]:
    whole = isinstance(value, (tuple, list)) and all(type(k) is int for k in value)
    if not whole or tuple(value) not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, choices))}")
    return tuple(value)


class NotScripted(nn.Module):
    """Refuses ``torch.jit.script``, whose language has no way to choose kernels, with one clear error."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script: got {type(self).__name__}, which chooses its kernels as it runs; wanted "
            "torch.jit.trace, torch.export.export or torch.compile"
        )


class DSTSLayer(NotScripted):
    """One DSTS layer: route each sample to a neuron, gate its channels, convolve, mix, normalise, activate.

    Args:
        in_channels: ``C``.
        out_channels: ``O``; ``None`` means ``C``.
        num_neurons: ``N``, the specialized neurons to choose from.
        scoring_kernel: ``(1, 1, 1)`` or ``(1, 3, 3)`` (Table 2 of the paper).
        scoring_width: outputs of a scoring kernel, in multiples of ``O`` (Table 2).
        mixing_kernel: ``(1, 1, 1)``, ``(1, 3, 3)`` or ``(3, 1, 1)`` (Table 3).
        norm: ``"batch"`` or ``None``. **Assumption**: one BatchNorm a layer.
        activation: ``"relu"`` or ``None``. **Assumption**: one a layer.
        noise_std: standard deviation of the noise on gate logits in training.
        hard_fraction: share of the batch with hard gates in training.
        score_reduction: ``"sum"`` (the paper) or ``"mean"`` over the same elements.
        gumbel_tau: temperature of the Gumbel-Softmax. **Assumption**: 1.
        routing_gradient: ``"selected"`` scales the chosen neuron's output by its straight-through weight;
            ``"all"`` evaluates every neuron in training, the textbook sum. **Assumption**: ``"selected"``.
        backend: the name of a backend for every op; ``None`` chooses.
        device, dtype: of the parameters.

    Shapes: ``(B, C, T, H, W)`` to ``(B, O, T, H, W)``. Parameters: ``scoring (N, scoring_width*O, C,
    *scoring_kernel)``, ``gate (N, C)``, ``spatial (N, O, C, 1, 3, 3)``, ``temporal (N, O, C, 3, 1, 1)``,
    ``mixing (N, O, O, *mixing_kernel)``, ``norm.*``. **Assumption**: operators and mixing are per neuron, no
    biases.
    """

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
        noise_std: float = 1.0,
        hard_fraction: float = 0.5,
        score_reduction: str = "sum",
        gumbel_tau: float = 1.0,
        routing_gradient: str = "selected",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = self.in_channels = _count("in_channels", in_channels)
        o = self.out_channels = _count("out_channels", c if out_channels is None else out_channels)
        n = self.num_neurons = _count("num_neurons", num_neurons)
        self.scoring_kernel = _kernel("scoring_kernel", scoring_kernel, SCORING_KERNELS)
        self.scoring_width = _count("scoring_width", scoring_width)
        self.mixing_kernel = _kernel("mixing_kernel", mixing_kernel, MIXING_KERNELS)
        _one_of("norm", norm, ("batch", None))
        self.activation = _one_of("activation", activation, ("relu", None))
        self.noise_std = _number("noise_std", noise_std, 0.0)
        self.hard_fraction = _number("hard_fraction", hard_fraction, 0.0, 1.0)
        self.score_reduction = _one_of("score_reduction", score_reduction, ("sum", "mean"))
        self.gumbel_tau = _number("gumbel_tau", gumbel_tau, 0.0, above=True)
        self.routing_gradient = _one_of("routing_gradient", routing_gradient, ("selected", "all"))
        self.backend = _one_of("backend", backend, (None, *backends.BACKENDS))
        if dtype is not None and dtype not in _checks.FLOATS:
            raise TypeError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, _checks.FLOATS))}")

        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: got {device!r}, wanted a torch device ({error})") from error

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.scoring = weight(n, self.scoring_width * o, c, *self.scoring_kernel)
        self.gate = weight(n, c)
        self.spatial = weight(n, o, c, 1, 3, 3)
        self.temporal = weight(n, o, c, 3, 1, 1)
        self.mixing = weight(n, o, o, *self.mixing_kernel)
        self.norm = nn.BatchNorm3d(o, device=device, dtype=dtype) if norm == "batch" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions as ``torch.nn.Conv3d`` starts them; gates near the threshold (**assumption**)."""
        for w in (self.scoring, self.spatial, self.temporal, self.mixing):
            bound = 1.0 / math.sqrt(w[0, 0].numel())
            nn.init.uniform_(w, -bound, bound)
        nn.init.normal_(self.gate, std=0.1)
        if self.norm is not None:
            self.norm.reset_parameters()

    def extra_repr(self) -> str:
        kernels = f"scoring_kernel={self.scoring_kernel}, mixing_kernel={self.mixing_kernel}"
        return f"{self.in_channels}, {self.out_channels}, num_neurons={self.num_neurons}, {kernels}"

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to ``(B, O, T, H, W)``, channels-last in memory.

        Args:
            x: features in the module's dtype, any stride order.
            draws: noise ``(B, C)``, hard ``(B,)`` and gumbel ``(B, N)``; sampled in training when left out,
                checked and unused in evaluation.
            return_routing: also return :class:`Routing` with neuron ``(B,)``, scores ``(B, N)``, gate ``(B, C)``.
        """
        gate_logits = self.gate  # a parametrization works anew each time that it is asked
        check_input(x, self.in_channels, gate_logits)
        if draws is not None:
            draws = check_draws(draws, (x.shape[0],), self.in_channels, self.num_neurons, gate_logits)
        elif self.training:
            sampled = sample_draws(
                x.shape[0],
                self.in_channels,
                self.num_neurons,
                1,
                noise_std=self.noise_std,
                hard_fraction=self.hard_fraction,
                device=x.device,
                dtype=x.dtype,
            )
            draws = Draws(*(field[0] for field in sampled))

        scores = ops.relevance_scores(x, self.scoring, reduction=self.score_reduction, backend=self.backend)
        operators = self.spatial, self.temporal, self.mixing
        if self.training:
            noisy = scores + draws.gumbel.to(scores.dtype)
            neuron = noisy.argmax(dim=1)
            gate = self._gate(gate_logits, neuron, draws)
            z = self._operate(x, gate, neuron, operators)
            if noisy.requires_grad:
                z = self._weigh(z, x, neuron, noisy, draws, gate_logits, operators)
        else:
            neuron = scores.argmax(dim=1)
            gate = self._gate(gate_logits, neuron, None)
            z = self._operate(x, gate, neuron, operators)
        if self.norm is not None:
            weight = getattr(self.norm, "weight", None)
            if isinstance(weight, Tensor) and not weight.is_contiguous():
                z = z.contiguous()  # BatchNorm on a CPU reads such a weight wrongly beside channels-last features
            z = self.norm(z)
        if self.activation == "relu":
            z = F.relu(z, inplace=self._owns(z))  # large fresh memory costs more than the pass
        return (z, Routing(neuron, scores, gate)) if return_routing else z

    def _owns(self, z: Tensor) -> bool:
        """Whether nobody else holds what the norm returned: autograd, a hook, a norm of another kind, a tracer."""
        if torch.is_grad_enabled() or listened((z,)):
            return False
        norm = self.norm
        hooks = torch.nn.modules.module._global_forward_hooks
        return norm is None or (type(norm) is nn.BatchNorm3d and not (norm._forward_hooks or hooks))

    def _gate(self, logits: Tensor, neuron: Tensor, draws: Draws | None) -> Tensor:
        noise, hard = (None, None) if draws is None else (draws.noise, draws.hard)
        return ops.semhash_gate(logits, noise, hard, neuron=neuron, backend=self.backend)

    def _operate(self, x: Tensor, gate: Tensor, neuron: Tensor, operators: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """A neuron's output ``z'``: gated convolution, then mixing."""
        spatial, temporal, mixing = operators
        z = ops.gated_conv3d(x, gate, neuron, spatial, temporal, backend=self.backend)
        return ops.mixing_conv3d(z, neuron, mixing, backend=self.backend)

    def _weigh(
        self,
        z: Tensor,
        x: Tensor,
        neuron: Tensor,
        noisy: Tensor,
        draws: Draws,
        logits: Tensor,
        operators: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Give the router its gradient: ``z`` is unchanged in value."""
        shares = torch.softmax(noisy / self.gumbel_tau, dim=1)
        # BatchNorm and ReLU read z and return memory of their own; whatever else follows may change what it gets.
        fresh = self.activation is None and type(self.norm) is not nn.BatchNorm3d
        if self.routing_gradient == "selected":
            return ops.selected_weight(z, shares.gather(1, neuron[:, None])[:, 0], fresh=fresh)
        with torch.no_grad():
            others = []
            for i in range(self.num_neurons):
                chosen = torch.full_like(neuron, i)
                others.append(self._operate(x, self._gate(logits, chosen, draws), chosen, operators))
        return ops.all_neurons_weight(z, shares, others, fresh=fresh)


class FusedDSTS(NotScripted):
    """The DSTS module: ``num_layers`` layers and a skip connection, same shape in and out.

    Args:
        in_channels: ``C``, 1024 for the features of TPN and Video Swin-B.
        num_layers: ``L``.
        skip: add the input to the last layer's output (Table 1 of the paper).

    The other arguments are those of :class:`DSTSLayer`.

    Raises:
        TypeError, ValueError: an argument out of range; input that is not a dense floating 5-d tensor of the
            module's channels, dtype and device; draws of another shape or dtype. Before any kernel runs.

    Source: section 1 of the design; Algorithm 1 and Tables 1 to 3 of the paper for what is studied.

    >>> dsts = FusedDSTS(16, num_neurons=4)
    >>> features = torch.randn(2, 16, 8, 7, 7)
    >>> y, routing = dsts(features, return_routing=True)
    >>> y.shape, routing.neuron.shape
    (torch.Size([2, 16, 8, 7, 7]), torch.Size([3, 2]))
    >>> fast = dsts.eval().freeze()  # folded and packed, inference only
    """

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
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(skip, bool):
            raise TypeError(f"skip: got {_checks.describe(skip)}, wanted a bool")
        self.skip = skip
        self.layers = nn.ModuleList(
            DSTSLayer(
                in_channels,
                num_neurons=num_neurons,
                scoring_kernel=scoring_kernel,
                scoring_width=scoring_width,
                mixing_kernel=mixing_kernel,
                norm=norm,
                activation=activation,
                noise_std=noise_std,
                hard_fraction=hard_fraction,
                score_reduction=score_reduction,
                gumbel_tau=gumbel_tau,
                routing_gradient=routing_gradient,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for _ in range(_count("num_layers", num_layers))
        )

    def upstream_parameters(self) -> list[nn.Parameter]:
        """What Upstream-Downstream Learning trains on the validation split: scoring kernels and gates.

        As :func:`dsts_kernels.learning.upstream_parameters`: leaves, each once, those of a parametrization too.
        """
        from .sides import upstream_parameters

        return upstream_parameters(self)

    def downstream_parameters(self) -> list[nn.Parameter]:
        """Everything else: operators, mixing and norms."""
        from .sides import downstream_parameters

        return downstream_parameters(self)

    def extra_repr(self) -> str:
        return f"skip={self.skip}"

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to the same shape, in the memory format of ``x``.

        Args:
            x: features in the module's dtype, any stride order.
            draws: see :class:`Draws`; sampled in training when left out, checked and unused in evaluation.
            return_routing: also return :class:`Routing`.
        """
        first = self.layers[0]
        gate = first._parameters.get("gate")
        # Parameters may be sharded or made up until a layer runs; then it is the layer that checks dtype and device.
        check_input(x, first.in_channels, gate if type(gate) is nn.Parameter else None)
        size = (len(self.layers), x.shape[0])
        if draws is not None:
            draws = check_draws(draws, size, first.in_channels, first.num_neurons, x)
        elif self.training:
            draws = sample_draws(
                x.shape[0],
                first.in_channels,
                first.num_neurons,
                len(self.layers),
                noise_std=first.noise_std,
                hard_fraction=first.hard_fraction,
                device=x.device,
                dtype=x.dtype,
            )
        h, routings = x, []
        for index, layer in enumerate(self.layers):
            mine = None if draws is None else Draws(*(field[index] for field in draws))
            h, routing = layer(h, mine, return_routing=True)
            routings.append(routing)
        h = ops.to_memory_format(h, memory_format(x))
        h = x + h if self.skip else h
        if not return_routing:
            return h
        return h, Routing(*(torch.stack(field) for field in zip(*routings, strict=True)))

    def freeze(
        self, *, dtype: torch.dtype | None = None, algorithm: str = "auto", backend: str | None = None
    ) -> FrozenDSTS:
        """A folded and packed copy for inference: see :class:`FrozenDSTS`.

        Args:
            dtype: of its features and packed weights; ``None`` keeps the module's.
            algorithm: of its convolutions: ``"auto"``, ``"direct"`` or ``"winograd"``.
            backend: the name of a backend; ``None`` keeps the module's choice.
        """
        from .frozen import FrozenDSTS

        _one_of("backend", backend, (None, *backends.BACKENDS))
        return FrozenDSTS(self, dtype=dtype, algorithm=algorithm, backend=backend)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format a drop-in layer returns for ``x``."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def check_input(x: object, channels: int, like: Tensor | None) -> None:
    """Refuse what is not ``(B, channels, T, H, W)`` features in the dtype and on the device of ``like``, if given."""
    x = _checks.features("x", x, channels)
    if like is None:
        return
    if x.device != like.device:
        raise ValueError(f"x: got a tensor on {x.device}, wanted {like.device}, where the module is")
    if x.dtype != like.dtype and not autocast_on(x):
        raise TypeError(f"x: got {_checks.describe(x)}, wanted {like.dtype}, the module's dtype")
