"""What accuracy costs when a trained model routes or gates otherwise: counterfactuals, each with an interval.

A gate share, a usage or a mutual information may look like specialisation and carry nothing. These changes ask the
model itself:

    routing  ``random routing``      each clip takes a neuron at random
             ``permuted neurons``    neurons swap places, so that every clip takes another one than its own
             ``best single neuron``  all clips take one neuron of a layer, the best that other clips show
    gates    ``gates flipped``       every spatial channel temporal, every temporal one spatial
             ``random gates``        each channel of each neuron by a coin
             ``all spatial``, ``all temporal``

Behind a changed layer, others choose anew, by the features that they are then given.

Routing that costs nothing when permuted does not matter to the answer, whatever it follows. A single neuron that does
as well says that one expert would have been enough. Gates whose flip costs nothing are not specialised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..learning.batches import call, pair
from ..ops._checks import describe
from ..routing import Routing
from .changed import Change, Choice, changed, dsts_layers

__all__ = ["CHANGES", "Counterfactual", "Measured", "counterfactuals", "paired_interval"]

ROUTING = ("random routing", "permuted neurons", "best single neuron")
GATES = ("gates flipped", "random gates", "all spatial", "all temporal")
CHANGES = ROUTING + GATES
Z95 = 1.959963984540054  # standard normal, 97.5%
SWEEPS = 3  # over the layers, at most, in the search for the best single neuron
FOLDS = 2


class Counterfactual(NamedTuple):
    """What one change costs.

    Attributes:
        name: of :data:`CHANGES`.
        layers: places of the layers that were changed.
        accuracy: under the change, the mean over its draws.
        cost: accuracy of the model as it is, less this one.
        low, high: the 95% interval of the cost over clips: :func:`paired_interval`. Where a change is drawn for all
            clips at once (a permutation, gates by coin), it is that of these draws.
        draws: the accuracy under each draw; one where nothing is drawn.
    """

    name: str
    layers: tuple[int, ...]
    accuracy: float
    cost: float
    low: float
    high: float
    draws: tuple[float, ...]

    @property
    def costs(self) -> bool:
        """Whether it costs more than its own interval: the interval lies above 0."""
        return self.low > 0


class Measured(NamedTuple):
    """A model as it is and under every change.

    Attributes:
        accuracy: top-1 as it is.
        low, high: its 95% interval over clips (Wilson's).
        clips: how many.
        correct: ``(clips,)`` bool, as it is.
        label: ``(clips,)`` int64.
        neuron: ``(L, clips)`` int64, the neurons that it chooses.
        rows: a :class:`Counterfactual` for every change.
    """

    accuracy: float
    low: float
    high: float
    clips: int
    correct: Tensor
    label: Tensor
    neuron: Tensor
    rows: tuple[Counterfactual, ...]


def wilson_interval(correct: Tensor) -> tuple[float, float]:
    """95% interval of a share, Wilson's, for ``correct (B,)`` bool."""
    n, p = len(correct), float(correct.double().mean())
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(difference: Tensor) -> tuple[float, float]:
    """95% interval of the mean of paired differences between -1 and 1, such as "right before, less right after".

    Agresti and Min's: half a pair more in each of the four cells (Statistics in Medicine 24, 2005), so that it is as
    wide as it should be with few clips, and where no clip changes. Differences may be means over draws.

    Args:
        difference: ``(B,)``, with at least one.
    """
    d = difference.double()
    n = len(d) + 2
    mean = float(d.sum()) / n
    spread = math.sqrt(max(0.0, (float(d.square().sum()) + 1) / n - mean**2) / n)
    return max(-1.0, mean - Z95 * spread), min(1.0, mean + Z95 * spread)


def derangement(size: int, generator: torch.Generator) -> Tensor:
    """A permutation that moves every element: uniform over cycles through all of them (Sattolo)."""
    order = torch.arange(size, device="cpu")
    for last in range(size - 1, 0, -1):
        other = int(torch.randint(last, (), generator=generator, device="cpu"))
        order[[last, other]] = order[[other, last]]
    return order


class _Runs:
    """A model over all batches, as it is or changed."""

    def __init__(self, model: nn.Module, batches: Iterable, predict: Callable[[nn.Module, Any], Tensor]) -> None:
        if iter(batches) is batches:
            raise ValueError(
                f"batches: got {type(batches).__name__}, which gives its batches once; wanted a DataLoader or a list: "
                "they are gone through for every change"
            )
        self.model, self.batches, self.predict = model, batches, predict
        self.layers = dsts_layers(model)
        self.device = next(iter(model.parameters())).device

    def correct(self, change: Change) -> tuple[Tensor, Tensor]:
        """Whether each clip is right ``(B,)``, and labels ``(B,)``, on the CPU."""
        right, labels = [], []
        with changed(self.model, change):
            for batch in self.batches:
                inputs, label = pair("batches", batch)
                label = torch.as_tensor(label, device=self.device)
                logits = self.predict(self.model, _moved(inputs, self.device))
                if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(label):
                    raise ValueError(
                        f"predict: gave {describe(logits)}, wanted logits of shape ({len(label)}, classes)"
                    )
                right.append((logits.argmax(1) == label).cpu())
                labels.append(label.cpu())
        if not right:
            raise ValueError("batches: got none, wanted one at least")
        return torch.cat(right), torch.cat(labels)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(own, device) for key, own in value.items()}
    return type(value)(_moved(own, device) for own in value) if isinstance(value, (tuple, list)) else value


