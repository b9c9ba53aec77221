"""Counterfactuals on models whose answer is known by construction, and intervals that are known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsts_kernels import DSTSLayer, FusedDSTS, reference
from dsts_kernels.data import SyntheticCells
from dsts_kernels.learning import RoutingMonitor
from dsts_kernels.probe import CHANGES, Choice, changed, counterfactuals, paired_interval
from dsts_kernels.probe.counterfactuals import derangement, wilson_interval
from tests.support.modules import enliven

from .models import Solved, built_by_hand


class Layered(nn.Module):
    """Features to logits."""

    def __init__(self, dsts: nn.Module) -> None:
        super().__init__()
        self.dsts = dsts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dsts(x).mean((2, 3, 4))


@pytest.fixture(scope="module")
def cells() -> list:
    data = SyntheticCells(160, size=16, noise=0.0, seed=5)
    clips = torch.stack([clip for clip, _ in data])
    return [(clips[start : start + 60], data.labels[start : start + 60]) for start in (0, 60, 120)]


def by_name(measured) -> dict:
    return {row.name: row for row in measured.rows}


def as_it_is(index, layer, own):
    return Choice(own.neuron, own.gate > 0.5)


# The change of a choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scoring_kernel": (1, 3, 3), "mixing_kernel": (3, 1, 1)},
        {"norm": None},
        {"score_center": True},
        {"score_center": "balance", "center_in_training": True},
    ],
)
def test_own_choice_changes_nothing(backend, options, dtype):
    """To the last bit, on every backend; weights, statistics, centres, modes and hooks are those of before."""
    dsts = FusedDSTS(6, num_layers=2, num_neurons=3, score_reduction="mean", backend=backend, **options)
    enliven(dsts)
    model = Layered(dsts.to(dtype)).eval()
    for layer in dsts.layers if "score_center" in options else ():
        layer.center.normal_()
    x = torch.randn(5, 6, 3, 4, 4).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x).detach()
    with torch.no_grad():  # where a layer may be one native call
        assert torch.equal(model(x), expected)
    with changed(model, as_it_is):
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part.training for part in model.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in dsts.layers)


@pytest.mark.parametrize("kind", [FusedDSTS, reference.DSTS])
def test_takes_what_it_is_told(kind):
    """Routing says the neuron and the gates of the change, and the output is that of a model whose own they are."""
    dsts = kind(6, num_layers=1, num_neurons=3, dtype=torch.float64)
    enliven(dsts)
    dsts.eval()
    x = torch.randn(4, 6, 3, 4, 4, dtype=torch.float64)
    neuron, spatial = torch.tensor([2, 0, 1, 2]), torch.rand(4, 6) < 0.5
    with changed(dsts, lambda index, layer, own: Choice(neuron, spatial)):
        found, routing = dsts(x, return_routing=True)
    assert torch.equal(routing.neuron[0], neuron) and torch.equal(routing.gate[0] > 0.5, spatial)
    for sample in range(4):
        single = reference.DSTS(6, num_layers=1, num_neurons=1, dtype=torch.float64).eval()
        state = {name: value.clone() for name, value in dsts.state_dict().items()}
        for name in ("scoring", "spatial", "temporal", "mixing", "gate"):
            state[f"layers.0.{name}"] = state[f"layers.0.{name}"][neuron[sample], None]
        state["layers.0.gate"] = torch.where(spatial[sample], 1.0, -1.0)[None].double()
        single.load_state_dict(state)
        torch.testing.assert_close(found[sample], single(x[sample, None])[0].detach())


def test_a_layer_alone_and_by_keyword():
    layer = DSTSLayer(4, num_neurons=2).eval()
    x = torch.randn(3, 4, 2, 3, 3)
    told = torch.ones(3, dtype=torch.int64)
    with changed(layer, lambda index, one, own: Choice(told, own.gate > 0.5)):
        output, routing = layer(x=x, return_routing=True)
        assert torch.equal(layer(x), output)
    assert torch.equal(routing.neuron, told)


def test_goes_back_after_an_error():
    """An error in the middle of a pass leaves the model in evaluation, without hooks, with its own buffers."""
    model = Layered(FusedDSTS(4, num_layers=2, num_neurons=2)).eval()
    x = torch.randn(3, 4, 2, 3, 3)
    expected = model(x).detach()
    handle = model.dsts.layers[1].norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), changed(model, as_it_is):
        model(x)
    handle.remove()
    assert not any(part.training for part in model.modules()) and torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (Choice(torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.bool)), "gave neuron as"),
        (Choice(torch.full((3,), 2), torch.zeros(3, 4, dtype=torch.bool)), "gave neurons 2 to 2, wanted 0 to 1"),
        (Choice(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4)), "gave spatial as"),
    ],
)
def test_bad_choice(choice, says):
    model = FusedDSTS(4, num_neurons=2).eval()
    with pytest.raises(ValueError, match=says), changed(model, lambda *_: choice):
        model(torch.randn(3, 4, 2, 3, 3))


def test_refused_models():
    with pytest.raises(ValueError, match="got one that trains"), changed(FusedDSTS(4), as_it_is):
        pass
    with pytest.raises(ValueError, match="without a FusedDSTS"), changed(nn.Linear(2, 2).eval(), as_it_is):
        pass
    with pytest.raises(ValueError, match="not frozen"), changed(FusedDSTS(4).eval().freeze(), as_it_is):
        pass
    compiled = torch.compile(FusedDSTS(4).eval())
    with pytest.raises(ValueError, match=r"torch\.compile"), changed(compiled, as_it_is):
        pass


# What changes cost, where it is known


def test_costs_of_the_model_built_by_hand(cells):
    """Neuron 0 sees space alone and neuron 1 time alone. So neurons that swap places see nothing that tells, and gates
    that flip do the same: half is lost. One neuron, and gates all of one kind, answer one half of the groups and the
    other by chance: a quarter. At random half of the clips take the wrong neuron: a quarter."""
    measured = counterfactuals(Solved().eval(), cells, draws=4, seed=int(torch.randint(1 << 30, ())))
    assert measured.accuracy == 1.0 and measured.high == 1.0 and measured.clips == 160
    assert torch.equal(measured.neuron[0], (measured.label >= 4).long())
    found = by_name(measured)
    assert set(found) == set(CHANGES)
    for name, cost in {
        "permuted neurons": 0.5,
        "gates flipped": 0.5,
        "random routing": 0.25,
        "best single neuron": 0.25,
        "all spatial": 0.25,
        "all temporal": 0.25,
    }.items():
        row = found[name]
        assert row.cost == pytest.approx(cost, abs=0.13), name  # three standard deviations of 160 coins
        assert row.low < row.cost < row.high and row.costs and row.accuracy == pytest.approx(1 - row.cost)
    assert len(found["random routing"].draws) == 4 and len(found["gates flipped"].draws) == 1
    assert found["random gates"].costs


def test_nothing_costs_where_nothing_matters(cells):
    """A module whose output is its input: no change moves an answer, no interval lies above 0."""
    dsts = built_by_hand()
    with torch.no_grad():
        dsts.layers[0].mixing.zero_()
    measured = counterfactuals(Solved(dsts).eval(), cells, draws=2)
    for row in measured.rows:
        assert row.cost == 0 and row.low < 0 < row.high and not row.costs
        assert row.high == pytest.approx(1.96 / 162 * 1, rel=1e-3)  # half a pair more in each cell


def test_gates_matter_and_routing_does_not():
    """Two neurons that are the same, with half of the glyphs spatial, on clips that they see: swapped, single or random
    they answer alike; with gates flipped they see nothing that tells."""
    data = SyntheticCells(160, size=16, noise=0.0, seed=6)
    glyphs = torch.arange(8) % 2 == 0
    seen = glyphs[data.attributes["glyph"]] == (data.attributes["group"] < 2)
    clips = torch.stack([clip for clip, _ in data])[seen]
    model = Solved(built_by_hand([glyphs, glyphs])).eval()
    measured = counterfactuals(model, [(clips, data.labels[seen])], draws=2)
    found = by_name(measured)
    assert measured.accuracy == 1.0
    for name in ("random routing", "permuted neurons", "best single neuron"):
        assert found[name].cost == 0 and not found[name].costs
    assert found["gates flipped"].costs and found["gates flipped"].cost == pytest.approx(0.5, abs=0.2)


def test_changes_of_one_layer():
    """Only the layers that are named take another choice."""
    dsts = FusedDSTS(4, num_layers=2, num_neurons=3, dtype=torch.float64)
    enliven(dsts)
    model = Layered(dsts).eval()
    x = torch.randn(12, 4, 2, 3, 3, dtype=torch.float64)
    seen = []
    handles = [layer.register_forward_hook(lambda m, i, o: seen.append(o[1])) for layer in dsts.layers]
    measured = counterfactuals(
        model, [(x, torch.zeros(12, dtype=torch.int64))], changes=["permuted neurons"], layers=[1]
    )
    for handle in handles:
        handle.remove()
    assert measured.rows[0].layers == (1,)
    base, last = seen[:2], seen[-2:]  # hooks before ours see a layer's own pass only through forward
    assert torch.equal(base[0].neuron, last[0].neuron) and (base[1].neuron != last[1].neuron).all()


def test_single_neuron_is_chosen_on_other_clips():
    """Where any neuron is right by chance, the best of many on the same clips would look better than chance."""
    neurons, clips, times = 8, 64, 12
    label = torch.randint(2, (clips,))
    answers = torch.randint(2, (neurons, clips))  # what each neuron says of each clip

    class Guess(nn.Module):
        """Says what the neuron of its layer was drawn to say."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = DSTSLayer(2, num_neurons=neurons)

        def forward(self, clip: torch.Tensor) -> torch.Tensor:
            x = torch.zeros(len(clip), 2, 1, 1, 1)
            _, routing = self.layer(x, return_routing=True)
            return nn.functional.one_hot(answers[routing.neuron, clip], 2).float()

    costs = []
    for seed in range(times):
        answers = torch.randint(2, (neurons, clips))
        found = counterfactuals(
            Guess().eval(), [(torch.arange(clips), label)], changes=["best single neuron"], seed=seed
        )
        costs.append(found.rows[0].accuracy)
    mean = sum(costs) / len(costs)
    assert abs(mean - 0.5) < 4 * 0.5 / math.sqrt(clips * len(costs))  # the best on the same clips has 0.59


