"""Bars, images and lines that are drawn show the numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsts_kernels import viz
from dsts_kernels.viz.specialization import pick_examples
from dsts_kernels.viz.style import LAYERS, NEURONS

L, N = 2, 3  # layers and neurons of the checkpoint that conftest.py makes


def drawn(fig):
    """The figure after layout, so that ticks and labels are what is seen."""
    fig.draw_without_rendering()
    return fig


def rgb(color):
    from matplotlib.colors import to_hex

    return to_hex(color).upper()


@pytest.mark.needs("matplotlib")
def test_plot_gates(matplotlib):
    """Bars are the spatial share, and on top of it the rest; neurons keep their colours on the axis."""
    shares = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0625, 0.75]])
    panels = drawn(viz.plot_gates(shares)).axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1"]
    for axes, expected in zip(panels, shares.tolist(), strict=True):
        spatial, temporal = axes.containers
        assert [bar.get_height() for bar in spatial] == expected
        assert [bar.get_height() for bar in temporal] == [1 - share for share in expected]
        assert [bar.get_y() for bar in temporal] == expected
        assert [label.get_bbox_patch().get_facecolor() for label in axes.get_xticklabels()] == [
            matplotlib.colors.to_rgba(color) for color in NEURONS[:3]
        ]
    assert [text.get_text() for text in panels[1].texts] == ["100", "6", "75"]
    with pytest.raises(ValueError, match=r"shares: got shape \(3,\)"):
        viz.plot_gates(torch.zeros(3))


@pytest.mark.needs("matplotlib")
def test_plot_gates_beside_chance(matplotlib):
    """The band is that of all bars of the figure, by the layer's channels; marks stand where training began."""
    shares, start = torch.tensor([[0.5, 0.25], [1.0, 0.75]]), torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    panels = drawn(viz.plot_gates(shares, [8, 48], start)).axes
    for axes, channels, began in zip(panels, (8, 48), start.tolist(), strict=True):
        low, high = viz.gate_band(channels, bars=4)
        (band,) = [p for p in axes.patches if p.get_label().startswith("chance")]
        assert (band.get_y(), band.get_y() + band.get_height()) == (pytest.approx(low), pytest.approx(high))
        (marks,) = [line for line in axes.lines if line.get_label() == "at the start"]
        assert list(marks.get_ydata()) == began
    with pytest.raises(ValueError, match="channels: got 1"):
        viz.plot_gates(shares, [8])
    with pytest.raises(ValueError, match="start: got shape"):
        viz.plot_gates(shares, start=start[:1])


@pytest.mark.needs("matplotlib")
def test_plot_costs(matplotlib):
    """Bars are costs in points, whiskers their intervals; what does not lie above 0 is pale."""
    one = [
        {"name": "gates flipped", "cost": 0.25, "low": 0.2, "high": 0.31},
        {"name": "all spatial", "cost": -0.01, "low": -0.03, "high": 0.02},
    ]
    panels = drawn(viz.plot_costs({"first": one, "second": one[:1] + one[1:]})).axes
    assert [axes.get_title() for axes in panels] == ["first", "second"]
    for axes in panels:
        bars = [bar for bar in axes.patches if bar.get_height() < 1]
        assert [bar.get_width() for bar in bars] == [25.0, -1.0]
        assert rgb(bars[0].get_facecolor()) != rgb(bars[1].get_facecolor())
        ends = axes.collections[0].get_segments()
        assert [[x for x, _ in end] for end in ends] == [pytest.approx([20, 31]), pytest.approx([-3, 2])]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["gates flipped", "all spatial"]
    for rows in ({}, {"a": []}, {"a": one, "b": one[:1]}):
        with pytest.raises(ValueError, match="rows: wanted the same changes"):
            viz.plot_costs(rows)


