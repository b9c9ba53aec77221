"""What a DSTS layer can be asked for: names, defaults and limits, once for one layer and for the whole module."""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, TypedDict

import torch

from .backends import BACKENDS
from .ops import _checks
from .ops.mixing_conv import MIXING_KERNELS
from .ops.relevance import SCORING_KERNELS

if TYPE_CHECKING:
    from collections.abc import Callable

CENTERS = (False, True, "mean", "balance")

__all__ = ["LayerOptions", "OptionKeywords", "count", "device_of", "gate_offsets", "number", "one_of", "takes_options"]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The keywords that :class:`DSTSLayer` and :class:`FusedDSTS` share, checked.

    Args:
        num_neurons: ``N``, the specialized neurons to choose from.
        scoring_kernel: ``(1, 1, 1)`` or ``(1, 3, 3)`` (Table 2 of the paper).
        scoring_width: outputs of a scoring kernel, in multiples of ``O`` (Table 2).
        mixing_kernel: ``(1, 1, 1)``, ``(1, 3, 3)`` or ``(3, 1, 1)`` (Table 3).
        norm: ``"batch"`` or ``None``. **Assumption**: one BatchNorm per layer.
        activation: ``"relu"`` or ``None``. **Assumption**: one per layer.
        noise_std: standard deviation of the noise on gate logits in training.
        hard_fraction: share of the batch with hard gates in training.
        score_reduction: ``"sum"`` (the paper) or ``"mean"`` over the same elements.
        gumbel_tau: temperature of the Gumbel-Softmax. **Assumption**: 1.
        routing_gradient: ``"selected"`` scales the chosen neuron's output by its straight-through weight;
            ``"all"`` evaluates every neuron in training, the textbook sum. **Assumption**: ``"selected"``.
        gumbel_scale: scales the Gumbel noise in the choice, ``argmax(scores + gumbel_scale * gumbel)``, which
            ``gumbel_tau`` does not change. **Ours, not the paper's**, which has 1.
        score_center: **ours, not the paper's**, which has ``False``: what is subtracted from each neuron's scores in
            evaluation. ``True`` (or ``"mean"``): their running mean over training samples, so that a neuron that
            scores high on everything does not take everything. ``"balance"``: it starts at the first mean, and
            falls for neurons that evaluation would choose too seldom and rises for the others.
        center_in_training: subtract it in training too; an error under ``torch.utils.checkpoint``, whose second pass
            would subtract another.
        center_momentum: share of a batch in the running mean; of ``"balance"``, the step, in standard deviations of
            the scores over a batch.
        gate_offset: **ours, not the paper's**, which says nothing of the start: mean of the gate logits at the start.
            ``a`` gives neurons means from ``-a`` (mostly temporal) to ``a`` (mostly spatial), evenly; ``N`` numbers
            are one for each neuron.
        backend: the name of a backend for every op; ``None`` chooses.

    Raises:
        TypeError, ValueError: an option out of range: its name, what came, what was wanted.
    """

    num_neurons: int = 10
    scoring_kernel: tuple[int, int, int] = (1, 1, 1)
    scoring_width: int = 1
    mixing_kernel: tuple[int, int, int] = (1, 1, 1)
    norm: str | None = "batch"
    activation: str | None = "relu"
    noise_std: float = 1.0
    hard_fraction: float = 0.5
    score_reduction: str = "sum"
    gumbel_tau: float = 1.0
    routing_gradient: str = "selected"
    gumbel_scale: float = 1.0
    score_center: bool | str = False
    center_in_training: bool = False
    center_momentum: float = 0.1
    gate_offset: float | tuple[float, ...] = 0.0
    backend: str | None = None

    def __post_init__(self) -> None:
        checked = {
            "num_neurons": count("num_neurons", self.num_neurons),
            "scoring_kernel": _kernel("scoring_kernel", self.scoring_kernel, SCORING_KERNELS),
            "scoring_width": count("scoring_width", self.scoring_width),
            "mixing_kernel": _kernel("mixing_kernel", self.mixing_kernel, MIXING_KERNELS),
            "norm": one_of("norm", self.norm, ("batch", None)),
            "activation": one_of("activation", self.activation, ("relu", None)),
            "noise_std": number("noise_std", self.noise_std, 0.0),
            "hard_fraction": number("hard_fraction", self.hard_fraction, 0.0, 1.0),
            "score_reduction": one_of("score_reduction", self.score_reduction, ("sum", "mean")),
            "gumbel_tau": number("gumbel_tau", self.gumbel_tau, 0.0, above=True),
            "routing_gradient": one_of("routing_gradient", self.routing_gradient, ("selected", "all")),
            "gumbel_scale": number("gumbel_scale", self.gumbel_scale, 0.0),
            "score_center": _center("score_center", self.score_center),
            "center_in_training": bool(one_of("center_in_training", self.center_in_training, (False, True))),
            "center_momentum": number("center_momentum", self.center_momentum, 0.0, 1.0, above=True),
            "gate_offset": _offsets("gate_offset", self.gate_offset, self.num_neurons),
            "backend": one_of("backend", self.backend, (None, *BACKENDS)),
        }
        if self.center_in_training and not self.score_center:
            raise ValueError("center_in_training: got True with score_center=False, wanted a centre to subtract")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def read(cls, owner: type, keywords: dict[str, object]) -> LayerOptions:
        """The options among ``keywords`` of a call of ``owner``, which has no other ones; near names come first."""
        unknown = [name for name in keywords if name not in {field.name for field in fields(cls)}]
        if unknown:
            names = list(inspect.signature(owner).parameters)
            near = difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.5)
            listed = ", ".join([*near, *(name for name in names if name not in near)])
            raise TypeError(f"{owner.__name__}: got an argument {unknown[0]!r}, wanted one of {listed}")
        return cls(**keywords)


class OptionKeywords(TypedDict, total=False):
    """:class:`LayerOptions` for type checkers and editors, which complete keywords by it."""

    num_neurons: int
    scoring_kernel: tuple[int, int, int]
    scoring_width: int
    mixing_kernel: tuple[int, int, int]
    norm: str | None
    activation: str | None
    noise_std: float
    hard_fraction: float
    score_reduction: str
    gumbel_tau: float
    routing_gradient: str
    gumbel_scale: float
    score_center: bool | str
    center_in_training: bool
    center_momentum: float
    gate_offset: float | tuple[float, ...]
    backend: str | None


def takes_options(cls: type) -> type:
    """Writes :class:`LayerOptions` out in a class that takes them as ``**options``: signature and docstring."""
    init: Callable = cls.__init__
    stated = inspect.signature(init)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in stated.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert all(field.default is not MISSING for field in fields(LayerOptions))
    options = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in fields(LayerOptions)
    ]
    first = next((i for i, p in enumerate(own) if p.name in ("device", "dtype")), len(own))
    init.__signature__ = stated.replace(parameters=[*own[:first], *options, *own[first:]])
    _, _, rest = inspect.getdoc(LayerOptions).partition("Args:\n")
    lines = rest.partition("\n\nRaises:")[0].rstrip()
    if cls.__doc__ is not None:  # there is none under python -OO
        cls.__doc__ = inspect.cleandoc(cls.__doc__).replace("    {options}", lines)
    return cls


def one_of(name: str, value: object, choices: tuple) -> object:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, choices))}")
    return value


def count(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {_checks.describe(value)}, wanted an int of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")
    return value


def device_of(device: object) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}, wanted a torch device ({error})") from error


def number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> float:
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


def gate_offsets(value: float | tuple[float, ...], neurons: int) -> list[float]:
    """One number for each neuron: as given, or evenly from ``-value`` to ``value``; 0 for a single neuron."""
    if isinstance(value, tuple):
        return list(value)
    return [value * (2 * i / (neurons - 1) - 1) if neurons > 1 else 0.0 for i in range(neurons)]


def _center(name: str, value: object) -> bool | str:
    """``False``, ``"mean"`` or ``"balance"``."""
    value = one_of(name, value, CENTERS)
    return value if isinstance(value, str) else "mean" if value else False


def _offsets(name: str, value: object, neurons: int) -> float | tuple[float, ...]:
    if not isinstance(value, (tuple, list)):
        return number(name, value, -math.inf)
    if len(value) != neurons:
        raise ValueError(f"{name}: got {len(value)} numbers, wanted 1 or num_neurons of them, {neurons}")
    return tuple(number(f"{name}[{i}]", one, -math.inf) for i, one in enumerate(value))


def _kernel(name: str, value: object, choices: tuple) -> tuple[int, int, int]:
    whole = isinstance(value, (tuple, list)) and all(type(k) is int for k in value)
    if not whole or tuple(value) not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, choices))}")
    return tuple(value)
