"""``SemHashGate``: the gate of a DSTS layer as a layer of its own, for logits that come from anywhere.

It draws what the formulas draw, and hands logits, noise and which samples are hard to the op, samples by what a sample
holds: logits of any shape are a view of two dimensions there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .backends import BACKENDS
from .backends.base import accumulate_dtype
from .module_base import NotScripted
from .ops import _checks
from .ops._library import tracked
from .options import count, number, one_of

__all__ = ["SemHashGate"]


class SemHashGate(NotScripted):
    """Gates of 0 and 1 out of logits, by Improved SemHash: noise, soft and hard samples, a straight-through gradient.

    With ``s = sigmoid(q)``::

        q    = logits + noise_std * n             n normal, fresh for every element; training
        r    = max(0, min(1, 1.2 * s - 0.1))      the soft gate
        b    = 1 where q > 0, else 0              the hard gate
        gate = b for hard_fraction of the samples, r for the others
        dgate/dlogits = 1.2 * s * (1 - s) where 0 < r < 1, else 0      of soft and of hard samples

    In evaluation ``q = logits`` and every gate is hard: no randomness is drawn, and the gradient is the same.

    Args:
        channels: of the logits, in the first dimension behind those of the samples; ``None`` takes any number.
        sample_dims: how many leading dimensions number samples, each of which is hard or soft as a whole: 1 for
            ``(B, C)`` and ``(B, C, T, H, W)``, 2 where each of the codes ``(B, P, C)`` is a sample, and -1 for
            all dimensions but the last.
        noise_std: standard deviation of the noise in training.
        hard_fraction: share of the samples that are hard in training: exactly so many, what is left over by a coin.
        backend: the name of a backend; ``None`` chooses.

    It has no parameters. ``noise_std`` and ``hard_fraction`` are attributes, which may change between steps.

    Raises:
        TypeError, ValueError: an argument out of range; logits or draws of another type, shape or device.

    Source: Improved SemHash, Kaiser and Bengio, *Discrete Autoencoders for Sequence Models* (2018), with a noise of 1;
    as gates of channels, Chen et al., *You Look Twice: GaterNet for Dynamic Filter Selection in CNNs* (CVPR 2019);
    docs/design.md, section 1, and the supplementary material of the paper. **Assumption**: exactly half is hard.

    >>> gate = SemHashGate(3).eval()
    >>> gate(torch.tensor([[-3.0, 0.0, 3.0]]))
    tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        channels: int | None = None,
        *,
        sample_dims: int = 1,
        noise_std: float = 1.0,
        hard_fraction: float = 0.5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.channels = None if channels is None else count("channels", channels)
        self.sample_dims = count("sample_dims", sample_dims, -1)
        self.noise_std = number("noise_std", noise_std, 0.0)
        self.hard_fraction = number("hard_fraction", hard_fraction, 0.0, 1.0)
        self.backend = one_of("backend", backend, (None, *BACKENDS))

    def extra_repr(self) -> str:
        of = "" if self.channels is None else f"{self.channels}, "
        return f"{of}sample_dims={self.sample_dims}, noise_std={self.noise_std}, hard_fraction={self.hard_fraction}"

    def forward(
        self,
        logits: Tensor,
        noise: Tensor | None = None,
        hard: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Gates in the shape and dtype of ``logits``.

        Args:
            logits: floating, the dimensions of the samples first.
            noise: like ``logits``, added as given (already scaled); drawn when left out. Not used in evaluation.
            hard: bool, in the shape of the samples; drawn when left out. Not used in evaluation.
            generator: what is drawn comes from here; ``None`` means torch's generator of the device.
        """
        samples = self._samples(logits)
        self._check_draws(logits, samples, noise, hard, generator)
        if not self.training:
            if not tracked((logits,)):  # a comparison then, for which no op is needed
                return (logits > 0).to(logits.dtype)
            noise = hard = None
        shape = math.prod(samples), math.prod(logits.shape[len(samples) :])
        if noise is not None:
            noise = noise.reshape(shape)
        elif self.training and self.noise_std:
            noise = torch.empty(shape, dtype=accumulate_dtype(logits.dtype), device=logits.device)
            noise.normal_(0.0, self.noise_std, generator=generator)
        if hard is not None:
            hard = hard.reshape(shape[0])
        elif self.training and self.hard_fraction < 1:
            hard = self._draw_hard(shape[0], logits.device, generator)
        if logits.shape == shape:  # each change of shape costs a step of autograd
            return ops.semhash_gate(logits, noise, hard, backend=self.backend)
        return ops.semhash_gate(logits.reshape(shape), noise, hard, backend=self.backend).reshape(logits.shape)

    def _samples(self, logits: Tensor) -> torch.Size:
        """The shape of the samples, where ``logits`` fit."""
        logits = _checks.floating("logits", logits)
        dims = self.sample_dims
        if logits.dim() <= max(dims, 0):
            raise ValueError(
                f"logits: got {_checks.describe(logits)}, wanted {max(dims, 0) + 1} dimensions or more: sample_dims is "
                f"{dims}"
            )
        samples = logits.shape[:dims]
        if self.channels is not None and logits.shape[len(samples)] != self.channels:
            raise ValueError(
                f"logits: got {_checks.describe(logits)}, wanted {self.channels} channels in dimension {len(samples)}"
            )
        return samples

    @staticmethod
    def _check_draws(logits: Tensor, samples: torch.Size, noise: object, hard: object, generator: object) -> None:
        if noise is not None:
            _checks.shaped("noise", noise, logits.shape, _checks.FLOATS)
            _checks.same_device("noise", noise, logits.device)
        if hard is not None:
            _checks.shaped("hard", hard, samples, (torch.bool,))
            _checks.same_device("hard", hard, logits.device)
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"generator: got {_checks.describe(generator)}, wanted a torch.Generator")
            if generator.device.type != logits.device.type:
                raise ValueError(f"generator: got one on {generator.device}, wanted {logits.device}, as the logits")

    def _draw_hard(self, rows: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """``(rows,)`` bool, :attr:`hard_fraction` of them true, without a host synchronisation."""
        share = self.hard_fraction * rows
        wanted = math.floor(share)
        if share > wanted:
            wanted = wanted + (torch.rand((), device=device, generator=generator) < share - wanted)
        return torch.randperm(rows, device=device, generator=generator) < wanted
