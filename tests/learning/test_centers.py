"""Centres of scores where processes share a batch: in each of them what one process has of the whole batch."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.learning import average_centers

from . import center_jobs as jobs
from .processes import Processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
needs_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"), reason="fully_shard of this torch (2.6) has no CPU"
)


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.mark.parametrize(
    "options, compiled",
    [
        ({"score_center": True}, False),
        ({"score_center": "mean", "center_in_training": True}, True),
        ({"score_center": "balance"}, False),
    ],
    ids=str,
)
def test_a_loop_with_ddp(two, options, compiled):
    two.run(jobs.joint, options, compiled)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=needs_sharding)], ids=["ddp", "fully-shard"])
def test_algorithm_1(two, sharded):
    two.run(jobs.algorithm_1, {"score_center": True}, sharded)


@needs_sharding
def test_a_loop_with_fully_shard(two):
    two.run(jobs.sharded_loop)


def test_nothing_to_average():
    """One process, and a module without a centre."""
    for net in (jobs.net(score_center=True), jobs.net()):
        before = [buffer.clone() for buffer in net.buffers()]
        average_centers(net)
        assert all(map(torch.equal, before, net.buffers()))