def _as_it_is(index: int, layer: nn.Module, own: Routing) -> Choice:
    return Choice(own.neuron, own.gate > 0.5)


def _with_gates_of(layer: nn.Module, neuron: Tensor) -> Choice:
    """Another neuron brings its own gates."""
    return Choice(neuron, layer.gate[neuron] > 0)


def _restricted(change: Change, layers: Sequence[int]) -> Change:
    return lambda index, layer, own: (change if index in layers else _as_it_is)(index, layer, own)


def _random_routing(generator: torch.Generator) -> Change:
    def change(index: int, layer: nn.Module, own: Routing) -> Choice:
        drawn = torch.randint(layer.num_neurons, own.neuron.shape, generator=generator, device="cpu")
        return _with_gates_of(layer, drawn.to(own.neuron.device))

    return change


def _permuted(layers: list[nn.Module], generator: torch.Generator) -> Change:
    orders = [derangement(layer.num_neurons, generator) for layer in layers]
    return lambda index, layer, own: _with_gates_of(layer, orders[index].to(own.neuron.device)[own.neuron])


def _single(neurons: Sequence[int]) -> Change:
    return lambda index, layer, own: _with_gates_of(layer, torch.full_like(own.neuron, neurons[index]))


def _random_gates(layers: list[nn.Module], generator: torch.Generator) -> Change:
    coins = [torch.rand(layer.gate.shape, generator=generator, device="cpu") < 0.5 for layer in layers]
    return lambda index, layer, own: Choice(own.neuron, coins[index].to(own.neuron.device)[own.neuron])


def _fixed_gates(rule: Callable[[Tensor], Tensor]) -> Change:
    return lambda index, layer, own: Choice(own.neuron, rule(own.gate > 0.5))


FIXED = {
    "gates flipped": _fixed_gates(torch.logical_not),
    "all spatial": _fixed_gates(torch.ones_like),
    "all temporal": _fixed_gates(torch.zeros_like),
}


def _best_single(runs: _Runs, neuron: Tensor, layers: Sequence[int], generator: torch.Generator) -> Tensor:
    """Whether each clip is right where all take one neuron of each layer, the best that the other half shows.

    From the most used neurons on, a layer at a time takes its best neuron while the others keep theirs. Chosen on the
    clips that it is counted on, the best would look better than it is.
    """
    used = [int(own.bincount().argmax()) for own in neuron]
    seen: dict[tuple[int, ...], Tensor] = {}

    def right(chosen: list[int]) -> Tensor:
        key = tuple(chosen[index] for index in layers)
        if key not in seen:
            seen[key] = runs.correct(_restricted(_single(chosen), layers))[0]
        return seen[key]

    clips = neuron.shape[1]
    half = torch.randperm(clips, generator=generator, device="cpu") % FOLDS
    found = torch.zeros(clips, dtype=torch.bool, device="cpu")
    for fold in range(FOLDS):
        others = half != fold if clips > 1 else half == fold
        chosen = list(used)
        for _ in range(SWEEPS):
            before = list(chosen)
            for index in layers:
                tried = [[*chosen[:index], k, *chosen[index + 1 :]] for k in range(runs.layers[index].num_neurons)]
                chosen = max(tried, key=lambda one: (int(right(one)[others].sum()), one == chosen))
            if chosen == before:
                break
        found[half == fold] = right(chosen)[half == fold]
    return found


