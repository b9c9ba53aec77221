"""Another neuron or other gates than a model's own, in evaluation, without touching a weight.

A layer takes its randomness as :class:`~dsts_kernels.Draws`, used as given, when it trains. So for the length of one
call a layer is told that it trains, is given a Gumbel draw that one neuron cannot lose and gate noise that outweighs
every logit, and has all gates hard. What it then computes is its evaluation with that neuron and those gates, on
whatever backend it runs. Its norm stays in evaluation, and its buffers are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends.base import accumulate_dtype
from ..learning.checks import is_compiled
from ..ops._checks import describe
from ..routing import Draws, Routing
from ..sides import LAYERS

__all__ = ["Change", "Choice", "changed", "dsts_layers"]

SURE = 1e30  # outweighs every score and logit; twice of it is finite in float32


class Choice(NamedTuple):
    """What a layer is to take: ``neuron (B,)`` int64, and ``spatial (B, C)`` bool, where a channel is spatial."""

    neuron: Tensor
    spatial: Tensor


Change = Callable[[int, nn.Module, Routing], Choice]
"""``change(index, layer, own)``: the layer's place in the model, the layer, and what it would choose itself."""


def dsts_layers(model: nn.Module) -> list[nn.Module]:
    """The DSTS layers of a model, literal ones too, in the order of ``named_modules``.

    Raises:
        TypeError: not a module.
        ValueError: there is none, or the model is compiled, whose code has no place for another choice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {describe(model)}, wanted a torch.nn.Module")
    layers = [part for part in model.modules() if isinstance(part, LAYERS)]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without a FusedDSTS or DSTSLayer, wanted one at least, not frozen"
        )
    if is_compiled(model):
        raise ValueError("model: got one of torch.compile, wanted the module that was compiled")
    return layers


@contextlib.contextmanager
def changed(model: nn.Module, change: Change) -> Iterator[None]:
    """A block in which every DSTS layer of ``model`` takes what ``change`` says.

    Args:
        model: in evaluation, with a FusedDSTS or a DSTSLayer, fused or literal.
        change: see :data:`Change`. Where it returns the layer's own choice nothing changes, to the last bit.

    Nothing of it stays: weights, buffers and modes are those of before. Layers give no gradient meanwhile.

    Raises:
        ValueError: a model that trains, is compiled or has no such layer; a choice of another shape.
    """
    layers = dsts_layers(model)
    if model.training or any(layer.training for layer in layers):
        raise ValueError("model: got one that trains, wanted model.eval()")
    taken = _Taken(change)
    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(taken.before(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(taken.after, always_call=True))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            taken.put_back(layer)


class _Taken:
    """The hooks of one :func:`changed` block."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.buffers: dict[nn.Module, dict[str, Tensor]] = {}

    def before(self, index: int) -> Callable:
        def hook(layer: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
            x = arguments[0] if arguments else keywords["x"]
            wants = keywords.get("return_routing", arguments[2] if len(arguments) > 2 else False)
            _, own = layer.forward(x, None, True)  # past the hooks
            draws = self.draws(layer, x, own, self.change(index, layer, own))
            self.buffers[layer] = {name: b.clone() for name, b in layer._buffers.items() if b is not None}
            layer.training = True  # the layer alone: its norm stays in evaluation
            return (x, draws, wants), {}

        return hook

    def after(self, layer: nn.Module, arguments: tuple, output: object) -> None:
        self.put_back(layer)

    def put_back(self, layer: nn.Module) -> None:
        for name, buffer in self.buffers.pop(layer, {}).items():
            layer._buffers[name].copy_(buffer)
        layer.training = False

    @staticmethod
    def draws(layer: nn.Module, x: Tensor, own: Routing, choice: Choice) -> Draws:
        """Draws with which the layer cannot but take ``choice``."""
        samples, channels, neurons = x.shape[0], x.shape[1], layer.num_neurons
        neuron, spatial = choice
        for name, value, shape, dtype in (
            ("neuron", neuron, (samples,), torch.int64),
            ("spatial", spatial, (samples, channels), torch.bool),
        ):
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(f"change: gave {name} as {describe(value)}, wanted {dtype} of shape {shape}")
        if samples and not 0 <= int(neuron.min()) <= int(neuron.max()) < neurons:
            raise ValueError(
                f"change: gave neurons {int(neuron.min())} to {int(neuron.max())}, wanted 0 to {neurons - 1}"
            )
        dtype, device = accumulate_dtype(x.dtype), x.device
        gumbel = torch.zeros(samples, neurons, dtype=dtype, device=device).scatter_(1, neuron[:, None], SURE)
        noise = torch.full((samples, channels), -SURE, dtype=dtype, device=device).masked_fill_(spatial, SURE)
        return Draws(noise, torch.ones(samples, dtype=torch.bool, device=device), gumbel)
