"""FSDP2: sharded modules train as the literal module does, and Algorithm 1 as in one process; checkpoints move between.

All jobs are in ``sharded_jobs``; two processes run one after the other, so that they start once.
"""

from __future__ import annotations

import pytest
import torch

from . import sharded_jobs as jobs
from .processes import Processes

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.current_stream(), "record_event"), reason="fully_shard of this torch (2.6) has no CPU"
    ),
]


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def one():
    processes = Processes(1)
    yield processes
    processes.stop()


@pytest.mark.parametrize(
    "groups, mixed, freeze, reshard",
    [
        ("layers root", False, False, True),
        ("root", False, True, True),
        ("dsts", False, True, False),
        ("layers", False, False, False),
        ("layers", True, False, False),
        ("layers dsts root", True, False, True),
        ("root", True, True, True),
        ("layers root", True, True, True),
    ],
)
def test_as_the_literal_module(two, groups, mixed, freeze, reshard):
    """A group a layer, of the DSTS module, of the model; in bfloat16 or not; sides frozen in turns."""
    two.run(jobs.as_the_literal, groups, mixed, freeze, reshard)


@pytest.mark.parametrize(
    "groups, optimizer, mixed, reshard, options",
    [
        ("layers root", "sgd", False, True, {}),
        ("root", "adamw", False, True, {"clip_norm": 0.05}),
        ("layers root", "momentum", False, False, {"accumulate": 2}),
        ("dsts", "adamw", False, False, {"clip_norm": 0.05}),
        ("layers", "sgd", False, True, {"second_order": True}),
        ("layers root", "adamw", False, True, {"second_order": True, "clip_norm": 0.1, "accumulate": 2}),
        ("layers root", "sgd", True, True, {"clip_norm": 5.0}),
        ("layers root, replicate", "adamw", False, True, {"clip_norm": 0.05}),
    ],
)
def test_algorithm_1(two, groups, optimizer, mixed, reshard, options):
    """Losses, norms and parameters of one process with the whole batch; some parameters in no group, too."""
    two.run(jobs.algorithm_1, groups, optimizer, mixed, reshard, options)


def test_scaled(two):
    two.run(jobs.scaled)


def test_balanced(two):
    two.run(jobs.balanced)


@pytest.mark.parametrize("where", ["train_batch", "val_batch"])
def test_a_loss_that_is_not_finite(two, where):
    two.run(jobs.not_finite, where)


@pytest.mark.parametrize("where", ["loss", "forward", "backward"])
def test_an_error_in(two, where):
    two.run(jobs.an_error_in, where)


def test_refused(two):
    two.run(jobs.refused)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_sides_within(two, wrap):
    two.run(jobs.sides_within, wrap)


def test_monitored(two):
    two.run(jobs.monitored)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "worlds, before, after, optimizer, how, count",
    [
        ((2, 1), "layers root", "", "adamw", "learner", 2),
        ((2, 1), "root", "layers root", "momentum", "learner", 2),
        ((1, 2), "", "layers root", "adamw", "learner", 2),
        ((1, 2), "root", "dsts", "adamw", "learner", 2),
        ((2, 2), "root", "layers", "sgd", "learner", 2),
        ((2, 1), "layers root", "root", "adamw", "learner", 0),
        ((2, 1), "layers root", "", "adamw", "torch", 2),
        ((1, 2), "root", "layers root", "momentum", "torch", 2),
    ],
)
def test_checkpoints(one, two, tmp_path, worlds, before, after, optimizer, how, count):
    """Written by some processes and read by others, in other groups or none: as if nothing had been in between."""
    first, second = ((one, two)[world - 1] for world in worlds)
    first.run(jobs.save, str(tmp_path), before, optimizer, how, count)
    second.run(jobs.resume, str(tmp_path), after, optimizer, how, count)


def test_draws_go_on(two, tmp_path):
    two.run(jobs.resume_with_own_draws, str(tmp_path))


def test_whole_states_are_refused(two):
    two.run(jobs.whole_states_are_refused)
