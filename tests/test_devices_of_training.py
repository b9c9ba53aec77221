"""Learning, data, figures and the recipe on the CPU, in a script whose default device is another one ("meta" here)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsts_kernels import FusedDSTS, viz
from dsts_kernels.data import EvalTransform, SyntheticDives, TrainTransform, frame_indices
from dsts_kernels.learning import (
    RoutingMonitor,
    UpstreamDownstream,
    balance_loss,
    downstream_parameters,
    generator_states,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
    split_train_val,
    upstream_parameters,
)
from dsts_kernels.viz import measures
from examples.train import Trainer, rate_share

from .data.videos import write_video
from .test_devices import unplaced

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere():
    """The default device for the rest of the test, from when it is called."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)  # and no mode is left, as one would be for "cpu"


def test_the_recipe_names_its_devices():
    found = [line for path in sorted((ROOT / "examples").glob("*.py")) for line in unplaced(path)]
    assert not found, "\n".join(found)
    assert 0 < rate_share(3, 10) <= 1


@pytest.mark.parametrize("second_order", [False, True])
def test_a_step_of_algorithm_1(elsewhere, second_order):
    """Bit for bit the step that is taken without; statistics and checkpoints come from the CPU as well."""
    found = []
    for moved in (False, True):
        torch.manual_seed(5)
        net = nn.Sequential(FusedDSTS(6, num_layers=2, num_neurons=3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        batches = [(torch.randn(5, 6, 2, 4, 4), torch.arange(5)) for _ in range(2)]
        if moved:
            elsewhere()
        monitor = RoutingMonitor(net, keep=True)
        assert monitor.statistics().samples.device.type == "cpu", "before the first pass, too"
        learner = UpstreamDownstream(
            net,
            F.cross_entropy,
            upstream_optimizer=torch.optim.SGD(upstream_parameters(net), 0.1, momentum=0.9),
            downstream_optimizer=torch.optim.SGD(downstream_parameters(net), 0.1),
            second_order=second_order,
            clip_norm=0.5,
            balance=0.1,
        )
        learner.step(*batches)
        learner.load_state_dict(learner.state_dict())
        result = learner.step(*batches)
        statistics = monitor.statistics()
        assert all(field.device.type == "cpu" for field in statistics)
        found.append([*result, statistics.usage, balance_loss(monitor.last[0]).detach(), *net.state_dict().values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(one, device="cpu"), torch.as_tensor(other, device="cpu"))


def test_split_and_checkpoints(elsewhere, tmp_path):
    expected = [part.indices for part in split_train_val(range(10), 0.3, seed=4)]
    states, draw = generator_states(), torch.rand(3)
    elsewhere()
    parts = split_train_val(range(10), 0.3, seed=4)
    assert all(torch.equal(part.indices, own) for part, own in zip(parts, expected, strict=True))
    parts[0].set_epoch(3)
    assert parts[0][0] in range(10)
    save_checkpoint(tmp_path / "checkpoint.pt", {"states": states, "draw": draw})
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    restore_generators(loaded["states"])
    assert torch.equal(torch.rand(3, device="cpu"), loaded["draw"])


def test_synthetic_data_and_transforms(elsewhere):
    expected, clip = SyntheticDives(4, frames=3, size=16, seed=2), (torch.rand(3, 20, 24, 3) * 255).to(torch.uint8)
    transforms = EvalTransform(12), TrainTransform(12)
    wanted = [transform(clip, torch.Generator().manual_seed(1)) for transform in transforms]
    places = frame_indices(40, 4, mode="random", generator=torch.Generator().manual_seed(1))
    elsewhere()
    found = SyntheticDives(4, frames=3, size=16, seed=2)
    assert torch.equal(found.clips, expected.clips) and torch.equal(found.labels, expected.labels)
    assert torch.equal(found[1][0], expected[1][0]) and found[1][1] == expected[1][1]
    for transform, own in zip(transforms, wanted, strict=True):
        assert torch.equal(transform(clip, torch.Generator("cpu").manual_seed(1)), own)
    assert transforms[1](clip).device.type == "cpu", "torch's own generator"
    again = frame_indices(40, 4, mode="random", generator=torch.Generator("cpu").manual_seed(1))
    assert torch.equal(again, places)
    assert frame_indices(40, 4).device.type == "cpu"


@pytest.mark.needs("av")
def test_video_clips(elsewhere, tmp_path):
    from dsts_kernels.data import Annotations, Clip, VideoClips

    path = write_video(tmp_path / "a.mp4", 20)
    clips = tuple(Clip(path, label, None, None, None, None, "a") for label in (0, 1))
    annotations = Annotations(clips, ["x", "y"], {"set": [1, 0]}, {"set": ["s", "t"]})
    expected = VideoClips(annotations, frames=3, size=16, train=True)
    expected.set_epoch(2)
    elsewhere()
    found = VideoClips(annotations, frames=3, size=16, train=True)
    found.set_epoch(2)
    assert torch.equal(found[1][0], expected[1][0])
    assert torch.equal(found.labels, expected.labels) and found.attributes["set"].tolist() == [1, 0]
    assert found.skipped == {} and found.report().startswith("0 of 2")


@pytest.mark.needs("matplotlib")
def test_figures(elsewhere, tmp_path):
    """Measures have the same values; every figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    neuron, label = torch.randint(3, (2, 12)), torch.arange(12) % 4
    routing = {
        "neuron": neuron,
        "label": label,
        "class_names": list("abcd"),
        "frames": torch.randint(255, (2, 5, 6, 6), dtype=torch.uint8),
        "frame_samples": torch.tensor([0, 5]),
    }
    history = [{"epoch": 0, "usage": [[0.5, 0.5, 0.0]], "dead": [1], "saturated": [0.1]}]
    model = FusedDSTS(4, num_layers=2, num_neurons=3).state_dict()
    expected = measures.information_table(routing)
    elsewhere()
    assert measures.information_table(routing) == expected
    assert measures.activation(label, neuron[0], 3, 4).device.type == "cpu"
    written = viz.checkpoint.draw({"model": model, "routing": routing, "history": history}, tmp_path)
    assert {path.stem for path in written} >= {"gates", "activation", "examples", "usage", "saturation", "information"}


def test_imported_afterwards():
    """What a module makes when it is imported, where the default device was set first."""
    code = (
        "import torch; torch.set_default_device('meta'); from dsts_kernels.data import synthetic; "
        "assert synthetic.POSES.device.type == synthetic.STRAIGHT.device.type == 'cpu'; "
        "synthetic.SyntheticDives(2, frames=2, size=8)[0]; import dsts_kernels.viz, dsts_kernels.learning"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_recipes_bookkeeping(elsewhere):
    """What its trainer computes itself; loaders of torch's own draw on the default device."""
    data = SyntheticDives(16, frames=2, size=8)
    elsewhere()
    trainer = argparse.Namespace(test_set=data)
    label = data.labels[:8]
    found = Trainer.routing(trainer, torch.zeros(2, 8, dtype=torch.int64, device="cpu"), label)
    assert found["frames"].device.type == found["frame_samples"].device.type == "cpu"
    assert torch.equal(found["attributes"]["timing"], data.attributes["timing"][:8])