def counterfactuals(
    model: nn.Module,
    batches: Iterable,
    *,
    changes: Sequence[str] = CHANGES,
    layers: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    predict: Callable[[nn.Module, Any], Tensor] = call,
) -> Measured:
    """Top-1 accuracy of a model as it is, and what each change of its routing or gates costs.

    Args:
        model: in evaluation, with a FusedDSTS (or DSTSLayer, or the literal ones) at any depth, not frozen.
        batches: of ``(inputs, labels)``, gone through many times in one order, such as a DataLoader without shuffling.
        changes: of :data:`CHANGES`. Layers of one neuron have no other: changes of routing leave them as they are, and
            are left out where no layer has two.
        layers: places of the layers to change, in the order of ``named_modules``; ``None`` changes all at once.
        draws: how often what is random is drawn.
        seed: of the draws; torch's own generators are left alone.
        predict: ``predict(model, inputs)`` gives logits ``(B, classes)``.

    Raises:
        TypeError, ValueError: an argument out of range; names it.

    **Ours, not the paper's.**
    """
    runs = _Runs(model, batches, predict)
    layers = _checked_layers(layers, len(runs.layers))
    unknown = [name for name in changes if name not in CHANGES]
    if unknown:
        raise ValueError(f"changes: got {unknown[0]!r}, wanted some of {', '.join(CHANGES)}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws: got {draws!r}, wanted an int of at least 1")
    if max(runs.layers[index].num_neurons for index in layers) < 2:
        changes = [name for name in changes if name not in ROUTING]

    chosen: list[list[Tensor]] = [[] for _ in runs.layers]

    def note(index: int, layer: nn.Module, own: Routing) -> Choice:
        chosen[index].append(own.neuron.cpu())
        return _as_it_is(index, layer, own)

    base, label = runs.correct(note)
    neuron = torch.stack([torch.cat(own) for own in chosen])
    rows = []
    for name in changes:
        # Each change has a stream of its own, so that one more does not change the others.
        generator = torch.Generator("cpu").manual_seed(seed * len(CHANGES) + CHANGES.index(name))
        right = torch.stack(_drawn(name, runs, neuron, layers, draws, generator)).double()
        difference = base.double() - right.mean(0)
        interval = paired_interval(difference)
        accuracies = tuple(right.mean(1).tolist())
        rows.append(Counterfactual(name, layers, float(right.mean()), float(difference.mean()), *interval, accuracies))
    return Measured(float(base.double().mean()), *wilson_interval(base), len(base), base, label, neuron, tuple(rows))


def _checked_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    layers = tuple(range(count)) if layers is None else tuple(layers)
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(count)):
        raise ValueError(f"layers: got {layers}, wanted some of 0 to {count - 1}, each once")
    return layers


def _drawn(
    name: str, runs: _Runs, neuron: Tensor, layers: Sequence[int], draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Whether each clip is right under a change, a draw at a time; once where nothing is drawn."""
    if name == "best single neuron":
        return [_best_single(runs, neuron, layers, generator)]
    if name in FIXED:
        return [runs.correct(_restricted(FIXED[name], layers))[0]]
    make = {
        "random routing": lambda: _random_routing(generator),
        "permuted neurons": lambda: _permuted(runs.layers, generator),
        "random gates": lambda: _random_gates(runs.layers, generator),
    }[name]
    return [runs.correct(_restricted(make(), layers))[0] for _ in range(draws)]
