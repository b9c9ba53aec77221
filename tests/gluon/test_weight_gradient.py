"""The weight gradient in Gluon on the stand-in: every kind of list, group and shape, in orders drawn at random."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.backends.triton.gluon.plan import WaveTile

from ..support.targets import require_triton

require_triton()
from .data_gradients import GATES  # noqa: E402
from .weight_gradients import Case, check, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

CASES = {
    "ragged planes": Case(),
    "float16": Case(dtype=torch.float16),
    "all spatial": Case(gates=("spatial",)),
    "all temporal": Case(gates=("temporal",)),
    "soft gates": Case(gates=("soft",), neurons=(0, 0)),
    "hard gates": Case(gates=("hard",), neurons=(0, 1)),
    "every kind of gate": Case(neurons=(0, 1, 2, 0), gates=GATES, size=(1, 4, 4)),
    "a neuron of each sample's own": Case(neurons=(2, 0, 1)),
    "all samples on one neuron": Case(neurons=(2, 2, 2)),
    "more programs than tiles": Case(neurons=(0,), size=(1, 4, 4), programs=99),
    "one program": Case(programs=1, neurons=(0, 2), size=(1, 5, 3)),
    "two stages": Case(tile=WaveTile(64, 64, 16, 2)),
    "more stages than steps": Case(tile=WaveTile(64, 64, 16, 20), neurons=(0,), size=(1, 4, 4)),
    "boxes of frames": Case(size=(9, 3, 2), neurons=(1, 0)),
    "boxes larger than the features": Case(size=(2, 3, 1), tile=WaveTile(64, 64, 64, 3)),
    "one position": Case(size=(1, 1, 1), neurons=(1, 0)),
    "several blocks of channels": Case(channels=200, neurons=(1, 0), size=(1, 4, 3)),
    "several blocks of outputs": Case(outputs=136, neurons=(1, 0), size=(1, 4, 3)),
    "parts of a tile": Case(outputs=136, neurons=(1, 1), size=(1, 4, 3), tile=WaveTile(64, 128, 16, 3)),
    "half results": Case(out=torch.bfloat16),
    "no neuron, first": Case(neurons=(-1, 0, 1)),
    "no neuron, last": Case(neurons=(1, 0, -1), all_neurons=9),
    "no neuron at all": Case(neurons=(-1, -1)),
    "mixing": Case(mixing=(1, 1, 1)),
    "mixing rows and columns": Case(mixing=(1, 3, 3), neurons=(0, -1, 0)),
    "mixing frames": Case(mixing=(3, 1, 1), outputs=136, neurons=(2, 0)),
    "the tile that ships": Case(neurons=(0, 1), tile=WaveTile(128, 256, 64, 4), outputs=264, size=(2, 8, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, monkeypatch):
    """Right under two schedules, with the same bits; every element is stored once, every copy is multiplied once."""
    found = []
    for seed in range(2):
        torch.manual_seed(torch.initial_seed())
        out, given, spy = run(monkeypatch, CASES[name], seed)
        check(out, given)
        assert (spy.stores[out.data_ptr()].reshape(out.shape) == (~out.isnan()).numpy()).all()
        assert spy.machine.landed == 2 * spy.machine.multiplied
        found.append(out.nan_to_num(7))
    assert torch.equal(*found)


def random_case(index: int) -> Case:
    """Of any neurons, gates, shapes."""
    draw = torch.Generator().manual_seed(torch.initial_seed() + index)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    count = pick(1, 2, 3, 4)
    return Case(
        neurons=tuple(pick(-1, 0, 1, 2, 2) for _ in range(count)), gates=tuple(pick(*GATES) for _ in range(count)),
        channels=pick(8, 64, 72, 136), outputs=pick(8, 64, 72, 136),
        size=(pick(1, 2, 3), pick(1, 4, 5), pick(2, 3, 4)), dtype=pick(torch.bfloat16, torch.float16),
        tile=WaveTile(64, 64, pick(16, 32), pick(2, 3, 4, 5)), programs=pick(1, 2, 3, 5, 8),
        mixing=pick(None, None, None, (1, 1, 1), (1, 3, 3), (3, 1, 1)), out=pick(torch.float32, torch.bfloat16),
    )  # fmt: skip


@pytest.mark.parametrize("index", [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 20))])
def test_random_gradients(index, monkeypatch):
    out, given, _ = run(monkeypatch, random_case(index), seed=torch.initial_seed() + index)
    check(out, given)
