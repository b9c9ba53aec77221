"""One arm behind one seed's backbone: train it, then measure accuracy and what its routing and gates are worth."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsts_kernels import FusedDSTS
from dsts_kernels.backbones import TinyNet
from dsts_kernels.learning import (
    NoiseSchedule,
    RoutingMonitor,
    UpstreamDownstream,
    downstream_parameters,
    upstream_groups,
    upstream_parameters,
)
from dsts_kernels.probe import probe
from dsts_kernels.probe.counterfactuals import wilson_interval

from .settings import Arm, Task
from .tasks import (
    SYMMETRIES,
    Clips,
    batches,
    coloured,
    draw_again,
    features_of,
    picked,
    rate_share,
    symmetries,
    turned,
)

__all__ = ["Branch", "Seeded", "measure", "train"]

STILL_GATE = 3.0  # a frozen gate's logit, whose hard and soft value are one
FRACTION = 0.25  # of an epoch's clips, for gates and scores: Upstream-Downstream Learning
DRAWS = 4  # of each counterfactual that is drawn
LAST = 0.1  # of the steps, over which usage and loss are taken


class Branch(nn.Module):
    """Features ``(B, C, T, H, W)`` to logits: DSTS or what stands in its place, the mean, the last layer."""

    def __init__(self, dsts: nn.Module | None, classifier: nn.Linear) -> None:
        super().__init__()
        self.dsts, self.classifier = nn.Identity() if dsts is None else dsts, classifier

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.dsts(features).mean((2, 3, 4)))


class EndToEnd(nn.Module):
    """Clips to logits, through a backbone that is trained too."""

    def __init__(self, backbone: nn.Module, branch: Branch) -> None:
        super().__init__()
        self.stem = backbone.stem if isinstance(backbone, TinyNet) else nn.Identity()
        self.stages, self.branch = backbone.stages, branch

    def forward(self, clips: Tensor) -> Tensor:
        return self.branch(self.stages(self.stem(clips)))


class Convolutions(nn.Module):
    """Layers of a 3x3x3 convolution, BatchNorm and ReLU, and a skip connection: kernels of both kinds, no choice."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        parts = []
        for _ in range(layers):
            parts += [nn.Conv3d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm3d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Seeded:
    """What all arms of a seed share; made when the first of them needs it.

    Attributes:
        backbone: as it was trained.
        train_clips, test_clips: drawn clips.
        train, test: features of the same.
    """

    def __init__(self, task: Task, seed: int, backbone: nn.Module, train_clips: Clips, test_clips: Clips) -> None:
        self.task, self.seed, self.backbone = task, seed, backbone
        self.train_clips, self.test_clips = train_clips, test_clips
        self.train, self.test = features_of(backbone, train_clips), features_of(backbone, test_clips)
        self._views: list[Tensor] = []

    def features_again(self, seed: int) -> Tensor:
        """Features of the training clips as :func:`draw_again` turns them; those of all symmetries stay in memory."""
        own = self.train_clips
        if not self._views:
            others = (own._replace(clips=turned(own.clips, one)) for one in range(1, SYMMETRIES))
            self._views = [self.train.features, *(features_of(self.backbone, one).features for one in others)]
        return picked(self._views, symmetries(len(own.labels), seed))


def build(shared: Seeded, arm: Arm) -> nn.Module:
    """An arm at its start: the backbone's last layer as it was trained, all else drawn from the seed."""
    task = shared.task
    torch.manual_seed(1000 + shared.seed)
    own = copy.deepcopy(shared.backbone)
    if arm.kind == "backbone":
        return own
    if arm.kind == "head":
        return Branch(None, own.classifier)
    if arm.kind == "convolutions":
        return Branch(Convolutions(task.channels, task.layers), own.classifier)
    options = {"num_layers": task.layers, "num_neurons": task.neurons} | dict(arm.dsts)
    dsts = FusedDSTS(task.channels, **options)
    if arm.still == "gate":
        with torch.no_grad():
            for layer in dsts.layers:
                layer.gate.copy_(torch.where(layer.gate > 0, STILL_GATE, -STILL_GATE))
    if arm.still is not None:
        for layer in dsts.layers:
            getattr(layer, arm.still).requires_grad_(False)
    branch = Branch(dsts, own.classifier)
    return branch if arm.kind == "dsts" else EndToEnd(own, branch)


def optimizers(task: Task, arm: Arm, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Of the downstream side, then, where there is one, of the upstream side."""
    rest = [p for p in downstream_parameters(model) if p.requires_grad]
    found = [torch.optim.AdamW(rest, task.rate, weight_decay=task.weight_decay)]
    if any(p.requires_grad for p in upstream_parameters(model)):
        rate = task.upstream_rate
        groups = upstream_groups(model, rate, rate * arm.gate_rate, weight_decay=0.0)
        found.append(torch.optim.AdamW(groups, rate))
    return found


def two_parts(count: int, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of both parts of Upstream-Downstream Learning: the split is drawn anew each epoch, by the seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    cut, done = count - round(count * FRACTION), 0
    while done < steps:
        order = torch.randperm(count, generator=generator)
        ones, others = (part[: len(part) - len(part) % batch].split(batch) for part in (order[:cut], order[cut:]))
        for index, one in enumerate(ones):
            if done < steps:
                yield one, others[index % len(others)]
            done += 1


def train(shared: Seeded, arm: Arm) -> tuple[nn.Module, dict[str, Any]]:
    """Train an arm; the model in evaluation, and how training went."""
    task, model = shared.task, build(shared, arm)
    model.train()
    raw = arm.kind in ("backbone", "end to end")
    clips = shared.train_clips if raw else None
    inputs, labels = (coloured(clips.clips), clips.labels) if raw else shared.train
    steps = max(1, round(task.steps * arm.passes))
    tuned = optimizers(task, arm, model)
    rates = [group["lr"] for optimizer in tuned for group in optimizer.param_groups]
    has_dsts = arm.kind in ("dsts", "end to end")
    monitor = RoutingMonitor(model) if has_dsts else None
    schedule = None
    if arm.gumbel_scale is not None or arm.noise_std is not None:
        schedule = NoiseSchedule(model, steps, gumbel_scale=arm.gumbel_scale, noise_std=arm.noise_std)
    learner = None
    if arm.learning == "upstream-downstream":
        learner = UpstreamDownstream(
            model,
            F.cross_entropy,
            upstream_optimizer=tuned[1],
            downstream_optimizer=tuned[0],
            clip_norm=task.clip_norm,
        )
    order = (two_parts if learner else batches)(len(labels), task.batch, steps, shared.seed)
    torch.manual_seed(2000 + shared.seed)
    losses, each, began = [], len(labels) // task.batch, time.process_time()
    last = min(round(steps * (1 - LAST)), steps - 1)
    for step, indices in enumerate(order):
        share = rate_share((step + 1) / steps)
        for group, rate in zip((g for o in tuned for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * share
        if task.name == "dives" and step and step % each == 0:  # all arms see the same clips, turned alike
            anew = shared.seed + step
            inputs = coloured(draw_again(clips, anew).clips) if raw else shared.features_again(anew)
        if step == last and monitor is not None:
            monitor.reset()
        if learner is not None:
            losses.append(learner.step(*((inputs[one], labels[one]) for one in indices)).train_loss)
        else:
            loss = F.cross_entropy(model(inputs[indices]), labels[indices])
            for optimizer in tuned:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], task.clip_norm)
            for optimizer in tuned:
                optimizer.step()
            losses.append(loss.item())
        if schedule is not None:
            schedule.step()
    tail = losses[last:]
    told: dict[str, Any] = {"steps": steps, "train_loss": sum(tail) / len(tail)}
    told["train_seconds"] = time.process_time() - began
    if monitor is not None:
        found = monitor.statistics()
        told |= {name: getattr(found, name).tolist() for name in found._fields if name != "samples"}
        told["start"] = dict(zip(monitor.layers, monitor.start, strict=True))
        monitor.remove()
    return model.eval(), told


def measure(shared: Seeded, arm: Arm) -> dict[str, Any]:
    """Train an arm and measure it: a run's record, of plain values."""
    model, told = train(shared, arm)
    start, began = told.pop("start", None), time.process_time()
    drawn = shared.test_clips
    raw = arm.kind in ("backbone", "end to end")
    inputs = coloured(drawn.clips) if raw else shared.test.features
    tested = list(zip(inputs.split(128), drawn.labels.split(128), strict=True))
    if start is None:
        with torch.no_grad():
            right = torch.cat([model(one).argmax(1) == label for one, label in tested])
        low, high = wilson_interval(right)
        told |= {"accuracy": float(right.double().mean()), "low": low, "high": high, "clips": len(right)}
    else:
        own = {"class_names": drawn.class_names, "attributes": drawn.attributes}
        own |= {"attribute_names": drawn.attribute_names, "start": start, "draws": DRAWS, "seed": shared.seed}
        told |= {"test_" + k if k in told else k: v for k, v in probe(model, tested, **own).to_dict().items()}
    return told | {"measure_seconds": time.process_time() - began}
