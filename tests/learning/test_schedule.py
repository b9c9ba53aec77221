"""Noise that falls by a schedule: its values, whom it reaches, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsts_kernels import DSTSLayer, FusedDSTS, SemHashGate, reference
from dsts_kernels.learning import NoiseSchedule, load_checkpoint, restore_generators, save_checkpoint
from dsts_kernels.learning.checkpoint import generator_states
from dsts_kernels.routing import sample_draws

from .support import Net, batch, everything, same


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("linear", [2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        ("cosine", [2.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]),
        ("constant", [2.0] * 8),
    ],
)
def test_values(shape, expected):
    """Two steps of waiting, four on the way, and the last value from then on, exactly."""
    dsts = FusedDSTS(4, num_neurons=2, num_layers=2)
    schedule, found = NoiseSchedule(dsts, 4, gumbel_scale=(2.0, 0.0), shape=shape, wait=2), []
    for _ in expected:
        found.append(dsts.layers[1].gumbel_scale)
        schedule.step()
    assert found == pytest.approx(expected)
    assert dsts.layers[0].gumbel_scale == expected[-1] and dsts.layers[0].noise_std == 1.0


def test_whom_it_reaches():
    """Layers of both kinds and gates alone, in any wrapper; a single number is a value that stays."""
    model = nn.ModuleDict(
        {
            "fused": torch.compile(FusedDSTS(4, num_neurons=2)),
            "literal": reference.DSTS(4, num_neurons=2),
            "layer": nn.Sequential(DSTSLayer(4)),
            "gate": SemHashGate(4),
        }
    )
    schedule = NoiseSchedule(model, 10, gumbel_scale=0.5, noise_std=(1.0, 0.0))
    for _ in range(5):
        assert schedule.step()["gumbel_scale"] == 0.5
    assert schedule.values == {"gumbel_scale": 0.5, "noise_std": 0.5}
    layers = [m for m in model.modules() if isinstance(m, (DSTSLayer, reference.DSTSLayer))]
    assert len(layers) == 7 and all((layer.gumbel_scale, layer.noise_std) == (0.5, 0.5) for layer in layers)
    assert model["gate"].noise_std == 0.5
    alone = NoiseSchedule(SemHashGate(), 2, noise_std=(1.0, 0.0))
    assert alone.step() == {"noise_std": 0.5}


@pytest.mark.parametrize("kind", [FusedDSTS, reference.DSTS])
def test_scales_of_draws(kind):
    """Both scale standard draws, and leave the streams as they are."""
    dsts = kind(4, num_neurons=3, num_layers=1, norm=None, noise_std=1.0, score_reduction="mean")
    x, seen = torch.randn(2, 4, 2, 3, 3), []
    for noise_std, gumbel_scale in ((1.0, 1.0), (0.25, 0.5), (0.0, 0.0)):
        dsts.set_noise(noise_std=noise_std, gumbel_scale=gumbel_scale)
        torch.manual_seed(1)
        y, routing = dsts(x, return_routing=True)
        torch.manual_seed(1)
        draws = sample_draws(2, 4, 3, 1)
        scaled = draws._replace(noise=draws.noise * noise_std, gumbel=draws.gumbel * gumbel_scale)
        wanted, theirs = dsts(x, scaled, return_routing=True)
        assert torch.equal(y, wanted) and torch.equal(routing.neuron, theirs.neuron)
        seen.append(routing)
    assert torch.equal(seen[-1].neuron, seen[-1].scores.argmax(-1))  # no noise: the choice of evaluation


def test_changed_noise_travels_in_a_state():
    """Of a module that was changed, and of nobody else; the literal module reads and writes it too."""
    dsts = FusedDSTS(4, num_neurons=2, num_layers=2, noise_std=0.5)
    plain = set(dsts.state_dict())
    dsts.set_noise(gumbel_scale=0.125)
    state = dsts.state_dict()
    assert set(state) - plain == {"layers.0.noise", "layers.1.noise"}
    for other in (FusedDSTS(4, num_neurons=2, num_layers=2), reference.DSTS(4, num_neurons=2, num_layers=2)):
        other.load_state_dict(state)
        assert {(layer.noise_std, layer.gumbel_scale) for layer in other.layers} == {(0.5, 0.125)}
        assert set(other.state_dict()) == set(state)
    assert copy.deepcopy(dsts).layers[1].gumbel_scale == 0.125
    for bad in (torch.ones(3), torch.tensor([1.0, -1.0]), torch.tensor([math.nan, 1.0]), "0.5"):
        with pytest.raises(RuntimeError, match=r"layers.1.noise: got .*, wanted noise_std and gumbel_scale"):
            dsts.load_state_dict(state | {"layers.1.noise": bad})
    with pytest.raises(ValueError, match=r"gumbel_scale: got -1\.0, wanted a finite number at least 0"):
        dsts.set_noise(gumbel_scale=-1)
    with pytest.raises(TypeError, match="noise_std: got str"):
        dsts.set_noise(noise_std="1")


@pytest.mark.parametrize("kind", [FusedDSTS, reference.DSTS])
def test_changed_noise_in_distributed_checkpoints(kind):
    """Their tools look every name of a state up in its module."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    dsts, other = (nn.Sequential(kind(4, num_neurons=2, num_layers=1)) for _ in range(2))
    dsts[0].set_noise(noise_std=0.5, gumbel_scale=0.25)
    state = dcp.get_model_state_dict(dsts)
    assert state["0.layers.0.noise"].tolist() == [0.5, 0.25]
    dcp.set_model_state_dict(other, state)
    assert (other[0].layers[0].noise_std, other[0].layers[0].gumbel_scale) == (0.5, 0.25)