def test_layers_of_one_neuron_have_no_other(cells):
    model = Solved(built_by_hand([torch.ones(8, dtype=torch.bool)])).eval()
    names = [row.name for row in counterfactuals(model, cells[2:], draws=1).rows]
    assert names == ["gates flipped", "random gates", "all spatial", "all temporal"]


def test_same_seed_same_costs_and_generators_are_left_alone(cells):
    model = Solved().eval()
    before = torch.get_rng_state()
    first, second = (counterfactuals(model, cells[:1], draws=2, seed=3).rows for _ in range(2))
    assert first == second and torch.equal(before, torch.get_rng_state())


def test_monitors_go_on(cells):
    """What was watched is watched after it, and the model is as it was."""
    model = Solved().eval()
    monitor = RoutingMonitor(model)
    counterfactuals(model, cells[:1], changes=["gates flipped"])
    monitor.reset()
    model(cells[0][0])
    assert monitor.statistics().samples.tolist() == [60]


def test_bad_arguments(cells):
    model = Solved().eval()
    for options, says in (
        ({"changes": ["gates"]}, "changes: got 'gates'"),
        ({"layers": [1]}, r"layers: got \(1,\), wanted some of 0 to 0"),
        ({"layers": []}, "layers: got"),
        ({"draws": 0}, "draws: got 0"),
        ({"predict": lambda model, x: model(x)[:-1]}, "predict: gave"),
    ):
        with pytest.raises(ValueError, match=says):
            counterfactuals(model, cells, **options)
    with pytest.raises(ValueError, match="which gives its batches once"):
        counterfactuals(model, iter(cells))
    with pytest.raises(ValueError, match="batches: got none"):
        counterfactuals(model, [])


# Intervals


def test_paired_interval():
    """By hand: n = 8 + 2, mean (3 - 1) / 10, variance (4 + 1) / 10 - 0.04."""
    low, high = paired_interval(torch.tensor([1, 1, 1, -1, 0, 0, 0, 0]))
    half = 1.959963984540054 * math.sqrt(0.46 / 10)
    assert (low, high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert paired_interval(torch.ones(400))[0] > 0.98 and paired_interval(torch.zeros(1))[1] > 0.4


def test_paired_interval_holds_the_truth():
    """In 95 of 100 draws or nearly, with as few as thirty clips."""
    truth, clips, draws = 0.1, 30, 4000
    chances = torch.rand(draws, clips)
    difference = (chances < 0.2).double() - (chances > 0.9).double()
    held = sum(low <= truth <= high for low, high in map(paired_interval, difference)) / draws
    assert 0.93 < held < 0.99


def test_wilson_interval():
    low, high = wilson_interval(torch.arange(10) < 8)
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_derangement(size):
    order = derangement(size, torch.Generator().manual_seed(int(torch.randint(1 << 30, ()))))
    assert sorted(order.tolist()) == list(range(size))
    assert size == 1 or (order != torch.arange(size)).all()
