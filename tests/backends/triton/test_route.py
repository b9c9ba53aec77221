"""The choice of a neuron in the interpreter, on its own: scores, and torch's argmax of them."""

from __future__ import annotations

import pytest
import torch

from .support import MODULES, interpreted, tl, triton

pytestmark = interpreted
choose_neuron = MODULES["route_and_gather"].choose_neuron


@triton.jit
def choice_kernel(
    sums, scoring, parts, size, neurons, divisor, scores, chosen, NEURONS: tl.constexpr, BC: tl.constexpr
):
    """A program a sample."""
    b = tl.program_id(0)
    tl.store(chosen + b, choose_neuron(sums, scoring, b, parts, size, neurons, divisor, scores, NEURONS, BC))


def choose(sums: torch.Tensor, scoring: torch.Tensor, divisor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons ``(B,)`` and scores ``(B, N)`` of ``sums (B, parts, size)`` and ``scoring (N, size)``."""
    (batch, parts, size), neurons = sums.shape, scoring.shape[0]
    scores, chosen = torch.empty(batch, neurons), torch.empty(batch, dtype=torch.int32)
    lanes = 1 << (neurons - 1).bit_length()
    choice_kernel[(batch,)](sums, scoring, parts, size, neurons, divisor, scores, chosen, NEURONS=lanes, BC=16)
    return chosen.long(), scores


@pytest.mark.parametrize("neurons", [1, 2, 10, 17])
@pytest.mark.parametrize("size, parts", [(1, 1), (33, 3), (90, 1)])
def test_choose_neuron(neurons, size, parts):
    """The scores of all parts over the divisor, and the first of the largest of them."""
    sums, scoring = torch.randn(4, parts, size), torch.randn(neurons, size)
    chosen, scores = choose(sums, scoring, 7.0)
    wanted = sums.double().sum(1) @ scoring.double().t() / 7
    torch.testing.assert_close(scores, wanted.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(chosen, scores.argmax(1))


nan, inf = float("nan"), float("inf")
SCORES = {
    "ties": [2.0, 5.0, 5.0, -1.0, 5.0],
    "negative": [-7.0, -3.0, -3.0, -9.0, -4.0],
    "nan": [1.0, nan, 9.0, nan, 2.0],
    "nan-first": [nan, 1.0, inf, nan, 2.0],
    "all-nan": [nan] * 5,
    "inf": [1.0, -inf, inf, inf, 2.0],
    "all-minus-inf": [-inf] * 5,
    "nan-and-minus-inf": [-inf, -inf, -inf, -inf, nan],
    "zeros": [-0.0, 0.0, 0.0, -0.0, 0.0],
    "large": [-3e38, 3e38, -3e38, 3e38, 1.0],
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("neurons", [1, 3, 5])
def test_choose_neuron_as_torch_does(scores, neurons):
    """Ties, NaN, infinities and negatives: torch's argmax, never a lane beyond the neurons, which are padded to 8."""
    scores = torch.tensor(scores)[:neurons]
    chosen, found = choose(torch.ones(1, 1, 1), scores[:, None])
    assert torch.equal(found[0].nan_to_num(nan=77), scores.nan_to_num(nan=77))
    assert int(chosen) == int(scores.argmax())
