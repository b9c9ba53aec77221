"""Figures of a checkpoint: numbers computed by hand, and the same numbers in the bars, images and lines drawn."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch

from dsts_kernels import FusedDSTS, viz
from dsts_kernels.learning import load_checkpoint
from dsts_kernels.learning.checkpoint import FORMAT
from dsts_kernels.viz import checkpoint as files
from dsts_kernels.viz.specialization import pick_examples
from dsts_kernels.viz.style import LAYERS, NEURONS

L, N, B = 2, 3, 8


@pytest.fixture
def routing():
    """Layer 0 follows the class; layer 1 ignores it and follows ``half``."""
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    half = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    frames = torch.arange(3 * 6 * 4 * 5, dtype=torch.uint8).view(3, 6, 4, 5)
    return {
        "neuron": torch.stack([2 * label, half]),
        "label": label,
        "class_names": ["left", "right", "never"],
        "attributes": {"half": half},
        "attribute_names": {"half": ["early", "late"]},
        "frames": frames,
        "frame_samples": torch.tensor([5, 0, 6]),
    }


@pytest.fixture
def history():
    usage = [[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [[0.2, 0.3, 0.5], [0.75, 0.25, 0.0]]]
    return [
        {"epoch": 0, "usage": usage[0], "dead": [0, 2], "saturated": [0.1, 0.2], "entropy": [1.5, 0.0]},
        {"epoch": 1, "train_loss": 1.0},
        {"epoch": 2, "usage": usage[1], "dead": [0, 1], "saturated": [0.6, 0.9], "entropy": [1.48, 0.81]},
    ]


@pytest.fixture
def checkpoint(routing, history):
    model = {f"dsts.{key}": value for key, value in FusedDSTS(4, num_layers=L, num_neurons=N).state_dict().items()}
    return {"format": FORMAT, "options": {}, "epoch": 2, "model": model, "history": history, "routing": routing}


@pytest.fixture
def matplotlib():
    import matplotlib as module

    module.use("Agg")
    return module


def drawn(fig):
    """The figure after layout, so that ticks and labels are what is seen."""
    fig.draw_without_rendering()
    return fig


def rgb(color):
    from matplotlib.colors import to_hex

    return to_hex(color).upper()


def information_of(table):
    """``mutual_information`` of samples with these counts ``(attribute, neuron)``."""
    pairs = [(a, n) for a, row in enumerate(table) for n, count in enumerate(row) for _ in range(count)]
    attribute, neuron = torch.tensor(pairs).T
    return viz.mutual_information(attribute, neuron), viz.mutual_information(attribute, neuron, normalised=True)


# Measures


def test_gate_shares():
    """Logits above 0 are spatial, 0 itself is not; channels may differ by layer."""
    first = torch.tensor([[1.0, 2.0, -1.0, 0.0], [-1.0, -2.0, -3.0, 4.0]])
    second = torch.tensor([[3.0, 1.0], [-1.0, -1.0]], dtype=torch.bfloat16).requires_grad_()
    assert torch.equal(viz.gate_shares([first, second]), torch.tensor([[0.5, 0.25], [1.0, 0.0]]))


def test_gate_band():
    """By hand: of 5 coins 0 or 5 alike come in 6.25%, so 1 to 4 would not hold 95%, but 90%; the chance of all bars."""
    assert viz.gate_band(5) == (0.0, 1.0) and viz.gate_band(5, level=0.9) == (0.2, 0.8)
    assert viz.gate_band(5, bars=2, level=0.9) == (0.0, 1.0)
    for channels, bars in ((48, 12), (1024, 30)):
        low, high = (round(share * channels) for share in viz.gate_band(channels, bars))
        inside = [math.comb(channels, k) / 2**channels for k in range(low, high + 1)]
        assert sum(inside) ** bars >= 0.95 > (sum(inside) - 2 * inside[0]) ** bars  # the narrowest that holds it
    assert viz.gate_band(48, 12)[0] < 0.38 < 0.6 < viz.gate_band(48, 12)[1]
    for options in ((0,), (4, 0), (4, 1, 1.0)):
        with pytest.raises(ValueError, match="got"):
            viz.gate_band(*options)


def test_sign_flips():
    """0 is temporal: it has crossed to 1 and not to -1; a share may stay where half of the gates cross."""
    start = torch.tensor([[1.0, -1.0, 0.0, 2.0], [1.0, 1.0, -1.0, -1.0]])
    now = torch.tensor([[-1.0, -1.0, 1.0, 3.0], [1.0, -1.0, 1.0, -1.0]])
    assert viz.sign_flips([start], [now]).tolist() == [[0.5, 0.5]]
    assert torch.equal(*(viz.gate_shares([gate])[0, 1] for gate in (start, now)))
    with pytest.raises(ValueError, match="start: got gates of shapes"):
        viz.sign_flips([start], [now, now])


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        ([], "got none"),
        ([torch.zeros(3)], r"gates\[0\]: got a tensor of shape \(3,\)"),
        ([torch.zeros(3, 2), torch.zeros(4, 2)], r"gates\[1\]: got 4 neurons, wanted 3"),
    ],
)
def test_gate_shares_bad(gates, says):
    with pytest.raises(ValueError, match=says):
        viz.gate_shares(gates)


@pytest.mark.parametrize(
    ("table", "bits", "share"),
    [
        pytest.param([[2, 2], [2, 2]], 0.0, 0.0, id="independent"),
        pytest.param([[1, 2, 3], [2, 4, 6]], 0.0, 0.0, id="independent-unequal"),
        pytest.param([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2.0, 1.0, id="identical"),
        # 0.75 log2(0.75 / 0.5) + 0.25 log2(0.25 / 0.5)
        pytest.param([[3, 1], [1, 3]], 0.18872187554086717, 0.18872187554086717, id="2x2"),
        # H(a) = 0.8112781244591328, H(n) = 1, H(a, n) = 1.5
        pytest.param([[1, 0], [1, 2]], 0.3112781244591328, 0.3112781244591328 / 0.8112781244591328, id="2x2-skewed"),
        pytest.param([[2, 3]], 0.0, 0.0, id="one-value"),
        pytest.param([[2], [2]], 0.0, 0.0, id="one-neuron"),
    ],
)
def test_mutual_information(table, bits, share):
    assert information_of(table) == (pytest.approx(bits, abs=1e-12), pytest.approx(share, abs=1e-12))


@pytest.mark.parametrize(
    ("attribute", "neuron", "says"),
    [
        (torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), "no samples"),
        (torch.tensor([0, 1]), torch.tensor([0]), "wanted an int64 tensor of shape"),
        (torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), "attribute: got a tensor"),
        (torch.tensor([0, 1]), torch.tensor([0, -1]), "neuron: got -1 to 0"),
    ],
)
def test_mutual_information_bad(attribute, neuron, says):
    with pytest.raises(ValueError, match=says):
        viz.mutual_information(attribute, neuron)


def test_shuffled_information():
    """What chance gives: all permutations of two by two samples by hand; seeded; torch's generator is left alone."""
    attribute = torch.tensor([0, 0, 1, 1])
    # Of the 6 ways to split the samples 2 give 1 bit and 4 give none.
    assert viz.shuffled_information(attribute, attribute, shuffles=4000) == pytest.approx(1 / 3, abs=0.03)
    before = torch.get_rng_state()
    once = viz.shuffled_information(attribute, attribute, shuffles=5, seed=3)
    assert once == viz.shuffled_information(attribute, attribute, shuffles=5, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="shuffles: got 0"):
        viz.shuffled_information(attribute, attribute, shuffles=0)


