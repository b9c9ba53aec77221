"""Mirror images and quarter turns: which clip is under which, whoever reads it, and what else the data set says."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dsts_kernels.data import Symmetries, SyntheticDives
from dsts_kernels.learning import split_train_val


def squares(count: int = 200) -> TensorDataset:
    return TensorDataset(torch.randn(count, 2, 3, 4, 4), torch.arange(count))


@pytest.mark.parametrize("turns", [True, False])
def test_all_symmetries_and_no_others(turns):
    """Each in about its share; all frames and channels alike."""
    data = squares()
    found = torch.zeros(8)
    for index, (clip, label) in enumerate(Symmetries(data, turns=turns, seed=3)):
        plain = data[index][0]
        images = [torch.rot90(own, k, (-2, -1)) for own in (plain, plain.flip(-1)) for k in range(4)]
        same = [i for i, image in enumerate(images) if torch.equal(clip, image)]
        assert len(same) == 1 and label == index and clip.is_contiguous()
        found[same[0]] += 1
    expected = [0, 1, 2, 3, 4, 5, 6, 7] if turns else [0, 4]
    assert found.nonzero()[:, 0].tolist() == expected and found[expected].min() > 100 / len(expected)


def test_the_epoch_and_the_seed_say_which():
    """The same in workers and after a resume; another epoch, another seed differ."""
    data = Symmetries(squares(), seed=1)
    data.set_epoch(4)
    here = torch.stack([clip for clip, _ in data])
    again = pickle.loads(pickle.dumps(Symmetries(squares(), seed=1)))
    again.dataset = data.dataset
    assert not torch.equal(again.drawn, data.drawn)
    again.set_epoch(4)
    assert torch.equal(again.drawn, data.drawn)
    there = torch.cat([clips for clips, _ in DataLoader(again, 50, num_workers=1)])
    assert torch.equal(here, there)
    other = Symmetries(squares(), seed=2)
    other.set_epoch(4)
    assert not torch.equal(other.drawn, data.drawn)


def test_a_part_of_a_split():
    """Parts hand the epoch on, and keep labels and classes."""
    data = Symmetries(SyntheticDives(32, frames=4, size=16), seed=1)
    train, val = split_train_val(data, 0.5)
    train.set_epoch(3)
    expected = Symmetries(data.dataset, seed=1)
    expected.set_epoch(3)
    assert torch.equal(data.drawn, expected.drawn)
    assert sorted(label for part in (train, val) for _, label in (part[i] for i in range(16))) == sorted(
        data.labels.tolist()
    )
    assert data.num_classes == 16 and data.class_names == SyntheticDives.class_names
    with pytest.raises(AttributeError):
        data.nothing_of_this_name  # noqa: B018


def test_a_clip_read_instead_of_another():
    """``read_among`` of a set that replaces broken clips is turned too."""

    class Replacing(TensorDataset):
        def read_among(self, index, others):
            return self[int(others[-1])]

    data = Symmetries(Replacing(*squares(8).tensors), seed=1)
    data.drawn[:] = 5  # mirrored, turned twice
    train, _ = split_train_val(data, 0.5)
    clip, label = train[0]
    assert torch.equal(clip, torch.rot90(data.dataset[int(label)][0].flip(-1), 2, (-2, -1)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="seed: got 'a', wanted a whole number"):
        Symmetries(squares(), seed="a")
    data = Symmetries(TensorDataset(torch.randn(4, 2, 3, 4, 5), torch.arange(4)))
    with pytest.raises(ValueError, match=r"clip: got \(2, 3, 4, 5\), wanted squares"):
        data[0]
    with pytest.raises(ValueError, match="epoch: got -1, wanted an int of at least 0"):
        data.set_epoch(-1)
    assert Symmetries(data.dataset, turns=False)[0][0].shape == (2, 3, 4, 5)
