"""The synthetic task has the structure that it claims: what shape and what timing can be told from."""

from __future__ import annotations

import math

import pytest
import torch

from dsts_kernels.data import SyntheticDives
from dsts_kernels.data.synthetic import POSES, SHAPES, STRAIGHT, TIMINGS, draw_figures, fold, joints


def test_items_and_attributes():
    data = SyntheticDives(40, frames=5, size=16)
    clip, label = data[21]
    assert clip.shape == (3, 5, 16, 16) and clip.dtype == torch.float32 and label == 5
    assert torch.equal(data.labels, 4 * data.attributes["shape"] + data.attributes["timing"])
    assert data.class_names[5] == f"{SHAPES[1]}, {TIMINGS[1]}" and data.num_classes == 16
    assert data.clips.shape == (40, 5, 16, 16) and data.clips.dtype == torch.uint8
    assert SyntheticDives(2, transform=lambda clip: clip[:, :1])[0][0].shape == (3, 1, 32, 32)


def test_same_seed_same_clips():
    """The same arguments give the same bits; more clips begin alike where a block is whole; seeds differ."""
    first, second, other = (SyntheticDives(150, size=16, seed=seed).clips for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(first[:128], SyntheticDives(256, size=16, seed=1).clips[:128])


def test_late_is_early_backwards():
    """So no single frame tells early from late, whatever the turn does."""
    time = torch.linspace(0, 1, 9)
    early, late = fold(time, torch.tensor([True, False]))
    torch.testing.assert_close(early, late.flip(0))
    assert early[2] > 0.99 and early[6] < 0.01


def test_shapes_are_far_apart():
    """Folded bodies differ from one another and from the straight one by more than a pixel of 32."""
    poses = torch.cat((STRAIGHT[None], POSES)) * math.pi / 180
    points = joints(poses, torch.zeros(5))
    for i in range(5):
        for j in range(i):
            assert (points[i] - points[j]).norm(dim=-1).max() > 2 / 32


def test_limbs_keep_their_length():
    points = joints(torch.rand(50, 6) * 6, torch.rand(50) * 6)
    for a, b, length in (
        (0, 1, 0.34),
        (1, 2, 0.26),
        (2, 3, 0.26),
        (1, 4, 0.26),
        (4, 5, 0.26),
        (0, 6, 0.19),
        (6, 7, 0.19),
    ):
        torch.testing.assert_close((points[:, a] - points[:, b]).norm(dim=-1), torch.full((50,), length))


def test_figures_are_drawn_where_the_joints_are():
    points = joints(torch.zeros(1, 1, 6), torch.zeros(1, 1))
    figure = draw_figures(points, torch.tensor([0.06]), 32)[0, 0]
    for x, y in points[0, 0].tolist():
        assert figure[int((y + 1) * 16), int((x + 1) * 16)] > 0.5
    assert figure[0].max() < 0.01 and figure.mean() < 0.2


def test_a_simple_rule_tells_space_from_time():
    """Without noise, the figure's spread tells *when* it was folded and nothing of it is in the mean over time."""
    data = SyntheticDives(256, noise=0.0, size=32)
    figure = (data.clips.float() - data.clips.float().amin((2, 3), keepdim=True)).clamp_min(0)
    line = torch.linspace(-1, 1, 32)
    mass = figure.sum((2, 3))
    centre = (figure.sum(2) * line).sum(-1) / mass, (figure.sum(3) * line).sum(-1) / mass
    spread = ((line - centre[0][..., None]) ** 2 * figure.sum(2)).sum(-1) / mass
    spread = spread + ((line - centre[1][..., None]) ** 2 * figure.sum(3)).sum(-1) / mass
    late = data.attributes["timing"] % 2 == 1
    folded = data.attributes["shape"] < 2  # pike and tuck draw the body together
    early_half, late_half = spread[:, :4].mean(1), spread[:, 4:].mean(1)
    found = (late_half < early_half)[folded] == late[folded]
    assert found.float().mean() > 0.85
    whole = spread.mean(1)
    assert (whole[folded & late].mean() - whole[folded & ~late].mean()).abs() < 0.05 * whole.mean()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 0}, "count"),
        ({"frames": 1}, "frames"),
        ({"size": 4}, "size"),
        ({"noise": -1.0}, "noise"),
        ({"count": True}, "count"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        SyntheticDives(**options)
