"""Parity before timing: what the literal reference gives, and how far another implementation is from it.

An :class:`Oracle` is computed once for each shape and mode and kept small: a stacked gradient is all zero
outside the chosen neurons, so only theirs is stored, and a checked variant must be exactly zero in the rest.
In half precision the oracle is the reference in float32 on the same rounded weights.

The output of a training step is compared as it is timed. Gradients are compared with BatchNorm on its running
statistics: with batch statistics of one sample, scaling a neuron's output changes nothing, so the router's
exact gradient is zero and what any implementation returns for it is rounding. And they are compared without the
activation: one within rounding of zero falls on either side of a ReLU, and each that does moves a whole gradient
element, which in bfloat16 is nine tenths of the error. Both are torch's in every variant.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.variants import training_step
from dsts_kernels import DSTSLayer as FusedLayer
from dsts_kernels.reference import DSTS, Draws, DSTSLayer

__all__ = [
    "TOLERANCES",
    "Oracle",
    "assert_parity",
    "evaluation_oracle",
    "relative_error",
    "training_errors",
    "training_oracle",
]

TOLERANCES = {  # relative error in norm: output, gradients
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-4, 5e-3),
    torch.bfloat16: (5e-2, 1e-1),
    torch.float16: (1e-2, 5e-2),
}
"""Gradients are allowed more than the output, as they come through twice as many roundings and long sums."""

ONE_NUMBER = 2
"""So much more is allowed to gradients of scoring kernels: they hang on one number per sample, whose error nothing
averages."""

OPERATORS = ("spatial", "temporal", "mixing")


@dataclass
class Oracle:
    """The reference's output, and in training its gradients; ``rows`` are the neurons that a gradient is
    stored for."""

    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """``||value - wanted|| / ||wanted||``; infinite for anything that is not finite, zero for two zeros."""
    difference = (value.to(wanted.dtype) - wanted).norm().item()
    size = wanted.norm().item()
    if not (torch.isfinite(value).all() and torch.isfinite(wanted).all()):
        return float("inf")
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def widened(module: DSTS) -> DSTS:
    """The module itself, or a float32 copy of a half-precision one."""
    return module if module.layers[0].gate.dtype in (torch.float32, torch.float64) else copy.deepcopy(module).float()


@torch.no_grad()
def evaluation_oracle(reference: DSTS, x: Tensor) -> Oracle:
    module = widened(reference).eval()
    return Oracle(module(x.to(module.layers[0].gate.dtype)))


@contextlib.contextmanager
def smooth(module: nn.Module) -> Iterator[None]:
    """BatchNorm in evaluation mode and layers without activation inside the block, the rest as it is."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]
    layers = [(m, m.activation) for m in module.modules() if isinstance(m, (DSTSLayer, FusedLayer))]
    for norm in norms:
        norm.eval()
    for layer, _ in layers:
        layer.activation = None
    yield
    for norm in norms:
        norm.train()
    for layer, activation in layers:
        layer.activation = activation


def training_oracle(literal: DSTS, x: Tensor, draws: Draws, grad: Tensor) -> Oracle:
    """The literal training step; ``literal`` keeps no gradients afterwards, its running statistics move
    on."""
    module = widened(literal).train()
    dtype = module.layers[0].gate.dtype
    leaf = x.detach().to(dtype).requires_grad_()
    with smooth(module):
        y, routing = module(leaf, draws=draws, return_routing=True)
        y.backward(grad.to(dtype))
    oracle = Oracle(y, {"input": leaf.grad})
    for name, parameter in module.named_parameters():
        _, layer, kind = name.split(".")[:3]
        gradient = parameter.grad
        if kind in OPERATORS:
            oracle.rows[name] = sorted(set(routing.neuron[int(layer)].tolist()))
            gradient = gradient[oracle.rows[name]]
        oracle.gradients[name] = gradient
        parameter.grad = None
    with torch.no_grad():
        oracle.output = module(leaf, draws=draws)
    return oracle


def training_errors(
    module: nn.Module,
    x: Tensor,
    draws: Draws,
    grad: Tensor,
    oracle: Oracle,
    step: Callable[[nn.Module, Tensor, Draws, Tensor], Tensor] = training_step,
) -> dict[str, float]:
    """Relative errors of a training step by name; a gradient outside the chosen neurons counts as
    infinite. ``step`` is how it runs: as a graph, say."""
    leaf = x.detach().requires_grad_()
    with smooth(module):
        step(module, leaf, draws, grad)
    errors = {"input": relative_error(leaf.grad, oracle.gradients["input"])}
    for name, parameter in module.named_parameters():
        name = name.removeprefix("_orig_mod.")
        errors[name] = gradient_error(parameter.grad, oracle.gradients[name], oracle.rows.get(name))
        parameter.grad = None
    if step is training_step:
        with torch.no_grad():
            y = module(leaf, draws=draws)
    else:
        y = step(module, leaf, draws, grad)
        module.zero_grad(set_to_none=True)
    errors["output"] = relative_error(y, oracle.output)
    return errors


def gradient_error(gradient: Tensor | None, wanted: Tensor, rows: list[int] | None) -> float:
    if gradient is None:
        return float("inf")
    if rows is None:
        return relative_error(gradient, wanted)
    others = (i for i in range(gradient.shape[0]) if i not in rows)
    if any(bool(gradient[i].any()) for i in others):
        return float("inf")
    return relative_error(gradient[rows], wanted)


def assert_parity(errors: dict[str, float], dtype: torch.dtype) -> float:
    """The largest error, once every one is within tolerance."""
    output_limit, gradient_limit = TOLERANCES[dtype]
    limits = {name: output_limit if name == "output" else gradient_limit for name in errors}
    limits |= {name: ONE_NUMBER * gradient_limit for name in errors if name.endswith(".scoring")}
    wrong = sorted((name for name in errors if not errors[name] <= limits[name]), key=lambda n: -errors[n])
    assert not wrong, (
        f"parity: {wrong[0]} off by {errors[wrong[0]]:.1e}, {len(wrong)} of {len(errors)} beyond tolerance"
    )
    return max(errors.values())
