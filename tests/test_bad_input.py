"""Bad input of the modules: the argument, what came and what was wanted, before any kernel runs."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import Draws, DSTSLayer, FusedDSTS

ARGUMENTS = {
    "in_channels-zero": (dict(in_channels=0), ValueError, "in_channels: got 0, wanted at least 1"),
    "in_channels-float": (dict(in_channels=4.0), TypeError, "in_channels: got float 4.0, wanted an int"),
    "in_channels-bool": (dict(in_channels=True), TypeError, "in_channels: got bool True"),
    "num_layers": (dict(num_layers=0), ValueError, "num_layers: got 0"),
    "num_neurons": (dict(num_neurons=-1), ValueError, "num_neurons: got -1"),
    "scoring_kernel": (dict(scoring_kernel=(3, 3, 3)), ValueError, r"scoring_kernel: got \(3, 3, 3\), wanted \(1, 1"),
    "scoring_width": (dict(scoring_width=0), ValueError, "scoring_width: got 0"),
    "mixing_kernel": (dict(mixing_kernel=3), ValueError, "mixing_kernel: got 3, wanted"),
    "norm": (dict(norm="layer"), ValueError, "norm: got 'layer', wanted 'batch' or None"),
    "activation": (dict(activation="gelu"), ValueError, "activation: got 'gelu', wanted 'relu' or None"),
    "skip": (dict(skip="yes"), TypeError, "skip: got str 'yes', wanted a bool"),
    "noise_std": (dict(noise_std=-0.1), ValueError, "noise_std: got -0.1"),
    "scoring_kernel-floats": (dict(scoring_kernel=(1.0, 1.0, 1.0)), ValueError, "scoring_kernel: got \\(1.0"),
    "noise_std-huge": (dict(noise_std=10**400), ValueError, "noise_std: got inf"),
    "device": (dict(device="nope"), ValueError, "device: got 'nope', wanted a torch device"),
    "noise_std-nan": (dict(noise_std=float("nan")), ValueError, "noise_std: got nan"),
    "hard_fraction": (dict(hard_fraction=1.1), ValueError, "hard_fraction: got 1.1"),
    "score_reduction": (dict(score_reduction="max"), ValueError, "score_reduction: got 'max'"),
    "gumbel_tau": (dict(gumbel_tau=0.0), ValueError, "gumbel_tau: got 0.0, wanted a finite number above 0"),
    "gumbel_tau-type": (dict(gumbel_tau="1"), TypeError, "gumbel_tau: got str '1', wanted a number"),
    "routing_gradient": (dict(routing_gradient="none"), ValueError, "routing_gradient: got 'none'"),
    "backend": (dict(backend="fast"), ValueError, "backend: got 'fast', wanted None or 'cpu'"),
    "dtype": (dict(dtype=torch.int8), TypeError, "dtype: got torch.int8"),
}


@pytest.mark.parametrize("change, error, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(change, error, message):
    """Every constructor argument out of range."""
    with pytest.raises(error, match=message):
        FusedDSTS(**dict(in_channels=4) | change)


def test_freeze_arguments():
    """freeze() refuses what it cannot freeze to, at once."""
    dsts = FusedDSTS(4, num_neurons=2)
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        dsts.freeze(backend="fast")
    with pytest.raises(TypeError, match=r"dtype: got torch.int8, wanted one of"):
        dsts.freeze(dtype=torch.int8)


def test_layer_arguments():
    """The one argument that DSTSLayer has beside them."""
    with pytest.raises(ValueError, match="out_channels: got 0"):
        DSTSLayer(4, 0)


INPUTS = {
    "not-a-tensor": ([1.0], TypeError, "x: got list"),
    "numpy-like": (None, TypeError, "x: got NoneType"),
    "integer": (torch.zeros(1, 4, 2, 3, 3, dtype=torch.int64), TypeError, "x: .*torch.int64"),
    "sparse": (torch.zeros(1, 4, 2, 3, 3).to_sparse(), TypeError, "x: .*sparse"),
    "4-d": (torch.zeros(4, 2, 3, 3), ValueError, r"x: .*\(4, 2, 3, 3\).* wanted 5 dimensions"),
    "channels": (torch.zeros(1, 5, 2, 3, 3), ValueError, r"x: .*\(1, 5, 2, 3, 3\).*wanted 4 channels"),
    "T": (torch.zeros(1, 4, 0, 3, 3), ValueError, "x: .*at least 1"),
    "H": (torch.zeros(1, 4, 2, 0, 3), ValueError, "x: .*at least 1"),
    "W": (torch.zeros(1, 4, 2, 3, 0), ValueError, "x: .*at least 1"),
    "dtype": (torch.zeros(1, 4, 2, 3, 3, dtype=torch.float64), TypeError, "x: .*float64, wanted torch.float32"),
    "device": (torch.zeros(1, 4, 2, 3, 3, device="meta"), ValueError, "x: got a tensor on meta, wanted cpu"),
}


@pytest.mark.parametrize("kind", ["layer", "fused", "eval", "frozen"])
@pytest.mark.parametrize("x, error, message", INPUTS.values(), ids=INPUTS)
def test_inputs(kind, x, error, message):
    """Every face of the package refuses the same features with the same words."""
    dsts = FusedDSTS(4, num_layers=1, num_neurons=2)
    module = {"layer": dsts.layers[0], "fused": dsts, "eval": dsts.eval(), "frozen": dsts.eval().freeze()}[kind]
    with pytest.raises(error, match=message):
        module(x)


def good_draws() -> Draws:
    return Draws(torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2, 5))


DRAWS = {
    "noise-shape": (dict(noise=torch.zeros(2, 4)), ValueError, r"draws.noise: .*\(2, 4\).* wanted shape \(3, 2, 4\)"),
    "noise-dtype": (dict(noise=torch.zeros(3, 2, 4).double()), TypeError, "draws.noise: .*wanted torch.float32"),
    "noise-sparse": (dict(noise=torch.zeros(3, 2, 4).to_sparse()), TypeError, "draws.noise: .*sparse_coo"),
    "hard-shape": (dict(hard=torch.zeros(3, 4, dtype=torch.bool)), ValueError, r"draws.hard: .*wanted shape \(3, 2\)"),
    "hard-dtype": (dict(hard=torch.zeros(3, 2)), TypeError, "draws.hard: .*wanted torch.bool"),
    "gumbel-shape": (dict(gumbel=torch.zeros(3, 2, 4)), ValueError, r"draws.gumbel: .*wanted shape \(3, 2, 5\)"),
    "gumbel-dtype": (dict(gumbel=torch.zeros(3, 2, 5, dtype=torch.int64)), TypeError, "draws.gumbel: .*int64"),
    "gumbel-device": (
        dict(gumbel=torch.zeros(3, 2, 5, device="meta")),
        ValueError,
        "draws.gumbel: got a tensor on meta",
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change, error, message", DRAWS.values(), ids=DRAWS)
def test_draws(change, error, message, training):
    """Draws of another shape, dtype or device, in training and in evaluation."""
    dsts = FusedDSTS(4, num_neurons=5).train(training)
    with pytest.raises(error, match=message):
        dsts(torch.zeros(2, 4, 2, 3, 3), draws=good_draws()._replace(**change))


def test_draws_of_another_kind():
    """Something that is no Draws at all."""
    with pytest.raises(TypeError, match=r"draws: got int 3, wanted Draws\(noise, hard, gumbel\)"):
        FusedDSTS(4, num_neurons=5)(torch.zeros(2, 4, 2, 3, 3), draws=3)


def test_nothing_is_lost():
    """A refused call leaves parameters, statistics and the generator as they were."""
    dsts = FusedDSTS(4, num_neurons=2)
    before = [t.clone() for t in dsts.state_dict().values()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError):
        dsts(torch.zeros(1, 5, 2, 3, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, dsts.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
