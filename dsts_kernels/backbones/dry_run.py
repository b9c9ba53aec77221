"""One pass of a model that leaves no trace in it: what does a submodule return?"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn.parameter import is_lazy

from ..ops import _checks

__all__ = ["Seen", "dry_run", "unchanged"]

CLIP = (16, 112, 112)  # frames, height and width of a clip that is made up: what torchvision's r3d_18 was trained on


class Seen(NamedTuple):
    """What a dry run found.

    Attributes:
        output: what the submodule returned, first time round.
        passes: how often it ran.
        clip: the shape of the clip, or ``None`` where more than one tensor went in.
    """

    output: Any
    passes: int
    clip: tuple[int, ...] | None


class Bystander(nn.Module):
    """Stands where DSTS will, and notes whether the module that it stands in calls it."""

    called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return args[0] if args else None


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A block after which ``model`` and every generator of random numbers are as before, whatever ran in it.

    Attributes of modules (their mode, what they cache) and what their dictionaries hold (parameters, buffers, hooks)
    come back; inside, buffers are copies. Not undone: a write into a parameter, a list or an object of somebody else.
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    cuda = [device.index for device in devices if device.type == "cuda"]
    others = random.getstate(), numpy.random.get_state()
    kept = [(m.__dict__, dict(m.__dict__), _dictionaries(m)) for m in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        with torch.random.fork_rng(cuda):
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
            yield
    finally:
        for attributes, before, dictionaries in kept:
            attributes.clear()
            attributes.update(before)
            for own, content in dictionaries:
                own.clear()
                own.update(content)
        random.setstate(others[0])
        numpy.random.set_state(others[1])


def _dictionaries(module: nn.Module) -> list[tuple[dict, dict]]:
    return [(own, dict(own)) for own in module.__dict__.values() if isinstance(own, dict)]


def dry_run(
    model: nn.Module, where: str, place: tuple[nn.Module, str], example: object, make: Callable[[], Tensor]
) -> Seen:
    """Runs ``model`` on ``example`` in evaluation, without gradients or autocast; see :func:`unchanged`.

    Args:
        where: the submodule to watch.
        place: the module that DSTS will be a child of, and under which name.
        example: a clip, its shape, a tuple of arguments or a mapping of keyword arguments; ``None`` calls ``make``.
        make: a clip for this model.

    Raises:
        TypeError, ValueError: the model does not take ``example``, or its submodule does not run, or calls all its
            children in turn.
    """
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(f"model: got {lazy!r} without values, wanted a model whose lazy modules have run once")
    args, kwargs = _arguments(model, example, make)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    host, name = place
    found: list[Any] = []
    bystander = Bystander()
    with unchanged(model), torch.no_grad(), _no_autocast(tensors):
        for module in model.modules():
            module.training = False
        host.add_module(name, bystander)
        model.get_submodule(where).register_forward_hook(lambda module, args, output: found.append(output))
        try:
            model(*args, **kwargs)
        except Exception as error:
            came = "None" if example is None else _described(example)
            made = f" (then zeros of shape {tuple(args[0].shape)})" if example is None else ""
            raise ValueError(
                f"example: got {came}{made}, wanted a clip, or the shape of one, that {type(model).__name__} takes: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not found:
        raise ValueError(
            f"where: got {where!r}, which did not run in the dry run, wanted one that the model calls, as a module and "
            "not by its forward"
        )
    if bystander.called:
        raise ValueError(
            f"where: got {where!r}, whose forward calls all its children in turn and would call DSTS too, wanted its "
            "last child, or a torch.nn.Sequential"
        )
    return Seen(found[0], len(found), tuple(tensors[0].shape) if len(tensors) == 1 else None)


def _no_autocast(tensors: list[Tensor]) -> contextlib.AbstractContextManager:
    """Features in the dtype of the model, which is to be that of DSTS."""
    device = tensors[0].device.type if tensors else "cpu"
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else contextlib.nullcontext()


def _described(example: object) -> str:
    if isinstance(example, Mapping):
        return "{" + ", ".join(f"{key!r}: {_checks.describe(value)}" for key, value in example.items()) + "}"
    if isinstance(example, (tuple, list)) and any(isinstance(part, Tensor) for part in example):
        return "(" + ", ".join(map(_checks.describe, example)) + ")"
    return _checks.describe(example)


def _arguments(model: nn.Module, example: object, make: Callable[[], Tensor]) -> tuple[tuple, dict[str, Any]]:
    """What to call the model with."""
    if example is None:
        return (make(),), {}
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)) and example:
        if not all(type(size) is int and size > 0 for size in example):
            if any(type(size) is int for size in example):
                raise ValueError(f"example: got {example!r}, wanted a shape of ints of at least 1")
            return tuple(example), {}
        return (zeros(model, tuple(example)),), {}
    raise TypeError(
        f"example: got {_checks.describe(example)}, wanted a clip, its shape, a tuple of arguments or a dict of "
        "keyword arguments"
    )


def zeros(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A clip in the dtype and on the device of the model's first floating parameter; else float32 on the CPU."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return torch.zeros(shape, device="cpu")
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def made_up(model: nn.Module, frames: int | None) -> Tensor:
    """A clip for the model's first convolution: 16 frames of 112x112, or ``frames`` as a batch for a 2-d one.

    Raises:
        ValueError: there is no convolution to tell, or a 2-d one and no ``frames``.
    """
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if isinstance(first, nn.Conv3d):
        return zeros(model, (1, first.in_channels, *CLIP))
    if first is not None and frames is not None:
        return zeros(model, (frames, first.in_channels, *CLIP[1:]))
    why = "no convolution" if first is None else "a 2-d convolution first, and frames is None"
    raise ValueError(
        f"example: got None for {type(model).__name__}, which has {why}; wanted a clip or the shape of one for a dry "
        "run, or both layout and channels, which need none"
    )
