"""Is the routing alive: how evenly neurons are used, which are dead, how many gates no longer learn.

Counted on the device as layers run, without a host synchronisation; read when wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layer import DSTSLayer
from ..routing import Routing
from .sharded import whole

__all__ = ["SATURATION", "RoutingMonitor", "RoutingStatistics", "balance_loss", "evaluation_routing"]

SATURATION = math.log(11.0)  # 1.2 * sigmoid(q) - 0.1 is 0 or 1, and its gradient 0, where |q| is at least this


class RoutingStatistics(NamedTuple):
    """What a :class:`RoutingMonitor` counted, by layer; on the CPU.

    Attributes:
        samples: ``(L,)`` int64, routed since the last reset.
        usage: ``(L, N)`` float64, the share of samples that each neuron took; NaN without samples.
        entropy: ``(L,)`` bits, ``log2(N)`` where all are used alike.
        dead: ``(L,)`` int64, neurons that took no sample.
        saturated: ``(L,)``, share of the layer's gate logits at which the saturating sigmoid has no gradient
            (noise apart).
        spatial: ``(L, N)``, share of channels that each neuron's hard gates send to the spatial operator.
        usage_without_noise, entropy_without_noise, dead_without_noise: of the same samples, had each layer chosen
            without its Gumbel noise, as it does in evaluation. Noise spreads samples over neurons that evaluation never
            takes: only these tell of the routing that was learned. In evaluation both are the same.
        flipped: ``(L, N)``, share of each neuron's gate logits on the other side of the threshold than at the start:
            :attr:`RoutingMonitor.start`.
    """

    samples: Tensor
    usage: Tensor
    entropy: Tensor
    dead: Tensor
    saturated: Tensor
    spatial: Tensor
    usage_without_noise: Tensor
    entropy_without_noise: Tensor
    dead_without_noise: Tensor
    flipped: Tensor


class _Hook:
    """A layer's forward hook. It counts for its monitor alone: what a copy of the layer carries does nothing.

    Copied or pickled together, monitor and hook keep to each other.
    """

    def __init__(self, index: int, monitor: RoutingMonitor | None = None) -> None:
        self.index, self.monitor = index, monitor

    def __call__(self, layer: DSTSLayer, inputs: tuple, output: object) -> None:
        if self.monitor is not None and isinstance(output, tuple):
            self.monitor._count(self.index, layer, output[1])

    def __reduce__(self) -> tuple:
        return _Hook, (self.index,)


class RoutingMonitor:
    """Counts the neurons that every DSTS layer of ``model`` chooses, from now on, by forward hooks.

    Layers must agree in ``num_neurons``. Each pass counts, in training and evaluation, but while ``enabled`` is false.
    With ``keep`` the last pass's routing stays, in training with its graph, for :attr:`last` and :meth:`balance`.
    Gates are remembered as they are now, for ``flipped``: make the monitor before training, or set :attr:`start`.

    Hooks stay until :meth:`remove`, or the end of a ``with`` block of the monitor's. A monitor comes before the first
    compiled pass, as ``torch.compile`` traces hooks once. A copy of the model (``deepcopy``, ``AveragedModel``,
    ``torch.save``) has hooks that do nothing; a copy of model and monitor in one is watched by that
    monitor, which goes on from the same counts. Counts are those of this process; where parameters are sharded all
    processes must ask for :meth:`statistics`, as gates are gathered for it.

    >>> monitor = RoutingMonitor(model)
    >>> loss = model(clips).sum()
    >>> monitor.statistics().dead
    """

    def __init__(self, model: nn.Module, *, keep: bool = False) -> None:
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, DSTSLayer)}
        if not self.layers:
            raise ValueError(f"model: got {type(model).__name__} without a FusedDSTS or DSTSLayer, wanted one at least")
        sizes = {layer.num_neurons for layer in self.layers.values()}
        if len(sizes) > 1:
            raise ValueError(f"model: got layers of {sorted(sizes)} neurons, wanted one number for a monitor")
        self.enabled, self.keep = True, keep
        self._counts: list[Tensor | None] = [None] * len(self.layers)
        self._start = [layer.gate.detach().clone() for layer in self.layers.values()]
        self._routed: dict[int, Routing] = {}
        self._hooks = [_Hook(index, self) for index in range(len(self.layers))]
        self._handles: list[RemovableHandle] = []
        self._watching = False
        self.__enter__()

    def __enter__(self) -> RoutingMonitor:
        if not self._watching:
            watched = zip(self.layers.values(), self._hooks, strict=True)
            self._handles = [layer.register_forward_hook(hook) for layer, hook in watched]
            self._watching = True
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_routed": {}}  # a graph can be neither copied nor saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for hook in self._hooks:
            hook.monitor = self

    def _count(self, index: int, layer: DSTSLayer, routing: Routing) -> None:
        if not (self.enabled and self._watching):  # compiled code goes on calling a hook that it was traced with
            return
        if self.keep:
            self._routed[index] = routing
        neurons, neuron = layer.num_neurons, routing.neuron
        found = self._counts[index]
        if found is None or found.device != neuron.device:
            with torch.inference_mode(False):  # or training could not count on
                empty = torch.zeros(2, neurons, dtype=torch.int64, device=neuron.device)
                found = self._counts[index] = empty if found is None else empty.copy_(found)
        one = torch.ones_like(neuron)
        found[0].index_add_(0, neuron, one)
        quiet = layer.evaluation_scores(routing.scores.detach()).argmax(-1) if layer.training else neuron
        found[1].index_add_(0, quiet, one)

    def reset(self) -> None:
        """Count from zero."""
        for count in self._counts:
            if count is not None:
                count.zero_()

    def remove(self) -> None:
        """Take the hooks off the model; a ``with`` block of the monitor's puts them back."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watching = [], False

    def forget(self) -> None:
        """Let go of the last pass's routing, and of its graph."""
        self._routed = {}

    def statistics(self) -> RoutingStatistics:
        """What was counted since the last reset; this waits for the device."""
        layers = list(self.layers.values())
        chosen, quiet = torch.stack(
            [
                torch.zeros(2, layer.num_neurons, dtype=torch.int64, device="cpu") if count is None else count.cpu()
                for layer, count in zip(layers, self._counts, strict=True)
            ],
            dim=1,
        )
        gates, start = [whole(layer.gate.detach()) for layer in layers], map(whole, self._start)
        saturated = torch.stack([(g.abs() >= SATURATION).double().mean() for g in gates]).cpu()
        spatial = torch.stack([(g > 0).double().mean(1) for g in gates]).cpu()
        flipped = [((g > 0) != (s.to(g.device) > 0)).double().mean(1) for g, s in zip(gates, start, strict=True)]
        return RoutingStatistics(
            chosen.sum(1),
            *_spread(chosen),
            saturated,
            spatial,
            *_spread(quiet),
            torch.stack(flipped).cpu(),
        )

    @property
    def start(self) -> list[Tensor]:
        """Gate logits ``(N, C)`` of each layer when the monitor was made, or as they were set; for checkpoints.

        Raises:
            ValueError: when set to another number of tensors or other shapes.
        """
        return [whole(gate) for gate in self._start]

    @start.setter
    def start(self, gates: Sequence[Tensor]) -> None:
        shapes = [tuple(layer.gate.shape) for layer in self.layers.values()]
        if [tuple(gate.shape) for gate in gates] != shapes:
            raise ValueError(f"start: got {[tuple(g.shape) for g in gates]}, wanted gates of shapes {shapes}")
        self._start = [gate.detach().clone() for gate in gates]

    @property
    def last(self) -> list[Routing]:
        """What each layer chose in the last pass that it saw; needs ``keep=True``."""
        if len(self._routed) < len(self.layers):
            raise RuntimeError("last: not every layer has run, or keep is False")
        return [self._routed[index] for index in range(len(self.layers))]

    def balance(self, evaluation: bool = False) -> Tensor:
        """:func:`balance_loss` of the last pass, the mean over layers; needs ``keep=True``.

        With ``evaluation`` it is that of the choices that evaluation would make of the same samples, without noise and
        less the centre: noise alone spreads samples evenly, whatever evaluation does with them.
        """
        routed = self.last
        if evaluation:
            routed = map(evaluation_routing, self.layers.values(), routed)
        return torch.stack([balance_loss(routing) for routing in routed]).mean()