def steps(net: Net, optimizer: torch.optim.Optimizer, schedule: NoiseSchedule, count: int) -> None:
    for _ in range(count):
        (clips, *_), targets = batch(4)
        optimizer.zero_grad()
        F.cross_entropy(net(clips), targets).backward()
        optimizer.step()
        schedule.step()


def run() -> tuple[Net, torch.optim.Optimizer, NoiseSchedule]:
    torch.manual_seed(5)
    net = Net(score_center=True, score_reduction="mean")
    settings = dict(gumbel_scale=(1.0, 0.1), noise_std=(0.8, 0.3), shape="cosine", wait=1)
    return net, torch.optim.AdamW(net.parameters(), 1e-2), NoiseSchedule(net, 6, **settings)


def test_a_resumed_run_is_the_same_run(tmp_path):
    """From a checkpoint in the middle: weights, centres, optimizer, draws and noise, bit for bit."""
    net, optimizer, schedule = run()
    steps(net, optimizer, schedule, 3)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint(tmp_path / "half.pt", state | {"generators": generator_states()})
    steps(net, optimizer, schedule, 5)
    wanted, values = everything(net, optimizer), schedule.values

    net, optimizer, schedule = run()
    kept = load_checkpoint(tmp_path / "half.pt")
    net.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    restore_generators(kept["generators"])
    steps(net, optimizer, schedule, 5)
    assert same(everything(net, optimizer), wanted) and schedule.values == values


def test_a_compiled_module_compiles_twice():
    """Whatever the values: the first is taken as a constant, any other as a number."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dsts = FusedDSTS(4, num_neurons=2, num_layers=1, score_reduction="mean")
    compiled = torch.compile(dsts, fullgraph=True, backend="eager")
    schedule = NoiseSchedule(dsts, 10, gumbel_scale=(0.9, 0.2), noise_std=(0.9, 0.2))
    x = torch.randn(2, 4, 2, 3, 3)
    for _ in range(8):
        torch.manual_seed(2)
        y = compiled(x)
        torch.manual_seed(2)
        assert torch.allclose(y, dsts(x), atol=1e-6)
        schedule.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(), ValueError, "gumbel_scale, noise_std: got None for both"),
        (dict(gumbel_scale=(1.0, 0.5, 0.1)), ValueError, r"gumbel_scale: got \(1.0, 0.5, 0.1\), wanted a number, or"),
        (dict(noise_std=(1.0, -0.5)), ValueError, "noise_std: got -0.5, wanted a finite number at least 0"),
        (dict(noise_std=1.0, steps=0), ValueError, "steps: got 0, wanted at least 1"),
        (dict(noise_std=1.0, wait=-1), ValueError, "wait: got -1, wanted at least 0"),
        (dict(noise_std=1.0, shape="step"), ValueError, "shape: got 'step', wanted 'linear' or 'cosine' or 'constant'"),
        (dict(noise_std=1.0, model=nn.ReLU()), ValueError, "model: got ReLU without a FusedDSTS"),
        (dict(gumbel_scale=1.0, model=SemHashGate()), ValueError, "model: got SemHashGate without a FusedDSTS"),
        (dict(gumbel_scale=1.0, model=[]), TypeError, "model: got list, wanted a torch.nn.Module"),
    ],
)
def test_bad_arguments(arguments, error, message):
    given = {"model": FusedDSTS(4, num_neurons=2), "steps": 5} | arguments
    with pytest.raises(error, match=message):
        NoiseSchedule(**given)


def test_a_state_of_other_settings():
    dsts = FusedDSTS(4, num_neurons=2)
    schedule = NoiseSchedule(dsts, 5, gumbel_scale=(1.0, 0.0))
    schedule.step()
    other = NoiseSchedule(dsts, 6, gumbel_scale=(1.0, 0.0))
    with pytest.raises(ValueError, match="steps: got the state of a schedule with 5, wanted 6"):
        other.load_state_dict(schedule.state_dict())
    assert other.done == 0
