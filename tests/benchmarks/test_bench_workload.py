"""What the GPU benchmark's rows share, on a CPU: separated inputs, baselines, weights and features."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.baselines import padded
from benchmarks.gpu.workload import Workload, gpu_backends, half_precision
from benchmarks.margins import MARGIN, margins, separate_draws, separate_features
from benchmarks.parity import relative_error
from benchmarks.shapes import Problem
from benchmarks.variants import build, make_draws, make_reference
from dsts_kernels.bench.handwritten import HandwrittenEval
from dsts_kernels.reference import DSTS, Draws

CPU = torch.device("cpu")
SMALL = Problem("small", (3, 5, 4), batch=5, channels=12, layers=3, neurons=4)


def test_margins() -> None:
    """The lead of the best over the second, by the size of scores."""
    assert margins(torch.tensor([[3.0, 1.0, -3.0]])).item() == pytest.approx(2 / (19 / 3) ** 0.5)
    assert margins(torch.ones(2, 3, 1)).tolist() == [[float("inf")] * 3] * 2


def test_draws_are_separated() -> None:
    """Scores nearly tied in any layer are not after it, and the chosen neurons stay the same where they can."""
    reference = make_reference(SMALL, torch.float64, CPU)
    x = torch.rand(SMALL.feature_shape, dtype=torch.float64)
    draws = make_draws(SMALL, CPU, torch.float64)

    def route(draws: Draws):
        with torch.no_grad():
            return reference.train()(x, draws=draws, return_routing=True)[1]

    first = route(draws)
    tie = first.scores[0, 0].max() - first.scores[0, 0]
    draws = draws._replace(gumbel=draws.gumbel.index_put((torch.tensor(0), torch.tensor(0)), tie))
    assert margins(route(draws).scores + draws.gumbel).min() < MARGIN
    after = separate_draws(route, draws)
    assert margins(route(after).scores + after.gumbel).min() >= MARGIN
    assert torch.equal(after.noise, draws.noise) and torch.equal(after.hard, draws.hard)


@pytest.mark.parametrize("channels", [12, 7])
def test_features_are_separated(channels: int) -> None:
    """A sample on which two neurons tie is changed, the others are not."""
    layer_scores = torch.nn.Linear(channels, 4, bias=False, dtype=torch.float64)

    class Route:
        def __init__(self, x: torch.Tensor) -> None:
            self.scores = layer_scores(x.mean((2, 3, 4)))[None].detach()

    x = torch.rand(6, channels, 2, 3, 3, dtype=torch.float64)
    x[2] = 0
    x[2, 0] = 1.0
    with torch.no_grad():
        layer_scores.weight[:, 0] = 1.0  # what only sample 2 consists of
    after = separate_features(Route, x, margin=1e-9)
    assert not torch.equal(after[2], x[2]) and torch.equal(after[[0, 1, 3, 4, 5]], x[[0, 1, 3, 4, 5]])
    assert margins(Route(after).scores).min() >= 1e-9


def test_padded_lists_change_nothing() -> None:
    """Channels of weight zero: the same output, every list a whole number of blocks."""
    reference = make_reference(SMALL, torch.float64, CPU).eval()
    x = torch.rand(SMALL.feature_shape, dtype=torch.float64)
    plain = HandwrittenEval(reference)(x)
    module = padded(HandwrittenEval(reference))
    assert all(neuron.spatial_channels.numel() % 64 == 0 for layer in module.folded for neuron in layer.neurons)
    assert relative_error(module(x), plain) < 1e-12


def test_workload() -> None:
    """Inputs of every batch size out of one pool, in the benchmark's precision, with an oracle of the same values."""
    work = Workload(CPU, l2_bytes=20_000, channels=12, grids={"tiny": (2, 3, 4)})
    assert isinstance(work.half, DSTS) and work.half.layers[0].gate.dtype == torch.bfloat16
    assert torch.equal(work.single.layers[0].gate, work.half.layers[0].gate.float())
    for batch in (1, 8, 32):
        inputs = work.inputs("tiny", batch)
        assert len(inputs) == work.rotation("tiny", batch) and all(x.shape[0] == batch for x in inputs)
        assert sum(x.numel() * x.element_size() for x in inputs) > 2 * 20_000
        assert inputs[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(work.inputs("tiny", 8)[0][:1], work.inputs("tiny", 1)[0])
    assert margins(work.routing(work.inputs("tiny", 32)[0]).scores).min() >= MARGIN
    frozen = build("frozen", "evaluation", work.problem("tiny", 8), work.half)
    x, wanted = work.inputs("tiny", 8)[0], work.evaluation_output("tiny", 8)
    assert relative_error(frozen(x), wanted) < 5e-2
    noise = work.draws("tiny").noise
    assert torch.equal(noise, noise.bfloat16().float()), "a module in bfloat16 sees the oracle's noise"


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on a GPU that has no bfloat16; a workload takes what it is given."""
    for capability, wanted in (((7, 0), torch.float16), ((7, 5), torch.float16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert half_precision(torch.device("cuda")) == wanted
    assert half_precision(CPU) == torch.bfloat16
    work = Workload(CPU, l2_bytes=1000, channels=8, grids={"tiny": (1, 2, 2)}, dtype=torch.float16)
    assert work.half.layers[0].gate.dtype == work.inputs("tiny", 1)[0].dtype == torch.float16


def test_gpu_backends_say_why_not() -> None:
    """Both, with a reason on a CPU tensor unless kernels are interpreted there."""
    found = gpu_backends(CPU, torch.float32)
    assert tuple(found) == ("triton", "cuda") and found["cuda"]
