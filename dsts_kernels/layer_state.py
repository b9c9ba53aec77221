"""What a layer's state holds beside its parameters: the centre of its scores, and noise that was changed meanwhile.

States with and without either load. A state of a layer that has neither is what it always was, key by key.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends.base import accumulate_dtype
from .module_base import Routed

__all__ = ["NOISE", "LayerState"]

NOISE = "noise"  # (2,) float64: noise_std and gumbel_scale
CENTER = ("center", "center_batches")


class LayerState(Routed):
    """A layer with a centre, or ``None``, and noise that may change."""

    center: Tensor | None
    score_center: bool | str
    noise_std: float
    gumbel_scale: float
    _noise_at_start: tuple[float, float]

    @property
    def noise(self) -> Tensor:
        """``noise_std`` and ``gumbel_scale`` as a state has them: tools look every name of a state up in its module."""
        return torch.tensor((self.noise_std, self.gumbel_scale), dtype=torch.float64, device="cpu")

    @property
    def subtracted(self) -> Tensor | None:
        """The centre, where ``score_center`` says that there is one now."""
        return self.center if self.score_center else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerState:
        """Follows a move or a cast; the centre stays as wide as scores are, and is not rounded on the way."""
        before = self._buffers["center"]
        super()._apply(fn, recurse)
        after = self._buffers["center"]
        if after is not None and after.dtype != (wide := accumulate_dtype(after.dtype)):
            self._buffers["center"] = before.to(after.device, wide)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, those of versions too that had neither centre nor scale."""
        super().__setstate__(state)
        own = {"score_center": False, "center_in_training": False, "center_momentum": 0.1, "gate_offset": 0.0}
        own |= {"gumbel_scale": 1.0, "_noise_at_start": (self.noise_std, 1.0)}
        for name, value in own.items():
            self.__dict__.setdefault(name, value)
        for name in CENTER:
            self._buffers.setdefault(name, None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (self.noise_std, self.gumbel_scale) != self._noise_at_start:
            destination[prefix + NOISE] = self.noise

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if prefix + "filters" in state_dict:  # at once: a list of all keys and sizes would hide it
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'state_dict'}: got the state of a frozen layer, wanted that of a "
                f"{type(self).__name__}: freeze this module first, by freeze() or freeze_dsts(model.eval())"
            )
        noise = state_dict.pop(prefix + NOISE, None)
        if noise is not None:
            self._take_noise(prefix + NOISE, noise, error_msgs)
        theirs = {name: prefix + name for name in CENTER if prefix + name in state_dict}
        if self.center is None and theirs:
            for key in theirs.values():
                del state_dict[key]
            warnings.warn(
                f"{prefix}center: got a state with one, wanted none: this layer has score_center=False and will choose "
                "as if there were none; score_center=True keeps it",
                stacklevel=2,
            )
        elif self.center is not None and not theirs:
            tensors = (value for key, value in state_dict.items() if key.startswith(prefix))
            given = next((value for value in tensors if isinstance(value, Tensor)), None)
            if given is not None:  # with assign=True its device becomes the layer's
                anew = {name: torch.zeros_like(self._buffers[name], device=given.device) for name in CENTER}
                state_dict |= {prefix + name: value for name, value in anew.items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_noise(self, key: str, noise: object, error_msgs: list[str]) -> None:
        fits = isinstance(noise, Tensor) and noise.shape == (2,) and noise.is_floating_point() and not noise.is_meta
        values = noise.tolist() if fits else ()
        if not fits or not all(0 <= value < float("inf") for value in values):
            error_msgs.append(f"{key}: got {noise!r}, wanted noise_std and gumbel_scale, two numbers of at least 0")
            return
        self.noise_std, self.gumbel_scale = values