@pytest.mark.needs("matplotlib")
def test_plot_activation(matplotlib, routing):
    """Images are P(neuron | value); a value without samples is masked; labels count samples; titles tell bits."""
    panels = drawn(viz.plot_activation(routing, neurons=4)).axes[:4]
    left, right, late = [1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 1.0, 0, 0]
    half = [0.5, 0.5, 0, 0]
    first, second, third, fourth = (axes.images[0].get_array() for axes in panels)
    assert first[:2].tolist() == [left, right] and first.mask[2].all() and not first.mask[:2].any()
    assert second[:2].tolist() == [half, half]
    assert third.tolist() == [[0.5, 0, 0.5, 0]] * 2
    assert fourth.tolist() == [left, late]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["left (4)", "right (4)", "never (0)"]
    assert [label.get_text() for label in panels[2].get_yticklabels()] == ["early (4)", "late (4)"]
    assert panels[0].get_title().startswith("layer 0\n1.00 bits (100%), shuffled 0.")
    assert panels[1].get_title().startswith("layer 1\n0.00 bits (0%), shuffled 0.")
    assert panels[0].images[0].get_clim() == (0, 1)


@pytest.mark.needs("matplotlib")
def test_plot_examples(matplotlib, routing):
    """A row a clip, classes together; four frames from first to last; a cell a layer in the neuron's colour."""
    fig = drawn(viz.plot_examples(routing))
    (axes,) = fig.axes
    order = [1, 0, 2]  # of class 0, then the two of class 1
    shown = [image.get_array() for image in axes.images]
    expected = [routing["frames"][clip, step] for clip in order for step in (0, 2, 3, 5)]
    assert len(shown) == 12 and all((a == b.numpy()).all() for a, b in zip(shown, expected, strict=True))
    samples = routing["frame_samples"][order]
    chosen = routing["neuron"][:, samples].T.flatten().tolist()
    assert [int(text.get_text()) for text in axes.texts] == chosen
    assert [rgb(patch.get_facecolor()) for patch in axes.patches] == [NEURONS[n] for n in chosen]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["left", "right"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["frames", "layer 0", "layer 1"]
    box = axes.images[0].get_window_extent()
    assert box.width / box.height == pytest.approx(5 / 4, rel=1e-3)


@pytest.mark.needs("matplotlib")
def test_plot_examples_keeps_names_in_the_figure(matplotlib, routing):
    """A long class name is wrapped and the figure widened for it."""
    routing["class_names"][0] = "WWWWWWWWWWWWWWWWWWWWWWWW back, 2.5 somersaults, pike"
    fig = drawn(viz.plot_examples(routing))
    assert all(label.get_window_extent().x0 >= 0 for label in fig.axes[0].get_yticklabels())


@pytest.mark.needs("matplotlib")
def test_plot_examples_in_color(matplotlib, routing):
    routing["frames"] = torch.randint(256, (3, 1, 4, 6, 3), dtype=torch.uint8)
    (axes,) = drawn(viz.plot_examples(routing)).axes
    assert [image.get_array().shape for image in axes.images] == [(4, 6, 3)] * 3
    assert axes.get_xticklabels()[0].get_text() == "frame"


@pytest.mark.needs("matplotlib")
def test_plot_examples_without_frames(matplotlib, routing):
    del routing["frames"]
    with pytest.raises(ValueError, match="got no 'frames'"):
        viz.plot_examples(routing)


def test_pick_examples():
    """Classes with more clips come first, at most three of one, and the picked stay together."""
    label = torch.tensor([1, 2, 2, 0, 2, 2, 1])
    routing = {"label": label, "frame_samples": torch.arange(7)}
    assert pick_examples(routing) == [3, 0, 6, 1, 2, 4]
    assert pick_examples(routing, most=5) == [0, 6, 1, 2, 4]
    assert pick_examples(routing, most=2, per_class=1) == [3, 0]


@pytest.mark.needs("matplotlib")
def test_plot_usage(matplotlib, history):
    """Areas are the shares of the epochs that recorded them, stacked; the largest are named at the end."""
    panels = drawn(viz.plot_usage(history)).axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1"]
    for layer, axes in enumerate(panels):
        usage = torch.tensor([history[0]["usage"][layer], history[2]["usage"][layer]], dtype=torch.float64)
        areas = [patch.get_data() for patch in axes.patches]
        assert len(areas) == N
        for neuron, area in enumerate(areas):
            assert list(area.edges) == [-1, 1, 3]
            assert (area.values - area.baseline).tolist() == pytest.approx(usage[:, neuron].tolist())
            assert area.baseline.tolist() == pytest.approx(usage[:, :neuron].sum(1).tolist())
            assert rgb(axes.patches[neuron].get_facecolor()) == NEURONS[neuron]
    assert [text.get_text() for text in panels[1].texts] == ["0", "1"]


@pytest.mark.needs("matplotlib")
def test_plot_usage_of_evaluation(matplotlib, history):
    """Where it was recorded, what evaluation chooses has a row beneath what noise chose."""
    for row in (history[0], history[2]):
        row["test_usage"] = [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]
    panels = drawn(viz.plot_usage(history)).axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1", "", ""]
    heights = [[(patch.get_data().values - patch.get_data().baseline)[-1] for patch in a.patches] for a in panels]
    assert heights[2:] == [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]
    assert heights[:2] == [pytest.approx(own) for own in history[2]["usage"]]
    assert "evaluation" in panels[2].get_ylabel() and "noise" in panels[0].get_ylabel()
    history[0]["test_usage"] = history[2]["test_usage"] = [[1.0]]
    with pytest.raises(ValueError, match="'test_usage' of shape"):
        viz.plot_usage(history)


@pytest.mark.needs("matplotlib")
def test_plot_usage_of_one_epoch(matplotlib, history):
    """One epoch is as wide as an epoch, not a line."""
    areas = [patch.get_data() for patch in drawn(viz.plot_usage(history[:1])).axes[0].patches]
    assert [list(area.edges) for area in areas] == [[-0.5, 0.5]] * N
    assert [area.values.item() for area in areas] == [0.5, 0.75, 1.0]


@pytest.mark.needs("matplotlib")
def test_plot_saturation(matplotlib, history):
    """A line a layer: shares of gates, and dead neurons over all neurons."""
    gates, dead = drawn(viz.plot_saturation(history)).axes
    assert [line.get_xdata().tolist() for line in gates.lines] == [[0, 2]] * L
    assert [line.get_ydata().tolist() for line in gates.lines] == [[0.1, 0.6], [0.2, 0.9]]
    assert [line.get_ydata().tolist() for line in dead.lines] == [[0, 0], pytest.approx([2 / 3, 1 / 3])]
    assert [line.get_color() for line in dead.lines] == [color for color, _, _ in LAYERS[:L]]
    assert [line.get_label() for line in gates.lines] == ["layer 0", "layer 1"]


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("plot", [viz.plot_usage, viz.plot_saturation])
def test_bad_history(matplotlib, history, plot):
    with pytest.raises(ValueError, match="no epoch with 'usage'"):
        plot([{"epoch": 0}])
    history[2]["usage"] = [[1.0]]
    with pytest.raises(ValueError, match="'usage' is not numbers of one shape"):
        plot(history)


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize(("layers", "neurons", "values"), [(1, 2, 2), (4, 16, 48)])
def test_texts_keep_apart(matplotlib, layers, neurons, values):
    """In the smallest and the largest case no tick label touches its neighbour and nothing leaves the figure."""
    label = torch.arange(96) % values
    neuron = torch.stack([(label + layer) % neurons for layer in range(layers)])
    names = [f"back, 2.5 somersaults, free, {value} twists" for value in range(values)]
    routing = {"neuron": neuron, "label": label, "class_names": names}
    for fig in (viz.plot_activation(routing, neurons), viz.plot_gates(torch.rand(layers, neurons))):
        drawn(fig)
        assert fig._suptitle.get_window_extent().x0 >= 0
        for axes in fig.axes[:layers]:
            boxes = [text.get_bbox_patch().get_window_extent() for text in axes.get_xticklabels()]
            assert len(boxes) == neurons
            assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))
            rows = [text.get_window_extent() for text in axes.get_yticklabels()]
            rows.sort(key=lambda box: box.y0)
            assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(rows))
            assert all(box.x0 >= 0 for box in rows)