def evaluation_routing(layer: DSTSLayer, routing: Routing) -> Routing:
    """``routing (B, ...)`` of a pass in the layer's present mode with the scores and choices that evaluation has."""
    scores = layer.evaluation_scores(routing.scores)
    return routing._replace(neuron=scores.detach().argmax(-1), scores=scores)


def _spread(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Usage, its entropy in bits, and dead neurons of counts ``(L, N)``."""
    usage = counts.double() / counts.sum(1, keepdim=True)
    entropy = -(torch.special.xlogy(usage, usage)).sum(1) / math.log(2.0)
    return usage, entropy, (counts == 0).sum(1)


def balance_loss(routing: Routing, tau: float = 1.0) -> Tensor:
    """**Ours, not the paper's**: 1 where samples spread evenly over neurons, ``N`` where one neuron takes all.

    ``N * sum_i f_i * p_i``: ``f_i`` is the share of the batch that neuron ``i`` took (no gradient), ``p_i`` the mean
    of ``softmax(scores / tau)``. As in mixtures of experts (Fedus et al., JMLR 2022, equation 4).

    Args:
        routing: of a layer, ``(B,)`` and ``(B, N)``, or of a module, ``(L, B)`` and ``(L, B, N)``.
        tau: temperature; scores of large features want a large one.

    Returns a scalar.
    """
    if not tau > 0:
        raise ValueError(f"tau: got {tau!r}, wanted a number above 0")
    neurons = routing.scores.shape[-1]
    taken = torch.nn.functional.one_hot(routing.neuron, neurons).to(routing.scores.dtype).mean(-2)
    wanted = torch.softmax(routing.scores / tau, -1).mean(-2)
    return neurons * (taken * wanted).sum(-1).mean()
