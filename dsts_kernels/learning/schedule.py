"""``NoiseSchedule``: noise of choices and gates that falls as training goes on, **ours, not the paper's**.

Gumbel noise (standard deviation 1.28) that is larger than what samples add to scores sends a sample anywhere, so that
neurons never see classes apart; ``gumbel_tau`` does not change that, as ``argmax(scores + gumbel)`` does not depend on
it. A schedule sets the modules' ``gumbel_scale`` and ``noise_std``, which every pass reads.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .. import reference
from ..gates import SemHashGate
from ..layer import DSTSLayer
from ..options import count, number, one_of

__all__ = ["NoiseSchedule"]

SHAPES = ("linear", "cosine", "constant")
Range = float | tuple[float, float]


class NoiseSchedule:
    """Sets ``gumbel_scale`` and ``noise_std`` of every DSTS layer in ``model``, and ``noise_std`` of every
    :class:`~dsts_kernels.SemHashGate`, at once and after each :meth:`step`.

    Args:
        model: with one such module at least, in any wrapper.
        steps: over which values go from the first to the last; they stay there afterwards.
        gumbel_scale: ``(first, last)``, one number for both, or ``None``, which leaves what the modules have.
        noise_std: the same.
        shape: ``"linear"``, ``"cosine"`` (half a wave) or ``"constant"`` (the first value, always).
        wait: steps at the first value, before the others.

    It is no learning rate scheduler, and any loop can call it. :meth:`state_dict` belongs into checkpoints: continued
    from one, values are the same bits. :meth:`~dsts_kernels.FusedDSTS.graphed` graphs follow from one capture, and
    ``torch.compile`` compiles twice, not once a value.

    Raises:
        TypeError, ValueError: an argument out of range; a model with nothing to set.

    >>> schedule = NoiseSchedule(model, steps=1000, gumbel_scale=(1.0, 0.1), noise_std=(1.0, 0.2), shape="cosine")
    >>> for batch in loader:
    ...     train_on(batch)
    ...     schedule.step()
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        gumbel_scale: Range | None = None,
        noise_std: Range | None = None,
        shape: str = "linear",
        wait: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
        self.steps, self.wait = count("steps", steps), count("wait", wait, 0)
        self.shape = one_of("shape", shape, SHAPES)
        given = {"gumbel_scale": gumbel_scale, "noise_std": noise_std}
        self.ranges = {name: _range(name, value) for name, value in given.items()}
        if all(own is None for own in self.ranges.values()):
            raise ValueError("gumbel_scale, noise_std: got None for both, wanted one at least")
        kinds = DSTSLayer, reference.DSTSLayer
        self._layers = [part for part in model.modules() if isinstance(part, kinds)]
        self._gates = [part for part in model.modules() if isinstance(part, SemHashGate)]
        if not (self._layers or (self._gates and noise_std is not None)):
            raise ValueError(f"model: got {type(model).__name__} without a FusedDSTS, wanted one at least")
        self.done = 0
        self._set()

    @property
    def values(self) -> dict[str, float]:
        """What is set now, by name."""
        share = min(max((self.done - self.wait) / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = 0.5 * (1.0 - math.cos(math.pi * share))
        elif self.shape == "constant":
            share = 0.0
        ranges = {name: own for name, own in self.ranges.items() if own is not None}
        return {name: own[1] if share == 1.0 else own[0] + (own[1] - own[0]) * share for name, own in ranges.items()}

    def step(self) -> dict[str, float]:
        """One step of training is done: sets the values of the next, and returns them."""
        self.done += 1
        self._set()
        return self.values

    def _set(self) -> None:
        values = self.values
        for layer in self._layers:
            for name, value in values.items():
                setattr(layer, name, value)
        for gate in self._gates if "noise_std" in values else ():
            gate.noise_std = values["noise_std"]

    def _settings(self) -> dict[str, Any]:
        ranges = {name: None if own is None else list(own) for name, own in self.ranges.items()}
        return {"steps": self.steps, "wait": self.wait, "shape": self.shape, **ranges}

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and its settings: plain values."""
        return {"done": self.done, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the state of a schedule of other settings; nothing has changed.
        """
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(f"{name}: got the state of a schedule with {state[name]!r}, wanted {own!r}")
        self.done = count("done", state["done"], 0)
        self._set()


def _range(name: str, value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name}: got {value!r}, wanted a number, or the first and the last")
    return number(name, value[0], 0.0), number(name, value[1], 0.0)
