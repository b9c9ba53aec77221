"""Two parts of a dataset: disjoint, complete, drawn anew each epoch, repeatable."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from dsts_kernels.learning import both_ways, split_train_val

DATA = list(range(103))


def test_parts_are_disjoint_and_complete():
    for epoch in range(3):
        train, val = split_train_val(DATA, 0.3, seed=1)
        val.set_epoch(epoch)  # of both
        assert train.epoch == epoch and (len(train), len(val)) == (72, 31)
        found = [train[i] for i in range(len(train))] + [val[i] for i in range(len(val))]
        assert sorted(found) == DATA


def test_epochs_and_seeds_differ_and_repeat():
    """The same seed and epoch give the same parts, in other objects too; another epoch or seed gives others."""

    def part(seed: int, epoch: int) -> list[int]:
        train, _ = split_train_val(DATA, 0.5, seed)
        train.set_epoch(epoch)
        return [int(x) for x in DataLoader(train, batch_size=None)]

    assert part(3, 4) == part(3, 4)
    assert len({tuple(part(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    mixed = {tuple(sorted(part(0, epoch))) for epoch in range(3)}
    assert len(mixed) == 3  # not only the order: who is in which part


def test_a_dataset_that_goes_by_epochs_is_told():
    """Augmentation of a VideoClips changes from epoch to epoch in either part."""

    class Data(list):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Data(DATA)
    split_train_val(data)[1].set_epoch(7)
    assert data.epoch == 7


def test_a_dataset_that_replaces_samples_is_told_of_the_part():
    class Data(list):
        def read_among(self, index: int, others: torch.Tensor) -> tuple[int, list[int]]:
            return self[index], others.tolist()

    for part in split_train_val(Data(DATA)):
        own = part.indices.tolist()
        assert [part[index] for index in range(len(part))] == [(index, own) for index in own]


def test_bad_input():
    for fraction in (0, 1, -0.5, 1.5, "half", True, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            split_train_val(DATA, fraction)
    with pytest.raises(ValueError, match="dataset: got 1 samples"):
        split_train_val([0], 0.5)
    train, _ = split_train_val(DATA)
    with pytest.raises(ValueError, match="epoch"):
        train.set_epoch(-1)
    with pytest.raises(IndexError):
        train[len(train)]


def test_both_ways():
    """Every pair, then the same swapped; lazily."""
    pairs = iter([("a", "b"), ("c", "d")])
    found = both_ways(pairs)
    assert [next(found), next(found)] == [("a", "b"), ("b", "a")]
    assert next(pairs) == ("c", "d") and list(found) == []
    assert list(both_ways([(1, 2), (3, 4)])) == [(1, 2), (2, 1), (3, 4), (4, 3)]
