"""The task of cells has the structure that it claims: what features, one neuron, and two specialised ones can tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsts_kernels import FusedDSTS
from dsts_kernels.data import SyntheticCells
from dsts_kernels.data.cells import (
    CUES,
    GLYPHS,
    GROUPS,
    SPACE,
    TIME,
    GlyphDetector,
    draw_cells,
    patterns,
    space_signs,
    time_signs,
)
from tests.probe.models import CHANNELS, Solved, built_by_hand


def clips_of(data: SyntheticCells) -> torch.Tensor:
    return torch.stack([clip for clip, _ in data])


def accuracy(model: nn.Module, data: SyntheticCells) -> float:
    with torch.no_grad():
        return float((model.eval()(clips_of(data)).argmax(1) == data.labels).double().mean())


def drawn(noise: float = 0.0, seed: int = 0, **attributes: int) -> torch.Tensor:
    """Clips of every glyph with these attributes, by the same draws for the same seed: normalised, not rounded."""
    one = {"group": 0, "space": 0, "time": 0} | attributes
    found = {name: torch.full((GLYPHS,), value) for name, value in one.items()} | {"glyph": torch.arange(GLYPHS)}
    pixels = draw_cells(found, 8, 16, noise, torch.Generator().manual_seed(seed))
    return ((pixels - 0.5) * (255 / 64))[:, None].expand(-1, 3, -1, -1, -1)


def test_items_and_attributes():
    data = SyntheticCells(64, size=16, frames=16)
    clip, label = data[13]
    assert clip.shape == (3, 16, 16, 16) and clip.dtype == torch.float32 and label == 5
    assert data.num_classes == 8 and data.class_names[5] == "group 2, slow"
    assert torch.equal(data.labels // 2, data.attributes["group"])
    assert {name: len(names) for name, names in data.attribute_names.items()} == {
        "group": CUES,
        "space": 3,
        "time": 3,
        "glyph": GLYPHS,
    }
    assert all(int(values.max()) < len(data.attribute_names[name]) for name, values in data.attributes.items())


def test_same_seed_same_clips():
    first, second, other = (SyntheticCells(40, size=16, seed=seed).clips for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_class_is_one_pattern_and_all_else_is_drawn():
    """In a group of space the member is the pattern in space, and patterns in time and glyphs are as often in each."""
    data = SyntheticCells(8 * 900, size=8, noise=0.0)
    for group, (what, pair) in enumerate(GROUPS):
        names, other, count = (SPACE, "time", len(TIME)) if what == "space" else (TIME, "space", len(SPACE))
        for member, one in enumerate(pair):
            mine = data.labels == 2 * group + member
            assert set(data.attributes[what][mine].tolist()) == {names.index(one)}
            for name, values in ((other, count), ("glyph", GLYPHS)):
                share = torch.bincount(data.attributes[name][mine], minlength=values) / mine.sum()
                assert (share - 1 / values).abs().max() < 0.06


def test_patterns_are_balanced():
    """Each pattern is as often 1 as -1, under every shift, so that none is told from how much of it there is."""
    assert space_signs(8).sum((1, 2)).tolist() == [0, 0, 0] and time_signs(16).sum(1).tolist() == [0, 0, 0]
    shown = patterns().flatten(1)
    assert torch.equal(shown @ shown.T, torch.eye(GLYPHS + CUES) * 16) and shown.sum(1).abs().max() == 0


def test_detector_sees_glyph_and_cue():
    """A glyph's channel is on in half of the cells, and those of other glyphs and cues are off."""
    for group in range(CUES):
        features = GlyphDetector()(drawn(group=group))
        on = features > 0.05
        wanted = torch.zeros(GLYPHS, CHANNELS)
        wanted[torch.arange(GLYPHS), torch.arange(GLYPHS)] = 0.5
        wanted[:, GLYPHS + group] = 1.0
        assert torch.equal(on.float().mean((2, 3, 4)), wanted)


