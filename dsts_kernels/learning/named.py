"""An optimizer's state by the names of parameters, not by their places in it.

So it fits the same model under other wrappers, on other numbers of processes and with parameters in another order.
``torch.distributed.checkpoint`` reads into what is there already, so every parameter gets an entry, and those that no
step has made yet are listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .sharded import is_sharded
from .state import OptimizerState, Tensors, copied

__all__ = ["numbered", "optimizer_state", "parameter_names"]


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names by ``id``, as the model itself has them beneath ``torch.compile`` and ``DistributedDataParallel``."""
    wrapped = isinstance(getattr(module, "_orig_mod", module), DistributedDataParallel)
    found = {}
    for name, p in module.named_parameters():
        name = name.replace("_orig_mod.", "")
        found[id(p)] = name.removeprefix("module.") if wrapped else name
    return found


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with names for numbers, and ``absent``: the parameters whose entries mean nothing.

    Those of parameters that were not stepped yet are made by a step on zero gradients, which is taken back.
    """
    names = parameter_names(module)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    absent = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    raw = optimizer.state_dict()
    state = {order[key]: own for key, own in raw["state"].items()}
    if absent:
        made = zero_step(optimizer)
        state |= {order[key]: own for key, own in made.items() if order[key] in absent}
    groups = [group | {"params": [order[key] for key in group["params"]]} for group in raw["param_groups"]]
    return {"state": state, "param_groups": groups, "absent": absent}


def zero_step(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """What ``optimizer`` keeps after a step on zero gradients, by number; it and its parameters are as before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights, before, gradients = Tensors(), OptimizerState(optimizer), [p.grad for p in parameters]
    weights.save(parameters)
    try:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return copied(optimizer.state_dict()["state"])
    finally:
        weights.restore()
        before.restore()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient


def numbered(module: nn.Module, optimizer: torch.optim.Optimizer, argument: str, state: dict) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, from :func:`optimizer_state`; its own ``state_dict`` as it is.

    Raises:
        ValueError: a state of other parameters, or of whole ones where this process has shards.
    """
    saved = state["param_groups"]
    if not all(isinstance(name, str) for group in saved for name in group["params"]):
        return state
    names = parameter_names(module)
    own = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    ours = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    theirs = [set(group["params"]) for group in saved]
    if ours != theirs:
        other = sorted(set().union(*ours) ^ set().union(*theirs)) or ["other groups of the same"]
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        raise ValueError(f"{argument}: got the state of an optimizer of other parameters ({shown}), wanted this one's")
    kept = {name: entries for name, entries in state["state"].items() if name not in state["absent"]}
    for name, entries in kept.items():
        for key, value in entries.items():
            like = isinstance(value, Tensor) and value.dim() and value.shape == own[name].shape
            if like and is_sharded(value) != is_sharded(own[name]):
                found, wanted = ("a shard", "all of it") if is_sharded(value) else ("all of it", "a shard")
                raise ValueError(
                    f"{argument}: got {found} of {name}'s {key}, wanted {wanted}: read the checkpoint with "
                    "torch.distributed.checkpoint.load into the state_dict of this learner"
                )
    number = {name: place for place, name in enumerate(own)}
    ordered = zip(saved, optimizer.param_groups, strict=True)
    groups = [old | {"params": [number[names[id(p)]] for p in new["params"]]} for old, new in ordered]
    return {"state": {number[name]: entries for name, entries in kept.items()}, "param_groups": groups}
