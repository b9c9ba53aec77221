"""What a run of the recipe starts from, what of it is trained at which rate, and noise that falls on the way."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from dsts_kernels import FusedDSTS, reference
from dsts_kernels.backbones import BACKBONES
from dsts_kernels.learning import (
    NoiseSchedule,
    downstream_parameters,
    load_checkpoint,
    upstream_groups,
    upstream_parameters,
)

KINDS = (FusedDSTS, reference.DSTS)
SHOWN = 3


def of_dsts(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of what belongs to DSTS, among the names of ``model``."""
    return tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, KINDS))


def take_weights(model: nn.Module, path: str) -> None:
    """Weights and statistics of a checkpoint of this recipe; DSTS stays new where the checkpoint has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of this recipe, or one of another backbone, other classes or another DSTS.
    """
    given = load_checkpoint(path, hint="; examples/train.py writes them").get("model")
    if given is None:
        raise ValueError(f"--init: got {path!r}, which holds no model, wanted a checkpoint of examples/train.py")
    own, dsts = model.state_dict(), of_dsts(model)
    given = {key: value for key, value in given.items() if not key.endswith(".noise")}  # this run has its own
    if not dsts:  # what the checkpoint's DSTS adds to its backbone's names
        given = {key: value for key, value in given.items() if key in own or ".dsts." not in f".{key}"}
    has_dsts = any(key.startswith(dsts) for key in given) if dsts else False
    kept = {key: value for key, value in own.items() if dsts and key.startswith(dsts) and not has_dsts}
    given = kept | given
    differing = [key for key in own if key in given and own[key].shape != given[key].shape]
    differing += [key for key in {*own} ^ {*given} if not key.endswith((".center", ".center_batches"))]
    if differing:
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ValueError(f"--init: got {path!r} of another model ({', '.join(sorted(differing)[:SHOWN])}{more})")
    model.load_state_dict(given)


def backbone_parameters(model: nn.Module, backbone: str) -> list[nn.Parameter]:
    """All but DSTS and the last layers."""
    others = (*of_dsts(model), *BACKBONES[backbone].head)
    return [p for name, p in model.named_parameters() if not name.startswith(others)]


def still(model: nn.Module, backbone: str) -> None:
    """Its backbone as in evaluation, running statistics and all."""
    others = (*of_dsts(model), *BACKBONES[backbone].head)
    for name, part in model.named_modules():
        if not name.startswith(others) and next(part.children(), None) is None:
            part.eval()


def optimizers(model: nn.Module, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW of the downstream side, and of the upstream one where there is one.

    No decay upstream: it would draw every gate to its threshold.
    """
    backbone = set(map(id, backbone_parameters(model, options.backbone)))
    sides: list[list[nn.Parameter]] = [[], []]
    for p in downstream_parameters(model):
        if p.requires_grad:
            sides[id(p) in backbone].append(p)
    rates = options.rate, options.rate if options.backbone_rate is None else options.backbone_rate
    if rates[0] == rates[1]:  # one group, in the order of the model's parameters
        sides = [[p for p in downstream_parameters(model) if p.requires_grad], []]
    groups: list[dict[str, Any]] = [
        {"params": side, "lr": rate} for side, rate in zip(sides, rates, strict=True) if side
    ]
    found = [torch.optim.AdamW(groups, options.rate, weight_decay=options.weight_decay)]
    if upstream_parameters(model):
        gates = options.upstream_rate if options.gate_rate is None else options.gate_rate
        upstream = [{"params": upstream_parameters(model), "lr": gates}]
        if gates != options.upstream_rate:
            upstream = upstream_groups(model, options.upstream_rate, gates)
        found.append(torch.optim.AdamW(upstream, weight_decay=0.0))
    return found


def noise_schedule(model: nn.Module, options: argparse.Namespace, steps: int) -> NoiseSchedule | None:
    """Over all of a run's steps; ``None`` where nothing is asked for."""
    asked = {"gumbel_scale": options.gumbel_scale, "noise_std": options.gate_noise}
    given = {name: tuple(value) for name, value in asked.items() if value is not None}
    if not given:
        return None
    given = {name: value * 2 if len(value) == 1 else value for name, value in given.items()}
    steps -= options.noise_wait
    if steps < 1:
        raise ValueError(f"--noise-wait: got {options.noise_wait}, wanted fewer than the run's steps")
    return NoiseSchedule(model, steps, shape=options.noise_shape, wait=options.noise_wait, **given)