def test_small_sample_bias_is_seen():
    """Independent draws of few samples in many cells look informative; the shuffled baseline says how much is bias."""
    generator = torch.Generator().manual_seed(0)
    attribute, neuron = torch.randint(12, (2, 60), generator=generator)
    bits, chance = viz.mutual_information(attribute, neuron), viz.shuffled_information(attribute, neuron)
    assert bits > 1.0 and bits == pytest.approx(chance, abs=0.15)


def test_activation():
    shares = viz.activation(torch.tensor([0, 0, 0, 0, 2]), torch.tensor([1, 1, 1, 0, 2]), neurons=4, values=3)
    assert torch.equal(shares[0], torch.tensor([0.25, 0.75, 0.0, 0.0]).double())
    assert shares[1].isnan().all()
    assert torch.equal(shares[2], torch.tensor([0.0, 0.0, 1.0, 0.0]).double())


def test_information_table(routing):
    rows = viz.information_table(routing, shuffles=10)
    seen = {(row["layer"], row["attribute"]): (row["bits"], row["share"]) for row in rows}
    near = pytest.approx
    assert seen == {
        (0, "class"): (near(1), near(1)),
        (0, "half"): (near(0, abs=1e-9), near(0, abs=1e-9)),
        (1, "class"): (near(0, abs=1e-9), near(0, abs=1e-9)),
        (1, "half"): (near(1), near(1)),
    }
    expected = viz.shuffled_information(routing["label"], routing["neuron"][0], shuffles=10)
    assert rows[0]["shuffled_bits"] == expected and 0 < expected < 1
    assert rows[0]["chance_bits"] >= expected and rows[0]["p"] >= 1 / 11
    by_chance = {(row["layer"], row["attribute"]): row["p"] for row in viz.information_table(routing)}
    assert by_chance[0, "class"] < 0.1 < 0.9 < by_chance[0, "half"]  # 2 of 70 deals tell as much, and all do
    text = viz.information_text(rows).splitlines()
    assert len(text) == 5 and text[1].split()[:4] == ["0", "class", "1.000", "100.0%"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": None}, r"routing\['label'\]: got NoneType"),
        ({"neuron": torch.zeros(B, dtype=torch.int64)}, r"routing\['neuron'\].*wanted \(L, B\)"),
        ({"class_names": ["left"]}, r"routing\['label'\]: got 0 to 1, wanted indices from 0 to 0"),
        ({"attribute_names": {}}, r"routing\['attribute_names'\]: got no 'half'"),
        (
            {"attributes": {"half": torch.zeros(3, dtype=torch.int64)}},
            r"\['half'\].*wanted an int64 tensor of shape \(8",
        ),
        ({"frames": torch.zeros(3, 2, 4, 4)}, r"routing\['frames'\].*wanted uint8"),
        ({"frames": torch.zeros(3, 2, 4, 4, 2, dtype=torch.uint8)}, r"routing\['frames'\].*wanted uint8"),
        ({"frame_samples": torch.tensor([0, 1, 8])}, r"routing\['frame_samples'\]: got 0 to 8"),
    ],
)
def test_bad_routing(routing, change, says):
    """A part of another shape is named, whatever is drawn of it."""
    with pytest.raises(ValueError, match=says):
        viz.information_table({**routing, **change})


