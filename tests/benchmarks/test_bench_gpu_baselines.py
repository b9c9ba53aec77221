"""The handwritten baselines for a GPU compute what the literal reference computes, on a CPU in float64."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.gpu import handwritten
from benchmarks.gpu.baselines import PickedEval, padded
from benchmarks.gpu.handwritten import BY_SAMPLE, GROUPINGS, GpuTrain
from benchmarks.parity import TOLERANCES, evaluation_oracle, relative_error, training_errors, training_oracle
from benchmarks.shapes import Problem
from benchmarks.variants import adopt, build, make_draws, make_reference
from dsts_kernels.bench.handwritten import HandwrittenEval
from dsts_kernels.reference import DSTS, Draws

CPU, DTYPE = torch.device("cpu"), torch.float64
PROBLEM = Problem("small", (3, 5, 4), batch=5, channels=12, layers=3, neurons=4)
OUTPUT, GRADIENT = TOLERANCES[DTYPE]
groupings = pytest.mark.parametrize("grouping", GROUPINGS)


@pytest.fixture(scope="module")
def reference() -> DSTS:
    return make_reference(PROBLEM, DTYPE, CPU)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.rand(PROBLEM.feature_shape, generator=torch.Generator().manual_seed(0), dtype=DTYPE)


def module_of(reference: DSTS, grouping: str) -> GpuTrain:
    return adopt(GpuTrain, PROBLEM, reference).train().group(grouping)


@groupings
@pytest.mark.parametrize("share", ["mixed", "hard", "soft"])
def test_training_step_matches(
    reference: DSTS, features: torch.Tensor, grouping: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and every gradient, zero where nobody chose; fresh memory is NaN, so all of it is written."""
    monkeypatch.setattr(handwritten, "MULTIPLE", 8)  # lists of 12 channels are padded then, some of them
    draws = make_draws(PROBLEM, CPU, DTYPE)
    if share != "mixed":
        draws = Draws(draws.noise, torch.full_like(draws.hard, share == "hard"), draws.gumbel)
    grad = torch.randn(PROBLEM.feature_shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    oracle = training_oracle(build("literal", "training", PROBLEM, reference), features, draws, grad)
    assert all(oracle.gradients[name].any() for name in oracle.gradients), "a vanishing gradient proves nothing"
    assert any(len(oracle.rows[name]) < PROBLEM.neurons for name in oracle.rows), "some neuron is chosen by nobody"
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN
    try:
        errors = training_errors(module_of(reference, grouping), features, draws, grad, oracle)
    finally:
        torch.use_deterministic_algorithms(False)
    limits = {name: OUTPUT if name == "output" else GRADIENT for name in errors}
    assert {name: error for name, error in errors.items() if not error <= limits[name]} == {}


@groupings
def test_statistics_move_as_the_reference_s(reference: DSTS, features: torch.Tensor, grouping: str) -> None:
    """BatchNorm's 4-d view updates what the 5-d one does."""
    draws = make_draws(PROBLEM, CPU, DTYPE)
    modules = build("literal", "training", PROBLEM, reference), module_of(reference, grouping)
    for module in modules:
        with torch.no_grad():
            module(features, draws=draws)
    ours, theirs = (dict(module.named_buffers()) for module in reversed(modules))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


@groupings
def test_live_evaluation_matches(reference: DSTS, features: torch.Tensor, grouping: str) -> None:
    """On live parameters, as a validation between epochs has it."""
    wanted = evaluation_oracle(reference, features).output
    with torch.no_grad():
        assert relative_error(module_of(reference, grouping).eval()(features), wanted) <= OUTPUT


@pytest.mark.parametrize(
    "kind", [PickedEval, lambda reference: padded(HandwrittenEval(reference))], ids=["picked", "padded"]
)
@pytest.mark.parametrize("side", [None, -1.0, 1.0], ids=["both", "all-temporal", "all-spatial"])
def test_evaluation_matches(features: torch.Tensor, kind: type, side: float | None) -> None:
    """Lists of any length, none at all included."""
    reference = make_reference(PROBLEM, DTYPE, CPU)
    if side is not None:
        for layer in reference.layers:
            layer.gate.data.fill_(side)
    wanted = evaluation_oracle(reference, features).output
    assert relative_error(kind(reference)(features), wanted) <= OUTPUT


def test_nothing_of_the_host_is_asked(reference: DSTS, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be captured never brings a value to the host: no item(), no tolist(), no sizes that depend on one."""
    draws = make_draws(PROBLEM, CPU, DTYPE)
    grad = torch.ones_like(features)

    def refuse(name: str, *_: object, **__: object) -> None:
        raise AssertionError(f"{name} asks the host")

    steps = [
        lambda: module_of(reference, BY_SAMPLE)(features.requires_grad_(), draws=draws).backward(grad),
        functools.partial(PickedEval(reference), features.detach()),
    ]
    grouped = module_of(reference, GROUPINGS[1])
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, functools.partial(refuse, name))
    for step in steps:
        step()
    with pytest.raises(AssertionError, match="asks the host"):
        grouped(features, draws=draws)


def test_a_wrong_grouping_is_refused(reference: DSTS) -> None:
    with pytest.raises(ValueError, match="grouping: got 'none', wanted one of lists a sample, dense a neuron"):
        module_of(reference, "none")
