"""The packed convolution in Gluon on the stand-in: every plan, shape and end of a tile, in orders drawn at random."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveTile

from ..support.targets import require_triton

require_triton()
from .packed import Case, check, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

FEW = Case(channels=64, splits=(64, 3, 0), size=(1, 4, 4), outputs=16)
CASES = {
    "ragged planes": Case(),
    "float16": Case(dtype=torch.float16),
    "more programs than tiles": Case(neurons=(0,), programs=20),
    "one program": Case(programs=1, neurons=(0, 2), size=(1, 5, 7)),
    "as many programs as tiles": Case(neurons=(0, 1, 2, 0), size=(2, 4, 4), outputs=16, programs=8),
    "two stages": Case(tile=WaveTile(16, 16, HALF_K, 2)),
    "more stages than steps": dataclasses.replace(FEW, tile=WaveTile(16, 16, HALF_K, 20)),
    "one step a tile's tap": dataclasses.replace(FEW, neurons=(2, 2, 1), programs=2),
    "boxes of frames": Case(size=(9, 3, 2)),
    "boxes larger than the features": Case(size=(2, 3, 1), tile=WaveTile(64, 16, HALF_K, 3)),
    "one position": Case(size=(1, 1, 1), neurons=(1, 0)),
    "a ragged block of outputs": Case(outputs=21),
    "a block wider than the outputs": Case(outputs=10),
    "parts of a tile": Case(outputs=200, tile=WaveTile(16, 128, HALF_K, 3), size=(1, 4, 6), neurons=(0, 1)),
    "nine taps": Case(taps=9),
    "nine taps, parts": Case(outputs=300, tile=WaveTile(16, 256, HALF_K, 2), size=(1, 5, 4), neurons=(1,), taps=9),
    "no sums": Case(taps=0),
    "nothing besides": Case(taps=0, bias=False, relu=False, skip=False),
    "channels-first": Case(channels_last=False),
    "no filters, first": Case(neurons=(-1, 0, 1)),
    "no filters, between": Case(neurons=(0, -1, -1, 2), programs=2, taps=9),
    "no filters, last": Case(neurons=(1, 0, -1), relu=False),
    "no filters at all": Case(neurons=(-1, -1)),
    "many samples": Case(neurons=(0, 1, 2, 2, 1, 0, 1), size=(1, 4, 4), programs=5),
    "the tile that ships": Case(neurons=(0, 1), tile=WaveTile(128, 256, HALF_K, 4), outputs=264, size=(2, 8, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_convolution(name, monkeypatch):
    """Right under two schedules, with the same bits; every element is stored once, every copy is multiplied once."""
    found = []
    for seed in range(2):
        torch.manual_seed(torch.initial_seed())
        out, sums, given, spy = run(monkeypatch, CASES[name], seed)
        check(out, sums, given)
        assert (spy.stores[out.data_ptr()] == 1).all()
        assert sums is None or (spy.stores[sums.data_ptr()] == 1).all()
        assert spy.machine.landed == 2 * spy.machine.multiplied
        found.append([out] if sums is None else [out, sums])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_nan_stays_in_its_sample(monkeypatch):
    """NaN in one sample's features reaches no other sample, and ReLU keeps it."""
    from . import packed

    whole = packed.problem

    def poisoned(case: Case) -> packed.Problem:
        given = whole(case)
        given.panel[1, 0, 2, 3, 5] = float("nan")
        return given

    monkeypatch.setattr(packed, "problem", poisoned)
    out, sums, given, _ = run(monkeypatch, Case(neurons=(0, 2, 1), relu=True))
    assert out[1].isnan().any() and sums[1].isnan().any()
    for sample in (0, 2):
        torch.testing.assert_close(out[sample].double(), given.wanted[sample], rtol=2**-7, atol=1e-4)
        assert not sums[sample].isnan().any()


def test_counting_in_64_bits(monkeypatch):
    """A kernel compiled for samples of more than 2^31 elements does the same."""
    from dsts_kernels.backends.gpu import features

    monkeypatch.setattr(features, "needs_int64", lambda *tensors: True)
    out, sums, given, _ = run(monkeypatch, Case(neurons=(0, 1)))
    check(out, sums, given)


def random_case(index: int) -> Case:
    """Of any neurons, shapes and ends."""
    draw = torch.Generator().manual_seed(torch.initial_seed() + index)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    channels = pick(16, 64, 100, 130)
    splits = tuple(int(torch.randint(channels + 1, (), generator=draw)) for _ in range(3))
    rows, columns = pick(16, 32), pick(16, 32)
    return Case(
        neurons=tuple(pick(-1, 0, 1, 2, 2) for _ in range(pick(1, 2, 3, 4))), splits=splits, channels=channels,
        outputs=pick(8, 16, 24, 40), size=(pick(1, 2, 3), pick(1, 4, 5, 7), pick(2, 4, 6)), taps=pick(0, 1, 9),
        dtype=pick(torch.bfloat16, torch.float16), tile=WaveTile(rows, columns, HALF_K, pick(2, 3, 4, 5)),
        programs=pick(1, 2, 3, 5, 8), relu=pick(True, False), bias=pick(True, False), skip=pick(True, False),
        channels_last=pick(True, False),
    )  # fmt: skip


@pytest.mark.parametrize("index", [*range(6), *(pytest.param(i, marks=pytest.mark.slow) for i in range(6, 30))])
def test_random_convolutions(index, monkeypatch):
    out, sums, given, _ = run(monkeypatch, random_case(index), seed=torch.initial_seed() + index)
    check(out, sums, given)
