"""What is run: tasks, arms, seeds and the contrasts that were named before any of these seeds ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

__all__ = [
    "ARMS",
    "CONTRASTS",
    "FIRST_RECIPE",
    "SEEDS",
    "TASKS",
    "TRIED",
    "TUNING_SEEDS",
    "Arm",
    "Contrast",
    "Task",
    "arms_of",
]

SEEDS = tuple(range(10, 20))
TUNING_SEEDS = (0, 1, 2)  # settings were chosen on these alone
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task at the size at which it is run; clips are drawn for each seed.

    Attributes:
        name: ``"dives"`` (:class:`~dsts_kernels.data.SyntheticDives`) or ``"cells"``.
        backbone_clips, branch_clips, test_clips: drawn apart from each other, so that features are those of clips
            that the backbone was not trained on.
        size, noise: of frames, in pixels, and of pixels.
        backbone_epochs, epochs: of the backbone, then of each branch.
        batch: clips a step.
        width: of the backbone; its features have ``channels``.
        layers, neurons: of DSTS.
        rate, upstream_rate: AdamW's at their highest, of DSTS.
    """

    name: str
    backbone_clips: int
    branch_clips: int
    test_clips: int
    size: int
    noise: float
    backbone_epochs: int
    epochs: int
    batch: int = 32
    width: int = 0
    channels: int
    layers: int
    neurons: int
    backbone_rate: float = 4e-3
    rate: float = 4e-3
    upstream_rate: float = 4e-3
    weight_decay: float = 1e-2
    clip_norm: float = 5.0

    @property
    def steps(self) -> int:
        """Of a branch: downstream steps of joint training."""
        return self.branch_clips // self.batch * self.epochs


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is trained behind a seed's backbone.

    Attributes:
        title: in tables.
        kind: ``"dsts"`` behind the frozen backbone; ``"backbone"``, all its weights trained on, without DSTS;
            ``"head"``, its last layer alone; ``"convolutions"``, 3x3x3 ones in place of DSTS; ``"end to end"``, DSTS
            and the backbone.
        dsts: options of :class:`~dsts_kernels.FusedDSTS`.
        gumbel_scale, noise_std: first and last value over the branch's steps; ``None`` leaves 1.
        gate_rate: gates' learning rate, as a multiple of ``upstream_rate``.
        still: ``"gate"`` or ``"scoring"``: frozen at random.
        learning: ``"joint"`` or ``"upstream-downstream"``.
        passes: of the same number of steps, a share: 1/3 makes Upstream-Downstream Learning as dear as joint.
        tasks: on which it is run.
    """

    title: str
    kind: str = "dsts"
    dsts: Mapping[str, Any] = field(default_factory=dict)
    gumbel_scale: tuple[float, float] | None = None
    noise_std: tuple[float, float] | None = None
    gate_rate: float = 1.0
    still: str | None = None
    learning: str = "joint"
    passes: float = 1.0
    tasks: tuple[str, ...] = ("dives", "cells")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: a run's file has them, and is run anew where they change."""
        own = {k: v for k, v in asdict(self).items() if k not in ("title", "tasks")}
        return own | {"dsts": {k: list(v) if isinstance(v, tuple) else v for k, v in self.dsts.items()}}


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A claim as a difference of two arms: ``first`` is above ``second``.

    Attributes:
        claim: in words.
        first, second: arms.
        changes: counterfactuals of ``first`` that must each cost more than their own interval, where the claim is
            about what neurons or gates do; none where it is about accuracy alone.
        extension: it is ours, not the paper's.
    """

    claim: str
    first: str
    second: str
    changes: tuple[str, ...] = ()
    extension: bool = False


TASKS = {
    "dives": Task(
        name="dives",
        backbone_clips=2048,
        branch_clips=2048,
        test_clips=1024,
        size=32,
        noise=0.12,
        backbone_epochs=12,
        epochs=12,
        width=8,
        channels=32,
        layers=3,
        neurons=4,
    ),
    "cells": Task(
        name="cells",
        backbone_clips=2048,
        branch_clips=4096,
        test_clips=1024,
        size=16,
        noise=0.15,
        backbone_epochs=4,
        epochs=24,
        channels=12,
        layers=1,
        neurons=4,
        backbone_rate=1e-2,
        rate=1.5e-2,
        upstream_rate=1e-2,
    ),
}

# "mean" keeps scores beside Gumbel noise of 1; the paper's sum is an arm of its own.
PAPER = Arm(title="DSTS as the paper, but scores averaged", dsts={"score_reduction": "mean"})
CENTRED = replace(PAPER, title="+ centred scores", dsts={**PAPER.dsts, "score_center": True})
IN_TRAINING = {**CENTRED.dsts, "center_in_training": True}
GUMBEL = replace(
    CENTRED,
    title="+ little Gumbel noise, and falling; centred in training too",
    dsts=IN_TRAINING,
    gumbel_scale=(0.1, 0.01),
)
GATES = replace(GUMBEL, title="+ little gate noise, and falling; faster gates", noise_std=(0.3, 0.05), gate_rate=5.0)
RECIPE = replace(GATES, title="+ gates that start apart: our recipe", dsts={**GATES.dsts, "gate_offset": 2.0})
# Of which TRIED has variants. Two of them became the recipe's: the centre in training, and less noise on gates.
FIRST_RECIPE = replace(RECIPE, dsts={**CENTRED.dsts, "gate_offset": 2.0}, noise_std=(1.0, 0.05))


def _with(arm: Arm, title: str, **options: Any) -> Arm:
    return replace(arm, title=title, dsts={**arm.dsts, **options})


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "backbone": Arm(title="backbone, trained further", kind="backbone"),
        "head": Arm(title="backbone frozen, last layer trained further", kind="head"),
        "dsts": PAPER,
        "centred": CENTRED,
        "gumbel": GUMBEL,
        "gates": GATES,
        "recipe": RECIPE,
        "gates still": replace(_with(RECIPE, "recipe, gates frozen at random", gate_offset=0.0), still="gate"),
        "gates at start": replace(RECIPE, title="recipe, gates frozen at their start", still="gate"),
        "scores still": replace(RECIPE, title="recipe, scores frozen at random", still="scoring"),
        "one neuron": _with(RECIPE, "recipe, one neuron", num_neurons=1),
        "ud steps": replace(PAPER, title="Upstream-Downstream, equal steps", learning="upstream-downstream"),
        "ud compute": replace(
            PAPER, title="Upstream-Downstream, equal compute", learning="upstream-downstream", passes=1 / 3
        ),
        "recipe ud": replace(RECIPE, title="recipe, Upstream-Downstream, equal steps", learning="upstream-downstream"),
        "no skip": _with(PAPER, "without skip", skip=False),
        "sum": _with(PAPER, "scores summed", score_reduction="sum"),
        "scoring 1x3x3": _with(PAPER, "scoring kernel 1x3x3", scoring_kernel=(1, 3, 3)),
        "scoring width 2": _with(PAPER, "scoring kernel of twice the outputs", scoring_width=2),
        "mixing 1x3x3": _with(PAPER, "mixing kernel 1x3x3", mixing_kernel=(1, 3, 3)),
        "mixing 3x1x1": _with(PAPER, "mixing kernel 3x1x1", mixing_kernel=(3, 1, 1)),
        "convolutions": Arm(title="3x3x3 convolutions in place of DSTS", kind="convolutions"),
        "end to end": replace(RECIPE, title="recipe, backbone trained too", kind="end to end", tasks=("dives",)),
    }
)

BOTH = ("permuted neurons", "gates flipped")
# Named before the runs; Holm's correction is over all of them, on a task.
CONTRASTS = (
    Contrast(claim="DSTS helps (Table 4)", first="dsts", second="backbone", changes=BOTH),
    Contrast(claim="DSTS helps, with our recipe", first="recipe", second="backbone", changes=BOTH, extension=True),
    Contrast(  # dives alone; the other arms' backbone stays as it is, but for the one they are held against
        claim="our recipe helps a backbone that learns with it",
        first="end to end",
        second="backbone",
        changes=BOTH,
        extension=True,
    ),
    Contrast(
        claim="neurons specialise in space or time, with our recipe: its gates against random ones",
        first="recipe",
        second="gates still",
        changes=("gates flipped",),
    ),
    Contrast(
        claim="similar samples activate the same neurons, with our recipe: learned scores against random ones",
        first="recipe",
        second="scores still",
        changes=("permuted neurons",),
    ),
    Contrast(
        claim="several neurons are better than one, with our recipe",
        first="recipe",
        second="one neuron",
        changes=("best single neuron",),
    ),
    Contrast(claim="Upstream-Downstream helps, at equal steps (Table 4)", first="ud steps", second="dsts"),
    Contrast(claim="Upstream-Downstream helps, at equal compute", first="ud compute", second="dsts"),
    Contrast(
        claim="Upstream-Downstream helps our recipe, at equal steps", first="recipe ud", second="recipe", extension=True
    ),
    Contrast(claim="the skip connection helps (Table 1)", first="dsts", second="no skip"),
    Contrast(claim="scoring kernel 1x1x1 is better than 1x3x3 (Table 2)", first="dsts", second="scoring 1x3x3"),
    Contrast(claim="and than one of twice the outputs (Table 2)", first="dsts", second="scoring width 2"),
    Contrast(claim="mixing kernel 1x1x1 is better than 1x3x3 (Table 3)", first="dsts", second="mixing 1x3x3"),
    Contrast(claim="and than 3x1x1 (Table 3)", first="dsts", second="mixing 3x1x1"),
    Contrast(claim="centred scores help", first="centred", second="dsts", extension=True),
    Contrast(claim="little Gumbel noise helps, on top", first="gumbel", second="centred", extension=True),
    Contrast(claim="little gate noise and faster gates help, on top", first="gates", second="gumbel", extension=True),
    Contrast(claim="gates that start apart help, on top", first="recipe", second="gates", extension=True),
    Contrast(claim="gates learn, from where they start", first="recipe", second="gates at start", extension=True),
)

# Variants of FIRST_RECIPE that were tried on TUNING_SEEDS, by name: settings of the task, then of the arm.
TRIED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = MappingProxyType(
    {
        "as it is": (NONE, NONE),
        "rate x 1/4": ({"rate": 0.25}, NONE),
        "rate x 2": ({"rate": 2.0}, NONE),
        "upstream rate x 1/4": ({"upstream_rate": 0.25}, NONE),
        "upstream rate x 4": ({"upstream_rate": 4.0}, NONE),
        "gate rate 1": (NONE, {"gate_rate": 1.0}),
        "gate rate 20": (NONE, {"gate_rate": 20.0}),
        "Gumbel from 0.3": (NONE, {"gumbel_scale": (0.3, 0.01)}),
        "Gumbel from 1": (NONE, {"gumbel_scale": (1.0, 0.01)}),
        "gate noise from 0.3": (NONE, {"noise_std": (0.3, 0.05)}),
        "centre in training": (NONE, {"dsts": {"center_in_training": True}}),
        "gates from 1": (NONE, {"dsts": {"gate_offset": 1.0}}),
        "balanced centre": (NONE, {"dsts": {"score_center": "balance", "center_in_training": True}}),
        # Three that had gained, together.
        "centre in training, Gumbel from 0.3": (
            NONE,
            {"dsts": {"center_in_training": True}, "gumbel_scale": (0.3, 0.01)},
        ),
        "centre in training, gate noise from 0.3": (
            NONE,
            {"dsts": {"center_in_training": True}, "noise_std": (0.3, 0.05)},
        ),
        "all three": (
            NONE,
            {"dsts": {"center_in_training": True}, "gumbel_scale": (0.3, 0.01), "noise_std": (0.3, 0.05)},
        ),
    }
)


def arms_of(task: str) -> dict[str, Arm]:
    """Those that are run on a task, in order."""
    return {name: arm for name, arm in ARMS.items() if task in arm.tasks}
