"""Half types on a CPU: rows that force a way, goals beside what was measured, rates, and int8 on its grid."""

from __future__ import annotations

import pytest
import torch
from made_up import made_up

from benchmarks.cpu import errors, half, int8
from benchmarks.report import tables
from benchmarks.shapes import NAMED_SHAPES, Problem
from benchmarks.variants import FORCED, VARIANTS
from dsts_kernels import FusedDSTS
from dsts_kernels.backends.algorithm import wanted_algorithm

MS = {
    ("evaluation", "handwritten"): 80.0,
    ("evaluation", "fused"): 50.0,
    ("evaluation", "frozen"): 40.0,
    ("evaluation", "frozen direct"): 40.0,
    ("evaluation", "frozen winograd"): 75.0,
    ("training", "literal"): 900.0,
    ("training", "fused"): 450.0,
}


def results() -> dict:
    found = made_up({(*key, "tpn", 1): ms for key, ms in MS.items()}, device="A CPU")
    del found["copy_gb_s"]
    label = Problem("tpn", NAMED_SHAPES["tpn"]).label
    found["convolution"] = {label: {half.SPATIAL: 3200.0, half.TEMPORAL: 2000.0}}
    found["units"] = "AMX, measured at 7.0 times float32's rate"
    problems = tuple(Problem(name, grid) for name, grid in NAMED_SHAPES.items())
    found["goals"] = half.goals(found, problems)
    return found


def test_goals():
    """Met, missed and not measured, each by what the rows say; another size has none."""
    found = {g["goal"]: (g["wanted"], g["measured"], g["met"]) for g in results()["goals"]}
    assert len(found) == 10
    assert found["TPN, bfloat16: handwritten / frozen"] == ("at least 2.2", "2.00", False)
    assert found["TPN, bfloat16: handwritten / FusedDSTS evaluation"] == ("at least 1.2", "1.60", True)
    share = 2 * Problem("tpn", NAMED_SHAPES["tpn"]).useful_macs("evaluation") / 0.040 / 3200e9
    assert found["TPN, bfloat16: frozen, share of the 1x3x3 convolution's rate"] == (
        "at least 60%",
        f"{share:.1%}",
        True,
    )
    assert found["TPN, bfloat16: literal / FusedDSTS training step"] == ("at least 3", "2.00", False)
    assert found["TPN, bfloat16: handwritten / FusedDSTS training step"] == ("at least 1.3", "not measured", None)
    assert found["Swin-B, bfloat16: handwritten / frozen"] == ("at least 1.8", "not measured", None)
    assert half.goals(results(), (Problem("tpn", NAMED_SHAPES["tpn"], channels=64), Problem("2x2x2", (2, 2, 2)))) == []


def test_the_table_says_what_the_chip_has():
    for text in ("\n".join(tables.plain(results())), tables.markdown(results())):
        for part in (
            "FrozenDSTS, direct forced",
            "FrozenDSTS, Winograd forced",
            "bfloat16: AMX, measured at 7.0 times float32's rate",
            "1x3x3 convolution 3200",
            "goal: TPN, bfloat16: handwritten / frozen: 2.00, wanted at least 2.2 (missed)",
        ):
            assert part in text


def test_rows_force_their_way():
    for mode, variants in FORCED.items():
        assert {v.partition(" ")[0] for v in variants} < set(VARIANTS[mode])
        for variant in variants:
            with half.block(variant):
                assert wanted_algorithm() == variant.partition(" ")[2]
    with half.block("frozen"):
        assert wanted_algorithm() == "auto"
    assert half.is_half(torch.device("cpu"), torch.float16) and not half.is_half(torch.device("cpu"), torch.float32)


def test_rates():
    rates = half.convolution_rates(Problem("2x3x3", (2, 3, 3), channels=8), torch.bfloat16)
    assert set(rates) == {half.SPATIAL, half.TEMPORAL} and all(rate > 0 for rate in rates.values())


def test_errors():
    found = list(errors.errors(24, 4, (2, 3, 3)))
    assert [(dtype, way) for dtype, way, *_ in found] == [
        (dtype, way) for dtype in ("bfloat16", "float16") for way in half.WAYS
    ]
    for dtype, _, *both in found:
        assert all(0 < error < 4 * torch.finfo(getattr(torch, dtype)).eps for error in both)


@pytest.mark.parametrize("signed", [True, False])
def test_int8_grid(signed):
    """Whole steps, of the largest value at most, and no value further away than half a step."""
    values = torch.randn(2, 50) if signed else torch.rand(2, 50)
    largest = values.abs().amax(1, keepdim=True)
    found, step = int8.on_grid(values, largest, signed), largest / (127 if signed else 255)
    assert ((found - values).abs() <= step / 2 * 1.001).all()
    assert torch.equal(
        (found / step).round(), (found / step).round().clamp(-127 if signed else 0, 127 if signed else 255)
    )
    cut = int8.on_grid(values, largest / 2, signed)
    assert torch.allclose(cut.abs().amax(1, keepdim=True), largest / 2)
    assert not int8.on_grid(torch.zeros(1, 3), torch.zeros(1, 1), signed).any()


def test_int8_runs_what_it_simulates():
    """Without a grid it is the frozen module; weights lie on one of 255 steps for each output of a filter."""
    fused = FusedDSTS(12, num_layers=2, num_neurons=2).eval()
    x = torch.randn(2, 12, 2, 3, 4)
    ways = int8.schemes(fused)
    y, neurons = ways["float32"](x)
    assert torch.equal(y, fused.freeze()(x)) and len(neurons) == 2
    rounded = int8.rounded_weights(fused.freeze(algorithm="direct"))
    for layer in rounded.layers:
        split = int(layer.starts[1])
        panel = layer.filters[: 12 * 9 * split].view(12, -1)
        for row in panel:
            steps = row / row.abs().max() * 127
            assert (steps - steps.round()).abs().max() < 1e-3
    assert 0 < int8.relative_error(ways["int8, max"](x)[0], y) < 0.2
