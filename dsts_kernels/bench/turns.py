"""Variants of one module on the same weights, features and draws: parity with the literal one, then times in turns.

Variants take turns, so that what else the machine does falls on all alike. A time is the median over rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..modules import FusedDSTS
from ..routing import sample_draws
from .handwritten import HandwrittenEval, HandwrittenTrain

__all__ = ["STEPS", "TITLES", "Problem", "Row", "measure"]

STEPS = ("evaluation", "training")
TITLES = {
    "literal": "literal PyTorch",
    "handwritten": "best handwritten PyTorch",
    "fused": "FusedDSTS",
    "frozen": "FrozenDSTS",
}
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of an output
MOST = 10  # rounds


class Problem(NamedTuple):
    """A module and its features."""

    channels: int
    size: tuple[int, int, int]
    batch: int = 1
    layers: int = 3
    neurons: int = 10
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def parameters(self) -> int:
        """Of the module, without norms and gates: scoring, both operators and mixing of every neuron."""
        return self.layers * self.neurons * self.channels**2 * (1 + 9 + 3 + 1)


class Row(NamedTuple):
    """What was measured of one variant."""

    step: str
    variant: str
    ms: float
    rounds: int
    error: float  # ||y - y_literal|| / ||y_literal||


@torch.no_grad()
def literal_module(problem: Problem) -> reference.DSTS:
    """Seeded weights that leave nothing trivial: about half of each neuron's channels are spatial, scores differ by
    about one, and BatchNorm has statistics of the size that its operators produce."""
    torch.manual_seed(2022)
    options = {"num_layers": problem.layers, "num_neurons": problem.neurons}
    found = reference.DSTS(problem.channels, **options, dtype=problem.dtype, device=problem.device)
    for layer in found.layers:
        layer.gate.normal_()
        layer.scoring.mul_(4 / (math.prod(problem.size) * math.sqrt(problem.channels)))
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.norm.bias.normal_(std=0.1)
        layer.norm.running_mean.normal_(std=0.05)
        layer.norm.running_var.uniform_(0.02, 0.08)
    return found


def alike(kind: Callable[..., nn.Module], problem: Problem, literal: nn.Module) -> nn.Module:
    """A module of another class on the literal one's parameters, with statistics of its own."""
    options = {"num_layers": problem.layers, "num_neurons": problem.neurons, "dtype": problem.dtype}
    module = kind(problem.channels, **options, device="meta")
    copies = {name: buffer.clone() for name, buffer in literal.named_buffers()}
    module.load_state_dict(literal.state_dict() | copies, assign=True)
    return module


def variants(step: str, problem: Problem, literal: nn.Module) -> dict[str, nn.Module]:
    """The modules of a step by name, the literal one first."""
    fused = alike(FusedDSTS, problem, literal)
    if step == "training":
        written = alike(HandwrittenTrain, problem, literal)
        return {"literal": literal.train(), "handwritten": written.train(), "fused": fused.train()}
    fused.eval()
    return {
        "literal": literal.eval(),
        "handwritten": HandwrittenEval(literal),
        "fused": fused,
        "frozen": fused.freeze(),
    }


class Step(NamedTuple):
    """One step of a variant: ``run`` is what is timed, ``results`` what is compared, ``clear`` drops gradients."""

    run: Callable[[], Tensor]
    results: Callable[
        [Tensor], tuple[Tensor, ...]
    ]  # of what run returned: output, and in training the input's gradient
    clear: Callable[[], None]


def make_steps(step: str, modules: dict[str, nn.Module], problem: Problem) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(2022)
    shape = (problem.batch, problem.channels, *problem.size)
    x = torch.randn(shape, generator=generator, device="cpu").to(problem.device, problem.dtype)

    def evaluated(module: nn.Module) -> Step:
        return Step(torch.inference_mode()(lambda: module(x)), lambda y: (y,), lambda: None)

    if step == "evaluation":
        return {name: evaluated(module) for name, module in modules.items()}
    torch.manual_seed(2022)
    sizes = (problem.batch, problem.channels, problem.neurons, problem.layers)
    draws = reference.Draws(*sample_draws(*sizes, device=problem.device, dtype=problem.dtype))
    grad = torch.randn(shape, generator=generator, device="cpu").to(x)
    x.requires_grad_()

    def trained(module: nn.Module) -> Step:
        def run() -> Tensor:
            y = module(x, draws=draws)
            y.backward(grad)
            return y.detach()

        def clear() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None

        return Step(run, lambda y: (y, x.grad.clone()), clear)

    return {name: trained(module) for name, module in modules.items()}


def distance(found: Tensor, wanted: Tensor) -> float:
    """``||found - wanted|| / ||wanted||``, infinite for what is not finite."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return error if math.isfinite(error) else math.inf


def timed(one: Step, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of one step, until the device is done, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    y = one.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, y


def measure(
    problem: Problem, step: str, seconds: float, say: Callable[[str], None] = lambda line: None
) -> Iterator[Row]:
    """Time the variants of a step in turns, for about this long, three rounds at least and ten at most.

    Args:
        problem: sizes, dtype and device.
        step: ``"evaluation"`` or ``"training"`` (forward and backward).
        seconds: for all variants together, beside making them and the first round, which is not counted.
        say: is told how the first round goes, a line per variant.

    Returns:
        The rows, literal first.

    Raises:
        ArithmeticError: a variant gives another result than the literal module; nothing was timed then.
    """
    literal = literal_module(problem)
    steps = make_steps(step, variants(step, problem, literal), problem)
    limits = (
        TOLERANCES[problem.dtype],
        100 * TOLERANCES[problem.dtype],
    )  # of the output, and of a gradient behind ReLUs
    wanted: tuple[Tensor, ...] = ()
    errors, first = {}, 0.0
    for name, one in steps.items():
        took, y = timed(one, problem.device)
        first += took
        results = one.results(y)
        one.clear()
        wanted = wanted or results
        found = [distance(*pair) for pair in zip(results, wanted, strict=True)]
        if any(not error <= limit for error, limit in zip(found, limits, strict=False)):
            raise ArithmeticError(
                f"{step}, {TITLES[name]}: off by {max(found):.1e} of the literal module; nothing was timed"
            )
        errors[name] = found[0]
        say(f"{TITLES[name]}: right, in {1e3 * took:.0f} ms at first")
    rounds = max(3, min(MOST, int(seconds / first)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    say(f"{rounds} rounds, about {rounds * first:.0f} s")
    for _ in range(rounds):
        for name, one in steps.items():
            times[name].append(timed(one, problem.device)[0])
            one.clear()
    for name, seen in times.items():
        yield Row(step, name, 1e3 * statistics.median(seen), rounds, errors[name])
