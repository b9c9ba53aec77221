"""``DSTSLayer``: a layer's parameters, and the order in which it calls its ops."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .backends.base import accumulate_dtype
from .centering import follow, run_again
from .layer_state import LayerState
from .module_base import check_input
from .norm import is_plain, normalize
from .ops import _checks
from .ops._library import listened
from .options import LayerOptions, OptionKeywords, count, device_of, gate_offsets, number, takes_options
from .routing import Draws, Routing, check_draws, sample_draws

__all__ = ["DSTSLayer"]


@takes_options
class DSTSLayer(LayerState):
    """One DSTS layer: route each sample to a neuron, gate its channels, convolve, mix, normalise, activate.

    Args:
        in_channels: ``C``.
        out_channels: ``O``; ``None`` means ``C``.
        {options}
        device, dtype: of the parameters.

    Shapes: ``(B, C, T, H, W)`` to ``(B, O, T, H, W)``. Parameters: ``scoring (N, scoring_width*O, C,
    *scoring_kernel)``, ``gate (N, C)``, ``spatial (N, O, C, 1, 3, 3)``, ``temporal (N, O, C, 3, 1, 1)``,
    ``mixing (N, O, O, *mixing_kernel)``, ``norm.*``. **Assumption**: operators and mixing are per neuron, no
    biases. With ``score_center`` there are buffers ``center (N,)``, in float32 or float64, and ``center_batches``.
    A state without them starts the centre anew; one with them warns a layer that has none.
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
        chosen = LayerOptions.read(type(self), options)
        c = self.in_channels = count("in_channels", in_channels)
        o = self.out_channels = count("out_channels", c if out_channels is None else out_channels)
        n = self.num_neurons = chosen.num_neurons
        self.scoring_kernel, self.scoring_width = chosen.scoring_kernel, chosen.scoring_width
        self.mixing_kernel, self.activation = chosen.mixing_kernel, chosen.activation
        self.noise_std, self.hard_fraction = chosen.noise_std, chosen.hard_fraction
        self.score_reduction, self.gumbel_tau = chosen.score_reduction, chosen.gumbel_tau
        self.routing_gradient, self.gumbel_scale = chosen.routing_gradient, chosen.gumbel_scale
        self.score_center, self.center_in_training = chosen.score_center, chosen.center_in_training
        self.center_momentum, self.gate_offset = chosen.center_momentum, chosen.gate_offset
        self.backend = chosen.backend
        self._noise_at_start = self.noise_std, self.gumbel_scale
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
        wide = accumulate_dtype(self.gate.dtype)
        with_center = self.score_center is not False
        self.register_buffer("center", torch.empty(n, device=device, dtype=wide) if with_center else None)
        batches = torch.empty((), device=device, dtype=torch.int64) if with_center else None
        self.register_buffer("center_batches", batches)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions as ``torch.nn.Conv3d`` starts them; gates near the threshold (**assumption**), or as
        ``gate_offset`` says; the centre at 0."""
        for w in (self.scoring, self.spatial, self.temporal, self.mixing):
            bound = 1.0 / math.sqrt(w[0, 0].numel())
            nn.init.uniform_(w, -bound, bound)
        nn.init.normal_(self.gate, std=0.1)
        if self.gate_offset:
            with torch.no_grad():
                offsets = gate_offsets(self.gate_offset, self.num_neurons)
                self.gate.add_(torch.tensor(offsets, dtype=self.gate.dtype, device=self.gate.device)[:, None])
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.center is not None:
            self.center.zero_()
            self.center_batches.zero_()

    def set_noise(self, *, noise_std: float | None = None, gumbel_scale: float | None = None) -> None:
        """Change the noise of later passes; ``None`` leaves it. What was changed travels in ``state_dict``.

        A :class:`FusedDSTS` draws for all of its layers with the noise of the first: change it by its own method.

        Args:
            noise_std: standard deviation of the noise on gate logits.
            gumbel_scale: of the Gumbel noise on scores.
        """
        noise_std = self.noise_std if noise_std is None else number("noise_std", noise_std, 0.0)
        gumbel_scale = self.gumbel_scale if gumbel_scale is None else number("gumbel_scale", gumbel_scale, 0.0)
        self.noise_std, self.gumbel_scale = noise_std, gumbel_scale

    def evaluation_scores(self, scores: Tensor) -> Tensor:
        """What evaluation would choose by, of ``scores (B, N)`` that a pass in the layer's present mode returned."""
        center = self.subtracted
        return scores if center is None or self.center_in_training or not self.training else scores - center

    def extra_repr(self) -> str:
        scores = f"scoring_kernel={self.scoring_kernel}, score_reduction={self.score_reduction!r}"
        return (
            f"{self.in_channels}, {self.out_channels}, num_neurons={self.num_neurons}, {scores}, "
            f"mixing_kernel={self.mixing_kernel}"
        )

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
                gumbel_scale=self.gumbel_scale,
                device=x.device,
                dtype=x.dtype,
            )
            draws = Draws(*(field[0] for field in sampled))

        noise, hard, gumbel = draws if self.training else (None, None, None)
        center = self.subtracted
        subtracts = center is not None and (self.center_in_training or not self.training)
        scoring, operators = self.scoring, (self.spatial, self.temporal, self.mixing)
        named = dict(reduction=self.score_reduction, backend=self.backend)
        # BatchNorm and ReLU read z and return memory of their own; whatever else follows may change what it gets.
        fresh = self.activation is None and type(self.norm) is not nn.BatchNorm3d
        trained = live = None
        if not subtracts and not self.training:
            live = ops.live_layer(x, scoring, gate_logits, *operators[:2], **named)
        elif not subtracts and self.routing_gradient == "selected" and not fresh:
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
                center=center if subtracts else None,
                tau=self.gumbel_tau,
                share=self.training and self.routing_gradient == "selected",
                **named,
            )
            z = self._operate(x, routed.gate, routed.neuron, operators)
        else:
            routed, z = live
            z = ops.mixing_conv3d(z, routed.neuron, operators[2], backend=self.backend)
        neuron, scores, gate, _ = routed
        if center is not None and self.training:
            self._follow(center, scores.detach(), subtracts)
        if self.training and trained is None and scores.requires_grad:
            z = self._weigh(z, x, routed, draws, gate_logits, operators, fresh)
        if self.norm is not None:
            z = normalize(self.norm, z)
        if self.activation == "relu":
            z = F.relu(z, inplace=self._owns(z))  # large fresh memory costs more than the pass
        return (z, Routing(neuron, scores, gate)) if return_routing else z

    def _follow(self, center: Tensor, scores: Tensor, subtracted: bool) -> None:
        """Bring the centre up to date, once for each batch; ``subtracted`` says whether scores are less the centre."""
        if not run_again():
            away = scores if subtracted else scores - center
            follow(center, self.center_batches, away, self.score_center, self.center_momentum)
        elif subtracted:
            raise RuntimeError(
                "center_in_training: got a pass that runs once more in a backward pass (torch.utils.checkpoint), when "
                "the centre has moved on and choices may be others; wanted DSTS outside of it, or "
                "center_in_training=False"
            )

    def _owns(self, z: Tensor) -> bool:
        """Whether nobody else holds what the norm returned: autograd, a hook, a norm of another kind, a tracer."""
        if torch.is_grad_enabled() or listened((z,), profiled=False):
            return False
        return self.norm is None or is_plain(self.norm)

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
