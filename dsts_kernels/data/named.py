"""Datasets by name, as the recipe's options and its checkpoints have them: synthetic tasks, Diving48, FineGym."""

from __future__ import annotations

import argparse
from typing import Any

from torch.utils.data import Dataset

from .cells import SyntheticCells
from .symmetries import Symmetries
from .synthetic import SyntheticDives

__all__ = ["DATA", "SYNTHETIC", "TEST_SEED", "build_data", "build_test_data"]

SYNTHETIC = {"synthetic": SyntheticDives, "cells": SyntheticCells}
DATA = (*SYNTHETIC, "diving48", "finegym")
TEST_SEED = 1_000_003  # of a synthetic test set: the same for every training seed


def build_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training and test set, which have ``num_classes``, ``class_names``, ``attributes`` and ``attribute_names``.

    Raises:
        ValueError: an option that this dataset needs is missing; a file that is not as published.
        FileNotFoundError: a file or folder that is not there.
    """
    if options.data in SYNTHETIC:
        train = _synthetic(options, options.clips, options.seed)
        return Symmetries(train, seed=options.seed) if options.augment else train, build_test_data(options)
    return _videos(options, "--annotation", options.annotation), build_test_data(options)


def build_test_data(options: argparse.Namespace) -> Dataset:
    """The test set alone.

    Raises:
        ValueError: as :func:`build_data`.
        FileNotFoundError: a file or folder that is not there.
    """
    if options.data in SYNTHETIC:
        return _synthetic(options, options.test_clips, TEST_SEED)
    return _videos(options, "--test-annotation", options.test_annotation)


def _synthetic(options: argparse.Namespace, clips: int, seed: int) -> Dataset:
    shape = {"frames": options.frames, "size": options.size, "noise": options.noise}
    return SYNTHETIC[options.data](clips, seed=seed, **shape, mean=options.mean, std=options.std)


def _videos(options: argparse.Namespace, name: str, annotation: str | None) -> Dataset:
    from .clips import VideoClips

    clips = VideoClips(
        _read(options, annotation, name),
        frames=options.frames,
        size=options.size,
        stride=options.stride,
        mean=options.mean,
        std=options.std,
        train=name == "--annotation",
        seed=options.seed,
    )
    print(clips.report())
    return clips


def _read(options: argparse.Namespace, annotation: str | None, name: str) -> Any:
    """One annotation file of a video dataset."""
    from .annotations import read_diving48, read_finegym

    wanted = {name: annotation, "--classes": options.classes, "--videos": options.videos}
    for option, value in wanted.items():
        if value is None:
            raise ValueError(f"{option}: got nothing, wanted a path: --data {options.data} needs it")
    if options.data == "diving48":
        return read_diving48(annotation, options.classes, options.videos)
    return read_finegym(annotation, options.classes, options.videos, options.segments)
