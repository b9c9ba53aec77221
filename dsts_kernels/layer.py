"""``DSTSLayer``: a layer's parameters, and the order in which it calls its ops."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .module_base import Routed, check_input
from .norm import normalize
from .ops import _checks
from .ops._library import listened
from .options import LayerOptions, OptionKeywords, count, device_of, takes_options
from .routing import Draws, Routing, check_draws, sample_draws

__all__ = ["DSTSLayer"]


@takes_options
class DSTSLayer(Routed):
    """One DSTS layer: route each sample to a neuron, gate its channels, convolve, mix, normalise, activate.

    Args:
        in_channels: ``C``.
        out_channels: ``O``; ``None`` means ``C``.
        {options}
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        super().__init__()
        chosen = LayerOptions.read(type(self).__name__, options)
        c = self.in_channels = count("in_channels", in_channels)
        o = self.out_channels = count("out_channels", c if out_channels is None else out_channels)
        n = self.num_neurons = chosen.num_neurons
        self.scoring_kernel, self.scoring_width = chosen.scoring_kernel, chosen.scoring_width
        self.mixing_kernel, self.activation = chosen.mixing_kernel, chosen.activation
        self.noise_std, self.hard_fraction = chosen.noise_std, chosen.hard_fraction
        self.score_reduction, self.gumbel_tau = chosen.score_reduction, chosen.gumbel_tau
        self.routing_gradient, self.backend = chosen.routing_gradient, chosen.backend
        if dtype is not None and dtype not in _checks.FLOATS:
            raise TypeError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, _checks.FLOATS))}")
        device = device_of(device)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.scoring = weight(n, self.scoring_width * o, c, *self.scoring_kernel)
        self.gate = weight(n, c)
        self.spatial = weight(n, o, c, 1, 3, 3)
        self.temporal = weight(n, o, c, 3, 1, 1)
        self.mixing = weight(n, o, o, *self.mixing_kernel)
        self.norm = nn.BatchNorm3d(o, device=device, dtype=dtype) if chosen.norm == "batch" else None
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

        noise, hard, gumbel = draws if self.training else (None, None, None)
        scoring, operators = self.scoring, (self.spatial, self.temporal, self.mixing)
        named = dict(reduction=self.score_reduction, backend=self.backend)
        # BatchNorm and ReLU read z and return memory of their own; whatever else follows may change what it gets.
        fresh = self.activation is None and type(self.norm) is not nn.BatchNorm3d
        trained = live = None
        if not self.training:
            live = ops.live_layer(x, scoring, gate_logits, *operators[:2], **named)
        elif self.routing_gradient == "selected" and not fresh:
            trained = ops.training_layer(x, scoring, gate_logits, *operators, draws, tau=self.gumbel_tau, **named)
        if trained is not None:
            routed, z = trained
        elif live is None:
            routed = ops.route(
                x,
                scoring,
                gate_logits,
                noise=noise,
                hard=hard,
                gumbel=gumbel,
                tau=self.gumbel_tau,
                share=self.training and self.routing_gradient == "selected",
                **named,
            )
            z = self._operate(x, routed.gate, routed.neuron, operators)
        else:
            routed, z = live
            z = ops.mixing_conv3d(z, routed.neuron, operators[2], backend=self.backend)
        neuron, scores, gate, _ = routed
        if self.training and trained is None and scores.requires_grad:
            z = self._weigh(z, x, routed, draws, gate_logits, operators, fresh)
        if self.norm is not None:
            z = normalize(self.norm, z)
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

    def _operate(self, x: Tensor, gate: Tensor, neuron: Tensor, operators: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """A neuron's output ``z'``: gated convolution, then mixing."""
        spatial, temporal, mixing = operators
        z = ops.gated_conv3d(x, gate, neuron, spatial, temporal, backend=self.backend)
        return ops.mixing_conv3d(z, neuron, mixing, backend=self.backend)

    def _weigh(
        self,
        z: Tensor,
        x: Tensor,
        routed: ops.Routed,
        draws: Draws,
        logits: Tensor,
        operators: tuple[Tensor, Tensor, Tensor],
        fresh: bool,
    ) -> Tensor:
        """Give the router its gradient: ``z`` is unchanged in value."""
        if self.routing_gradient == "selected":
            return ops.selected_weight(z, routed.share, fresh=fresh)
        neuron, scores = routed.neuron, routed.scores
        shares = torch.softmax((scores + draws.gumbel.to(scores.dtype)) / self.gumbel_tau, dim=1)
        with torch.no_grad():
            others = []
            for i in range(self.num_neurons):
                chosen = torch.full_like(neuron, i)
                gate = ops.semhash_gate(logits, draws.noise, draws.hard, neuron=chosen, backend=self.backend)
                others.append(self._operate(x, gate, chosen, operators))
        return ops.all_neurons_weight(z, shares, others, fresh=fresh)
