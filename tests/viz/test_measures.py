"""Numbers behind figures, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dsts_kernels import viz

B = 8  # samples of the routing that conftest.py makes


def information_of(table):
    """``mutual_information`` of samples with these counts ``(attribute, neuron)``."""
    pairs = [(a, n) for a, row in enumerate(table) for n, count in enumerate(row) for _ in range(count)]
    attribute, neuron = torch.tensor(pairs).T
    return viz.mutual_information(attribute, neuron), viz.mutual_information(attribute, neuron, normalised=True)


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