def test_missing_routing_key(routing):
    del routing["neuron"]
    with pytest.raises(ValueError, match="got no 'neuron'"):
        viz.information_table(routing)


# Figures


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


# Checkpoints


def test_find_gates():
    """Every DSTS module by its name, layers in order of their numbers; a gate without scoring is another module's."""
    inner = FusedDSTS(4, num_layers=11, num_neurons=2)
    state = {f"head.dsts.{key}": value for key, value in reversed(inner.state_dict().items())}
    state |= FusedDSTS(3, num_layers=1, num_neurons=5).state_dict()
    state["moe.layers.0.gate"] = torch.zeros(2, 2)
    found = viz.find_gates(state)
    assert {name: len(gates) for name, gates in found.items()} == {"head.dsts": 11, "": 1}
    assert all(torch.equal(gate, layer.gate) for gate, layer in zip(found["head.dsts"], inner.layers, strict=True))


@pytest.mark.needs("matplotlib")
def test_draw(matplotlib, tmp_path, checkpoint, routing):
    """All figures, and the information as JSON, from a file as training saves it."""
    torch.save(checkpoint, tmp_path / "last.pt")
    written = viz.draw(load_checkpoint(tmp_path / "last.pt"), tmp_path / "a" / "b")
    names = ["gates.png", "examples.png", "activation.png", "usage.png", "saturation.png", "information.json"]
    assert [path.relative_to(tmp_path / "a" / "b").as_posix() for path in written] == names
    for path in written[:-1]:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200 and image.std() > 0.02
    assert json.loads(written[-1].read_text()) == viz.information_table(routing)


@pytest.mark.needs("matplotlib")
def test_draw_what_there_is(matplotlib, tmp_path, checkpoint):
    """Parts may be absent; several DSTS modules get a figure each."""
    del checkpoint["routing"], checkpoint["history"]
    checkpoint["model"] |= FusedDSTS(4, num_layers=1, num_neurons=2).state_dict()
    assert {path.name for path in viz.draw(checkpoint, tmp_path)} == {"gates-dsts.png", "gates-model.png"}


@pytest.mark.needs("matplotlib")
def test_draw_passes_gates_on(matplotlib, tmp_path, checkpoint, monkeypatch):
    """Figures get the checkpoint's own gates, their start and channels, and its number of neurons, not that of the
    neurons chosen."""
    seen = {}
    real = viz.plot_gates, viz.plot_activation

    def plot_gates(shares, channels, start):
        seen.update(shares=shares, channels=channels, start=start)
        return real[0](shares, channels, start)

    monkeypatch.setattr(files, "plot_gates", plot_gates)
    monkeypatch.setattr(files, "plot_activation", lambda r, n: seen.update(neurons=n) or real[1](r, n))
    start = [torch.randn(N, 4) for _ in range(L)]
    checkpoint["gates_at_start"] = {f"dsts.layers.{layer}": gate for layer, gate in enumerate(start)}
    viz.draw(checkpoint, tmp_path)
    gates = [checkpoint["model"][f"dsts.layers.{layer}.gate"] for layer in range(L)]
    assert torch.equal(seen["shares"], viz.gate_shares(gates)) and seen["neurons"] == N
    assert torch.equal(seen["start"], viz.gate_shares(start)) and seen["channels"] == [4] * L
    checkpoint["gates_at_start"].popitem()
    with pytest.raises(ValueError, match="other layers in 'gates_at_start'"):
        viz.draw(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, "no DSTS gates in 'model', no 'routing' and no 'usage'"),
        ({}, "a model without DSTS has nothing to draw"),
        ({"model": [1]}, "got list in 'model'"),
        ({"history": [1]}, "got list in 'history'"),
        ({"routing": [1]}, "routing: got list"),
    ],
)
def test_nothing_to_draw(tmp_path, parts, says):
    with pytest.raises(ValueError, match=says):
        viz.draw({"format": FORMAT, **parts}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib(monkeypatch):
    """Numbers do without matplotlib; a figure says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shares = viz.gate_shares([torch.ones(2, 3)])
    with pytest.raises(ImportError, match=r"pip install 'dsts_kernels\[train\]'"):
        viz.plot_gates(shares)


def test_import_leaves_matplotlib_alone():
    """The package, its command line and its measures do not import matplotlib."""
    import subprocess

    code = "import sys, dsts_kernels.cli, dsts_kernels.viz; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