def test_features_tell_the_group_only():
    """Whatever reads the mean of the features answers by chance within a group: both members have the same one."""
    for what, names in (("space", SPACE), ("time", TIME)):
        means = [GlyphDetector()(drawn(**{what: index})).mean((2, 3, 4)) for index in range(len(names))]
        for other in means[1:]:
            torch.testing.assert_close(other, means[0], atol=1e-5, rtol=1e-5)


def test_solved_by_hand():
    """Two neurons, weights set by code: nearly all clips are right, in noise too; each group takes its neuron."""
    data = SyntheticCells(256, seed=int(torch.randint(1 << 30, ())))
    model = Solved()
    assert accuracy(model, data) > 0.97
    _, routing = model.dsts(model.detector(clips_of(data)), return_routing=True)
    assert torch.equal(routing.neuron[0], (data.attributes["group"] >= 2).long())


@pytest.mark.parametrize("skip", [True, False])
def test_what_one_neuron_cannot_see(skip):
    """Whatever the weights of a single neuron: a glyph that it looks at along time says nothing of space, and the
    reverse. So of each glyph's clips one half of the groups are answered by chance: accuracy 3/4 at most."""
    dsts = FusedDSTS(CHANNELS, num_layers=1, num_neurons=1, skip=skip, dtype=torch.float64).eval()
    layer = dsts.layers[0]
    with torch.no_grad():
        layer.gate.normal_()
        layer.gate[0, :2] = torch.tensor([1.0, -1.0])  # one of either, at least
        layer.norm.running_mean.normal_(std=0.05)  # of the size of what passes, so that ReLU cuts through it
        layer.norm.weight.normal_()
        layer.norm.bias.normal_(std=0.05)
    spatial = layer.gate[0, :GLYPHS] > 0
    seed = int(torch.randint(1 << 30, ()))

    def pooled(**attributes: int) -> torch.Tensor:
        """Of an endless clip: the middle of three by three by three, so that no border shows through."""
        features = GlyphDetector(threshold=0.05)(drawn(seed=seed, **attributes)).double()  # off is 0, not rounding
        frames, side = features.shape[2], features.shape[3]
        with torch.no_grad():
            whole = dsts(features.repeat(1, 1, 3, 3, 3))
        return whole[:, :, frames:-frames, side:-side, side:-side].mean((2, 3, 4))

    def apart(what: str, first: int, second: int, **others: int) -> torch.Tensor:
        return (pooled(**{what: first}, **others) - pooled(**{what: second}, **others)).abs().amax(1)

    scale, seen = pooled().abs().max(), []
    for group in range(CUES):
        for first, second in ((0, 1), (0, 2)):
            space = apart("space", first, second, group=group, time=int(torch.randint(3, ())))
            time = apart("time", first, second, group=group, space=int(torch.randint(3, ())))
            assert (space[~spatial] < 1e-6 * scale).all() and (time[spatial] < 1e-6 * scale).all()
            seen.append(torch.stack((space[spatial].amax(), time[~spatial].amax())))
    assert (torch.stack(seen).amax(0) > 1e-3 * scale).all()  # the rest it does see


@pytest.mark.parametrize("spatial", [0, 3, 8])
def test_one_neuron_of_the_same_size_does_worse(spatial):
    """The same filters, as many channels, all in one neuron: three quarters, however it deals the glyphs out."""
    glyphs = torch.randperm(GLYPHS) < spatial
    data = SyntheticCells(512, size=16, noise=0.0, seed=int(torch.randint(1 << 30, ())))
    found = accuracy(Solved(built_by_hand([glyphs])), data)
    assert 0.67 < found < 0.83  # 3/4, and four standard deviations of a count of 512
    assert accuracy(Solved(), data) == 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 0}, "count: got 0"),
        ({"frames": 12}, "frames: got 12, wanted a multiple of 8"),
        ({"size": 20}, "size: got 20, wanted a multiple of 8"),
        ({"noise": float("nan")}, "noise"),
        ({"count": True}, "count"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        SyntheticCells(**options)
