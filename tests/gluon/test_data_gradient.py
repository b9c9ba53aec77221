"""The data gradient in Gluon on the stand-in: every gate, shape and end of a tile, in orders drawn at random."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveTile

from ..support.targets import require_triton

require_triton()
from .data_gradients import GATES, Case, check, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

CASES = {
    "ragged planes": Case(),
    "float16": Case(dtype=torch.float16),
    "all spatial": Case(gates=("spatial",)),
    "all temporal": Case(gates=("temporal",)),
    "soft gates": Case(gates=("soft",), neurons=(0, 0)),
    "hard gates": Case(gates=("hard",), neurons=(0, 1)),
    "every kind of gate": Case(neurons=(0, 1, 2, 0), gates=GATES, size=(1, 4, 4)),
    "more programs than tiles": Case(neurons=(0,), size=(1, 4, 4), programs=9),
    "one program": Case(programs=1, neurons=(0, 2), size=(1, 5, 7)),
    "two stages": Case(tile=WaveTile(16, 16, HALF_K, 2)),
    "more stages than steps": Case(tile=WaveTile(16, 16, HALF_K, 20), outputs=64, size=(1, 4, 4)),
    "a ragged K block": Case(outputs=8, size=(1, 4, 5)),
    "boxes of frames": Case(size=(9, 3, 2)),
    "boxes larger than the features": Case(size=(2, 3, 1), tile=WaveTile(64, 16, HALF_K, 3)),
    "one position": Case(size=(1, 1, 1), neurons=(1, 0)),
    "ragged channels": Case(channels=21),
    "a block wider than the channels": Case(channels=10, neurons=(1, 0)),
    "parts of a tile": Case(channels=136, tile=WaveTile(16, 128, HALF_K, 3), size=(1, 4, 6), neurons=(0, 1)),
    "gates alone": Case(need_x=False),
    "closed to infinite filters": Case(gates=("spatial",), infinite=True),
    "channels-first": Case(channels_last=False),
    "no neuron, first": Case(neurons=(-1, 0, 1)),
    "no neuron, between": Case(neurons=(0, -1, -1, 2), programs=2),
    "no neuron at all": Case(neurons=(-1, -1), size=(1, 4, 4)),
    "the tile that ships": Case(neurons=(0, 1), tile=WaveTile(128, 256, HALF_K, 4), channels=264, size=(2, 8, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, monkeypatch):
    """Right under two schedules, with the same bits; every element is stored once, every copy is multiplied once."""
    found = []
    for seed in range(2):
        torch.manual_seed(torch.initial_seed())
        dx, dgate, given, spy = run(monkeypatch, CASES[name], seed)
        check(dx, dgate, given)
        for result in (dx, dgate):
            assert result is None or (spy.stores[result.data_ptr()] == 1).all()
        assert spy.machine.landed == 2 * spy.machine.multiplied
        found.append([dgate] if dx is None else [dx, dgate])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_nan_stays_in_its_sample(monkeypatch):
    """NaN in one sample's gradient reaches no other sample."""
    from . import data_gradients

    whole = data_gradients.problem

    def poisoned(case: Case) -> data_gradients.Problem:
        given = whole(case)
        given.grad[1, 0, 2, 3, 5] = float("nan")
        return given

    monkeypatch.setattr(data_gradients, "problem", poisoned)
    dx, dgate, given, _ = run(monkeypatch, Case(neurons=(1, 2, 0)))
    assert dx[1].isnan().any() and dgate[1].isnan().any()
    for sample in (0, 2):
        torch.testing.assert_close(dx[sample].double(), given.wanted_x[sample], rtol=2**-7, atol=1e-4)
        assert not dgate[sample].isnan().any()


def test_counting_in_64_bits(monkeypatch):
    """A kernel compiled for samples of more than 2^31 elements does the same."""
    from dsts_kernels.backends.gpu import features

    monkeypatch.setattr(features, "needs_int64", lambda *tensors: True)
    dx, dgate, given, _ = run(monkeypatch, Case(neurons=(0, 1)))
    check(dx, dgate, given)


def random_case(index: int) -> Case:
    """Of any neurons, gates, shapes."""
    draw = torch.Generator().manual_seed(torch.initial_seed() + index)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    count = pick(1, 2, 3, 4)
    return Case(
        neurons=tuple(pick(-1, 0, 1, 2, 2) for _ in range(count)), gates=tuple(pick(*GATES) for _ in range(count)),
        channels=pick(8, 16, 24, 40), outputs=pick(8, 64, 72, 136),
        size=(pick(1, 2, 3), pick(1, 4, 5, 7), pick(2, 4, 6)), dtype=pick(torch.bfloat16, torch.float16),
        tile=WaveTile(pick(16, 32), pick(16, 32), HALF_K, pick(2, 3, 4, 5)), programs=pick(1, 2, 3, 5, 8),
        need_x=pick(True, True, False), channels_last=pick(True, False),
    )  # fmt: skip


@pytest.mark.parametrize("index", [*range(6), *(pytest.param(i, marks=pytest.mark.slow) for i in range(6, 30))])
def test_random_gradients(index, monkeypatch):
    dx, dgate, given, _ = run(monkeypatch, random_case(index), seed=torch.initial_seed() + index)
    check(dx, dgate, given)
