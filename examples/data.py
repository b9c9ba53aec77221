"""The recipe's datasets by name: training and test set of the synthetic task, Diving48 or FineGym."""

from __future__ import annotations

import argparse

from torch.utils.data import Dataset

from dsts_kernels.data import Symmetries, SyntheticDives

DATA = ("synthetic", "diving48", "finegym")
TEST_SEED = 1_000_003  # of the synthetic test set: the same for every training seed


def build_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and test set, which have ``num_classes``, ``class_names``, ``attributes`` and ``attribute_names``.

    Raises:
        ValueError: an option that this dataset needs is missing; a file that is not as published.
        FileNotFoundError: a file or folder that is not there.
    """
    if options.data == "synthetic":
        shape = {"frames": options.frames, "size": options.size, "noise": options.noise}
        shape |= {"mean": options.mean, "std": options.std}
        train = SyntheticDives(options.clips, seed=options.seed, **shape)
        train = Symmetries(train, seed=options.seed) if options.augment else train
        return train, SyntheticDives(options.test_clips, seed=TEST_SEED, **shape)
    from dsts_kernels.data.clips import VideoClips

    found = []
    for name, path in (("--annotation", options.annotation), ("--test-annotation", options.test_annotation)):
        annotations = read(options, path, name)
        clips = VideoClips(
            annotations,
            frames=options.frames,
            size=options.size,
            stride=options.stride,
            mean=options.mean,
            std=options.std,
            train=name == "--annotation",
            seed=options.seed,
        )
        print(clips.report())
        found.append(clips)
    return found[0], found[1]


def read(options: argparse.Namespace, annotation: str | None, name: str):
    """One annotation file of a video dataset."""
    from dsts_kernels.data.annotations import read_diving48, read_finegym

    wanted = {name: annotation, "--classes": options.classes, "--videos": options.videos}
    for option, value in wanted.items():
        if value is None:
            raise ValueError(f"{option}: got nothing, wanted a path: --data {options.data} needs it")
    if options.data == "diving48":
        return read_diving48(annotation, options.classes, options.videos)
    return read_finegym(annotation, options.classes, options.videos, options.segments)
