"""The training set in two, drawn anew each epoch: one part trains operators, the other gates and scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["EpochSplit", "both_ways", "split_train_val"]


class _Shuffle:
    """One permutation an epoch, shared by both parts."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        mixed = (self.seed * 1_000_003 + epoch) % 2**63
        generator = torch.Generator("cpu").manual_seed(mixed)
        self.order = torch.randperm(self.size, generator=generator, device="cpu")


class EpochSplit(Dataset):
    """One part of :func:`split_train_val`; ``indices`` are those of this epoch."""

    def __init__(self, dataset: Dataset, shuffle: _Shuffle, start: int, stop: int) -> None:
        self.dataset, self._shuffle, self._slice = dataset, shuffle, slice(start, stop)

    @property
    def indices(self) -> torch.Tensor:
        return self._shuffle.order[self._slice]

    @property
    def epoch(self) -> int:
        return self._shuffle.epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw the split of this epoch, for both parts; the same ``seed`` and ``epoch`` give the same split.

        Workers of a ``DataLoader`` that outlive an epoch (``persistent_workers=True``) keep the split of their start.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch: got {epoch!r}, wanted an int of at least 0")
        self._shuffle.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):  # whose randomness goes by epochs too
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self._slice.stop - self._slice.start

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, wanted one of {len(self)} samples")
        place, read_among = int(self.indices[index]), getattr(self.dataset, "read_among", None)
        # VideoClips may read another sample instead of a broken one: of this part, since the other must not see it too.
        return self.dataset[place] if read_among is None else read_among(place, self.indices)


def both_ways(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Each pair of batches, then the same pair with its halves swapped; **ours, not the paper's**.

    Over an epoch of :func:`split_train_val` at ``fraction=0.5``, operators see every clip, as gates and scores do, and
    never the two sides the same clip in one step of Algorithm 1. An epoch has twice the steps.

    >>> for train_batch, val_batch in both_ways(zip(train_loader, val_loader)):
    ...     learner.step(train_batch, val_batch)
    """
    for first, second in pairs:
        yield first, second
        yield second, first


def split_train_val(dataset: Dataset, fraction: float = 0.5, seed: int = 0) -> tuple[EpochSplit, EpochSplit]:
    """``dataset`` as a training and a validation part, disjoint, which :meth:`EpochSplit.set_epoch` draws anew.

    Args:
        dataset: map-style, with a length. Where it has ``read_among(index, others)``, as
            :class:`~dsts_kernels.data.VideoClips`, samples that it replaces are replaced from the same part.
        fraction: share of the validation part, which trains upstream parameters. **Assumption**: one half.
        seed: of the permutations.

    Raises:
        ValueError: ``fraction`` outside 0 to 1, or a part without a sample.

    Source: Algorithm 1 of the paper, whose two sets are drawn from the training set each epoch.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction!r}, wanted a number above 0 and below 1")
    size = len(dataset)
    validation_size = round(size * fraction) if math.isfinite(fraction) else 0
    if not 0 < validation_size < size:
        raise ValueError(f"dataset: got {size} samples, wanted enough for two parts at fraction {fraction}")
    shuffle = _Shuffle(size, seed)
    cut = size - validation_size
    return EpochSplit(dataset, shuffle, 0, cut), EpochSplit(dataset, shuffle, cut, size)
