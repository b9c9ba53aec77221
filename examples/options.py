"""The recipe's command line."""

from __future__ import annotations

import argparse
import re
from typing import Any

from dsts_kernels.backbones import BACKBONES
from dsts_kernels.classify import ClassifierConfig
from dsts_kernels.data import ClipSampling
from dsts_kernels.data.named import DATA, SYNTHETIC

OWN = None  # what the registry says of the backbone
# Chosen on three seeds of examples/protocol, whose other ten are in docs/results.md.
OURS = {
    "learning": "joint",
    "upstream_rate": 4e-3,
    "gate_rate": 2e-2,
    "gate_offset": 2.0,
    "score_center": "mean",
    "center_in_training": True,
    "gumbel_scale": [0.1, 0.01],
    "gate_noise": [0.3, 0.05],
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """With the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def kernel(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\dx\dx\d", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a kernel such as 1x3x3")
    return tuple(int(side) for side in text.split("x"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Train a video classifier with or without DSTS.",
        formatter_class=Help,
    )
    switch = argparse.BooleanOptionalAction
    data = found.add_argument_group("data")
    data.add_argument("--data", choices=DATA, default="synthetic")
    data.add_argument("--clips", type=int, default=1024, help="synthetic: of the training set")
    data.add_argument("--test-clips", type=int, default=512, help="synthetic")
    data.add_argument("--noise", type=float, default=0.12, help="synthetic: standard deviation of the pixels")
    data.add_argument(
        "--augment",
        action="store_true",
        help="synthetic: mirror and turn training clips, anew each epoch; videos are cropped and mirrored anyway",
    )
    data.add_argument("--videos", help="folder of videos")
    data.add_argument("--annotation", help="training annotation, as published")
    data.add_argument("--test-annotation")
    data.add_argument("--classes", help="Diving48's vocabulary, FineGym's categories")
    data.add_argument("--segments", help="FineGym: the annotation that times elements within full videos")
    own = "(default: the backbone's own)"
    data.add_argument("--frames", type=int, default=OWN, help=f"of a clip {own}")
    data.add_argument("--size", type=int, default=OWN, help=f"side of a frame {own}")
    data.add_argument("--mean", type=float, nargs=3, default=OWN, help=f"of red, green and blue, from 0 to 1 {own}")
    data.add_argument("--std", type=float, nargs=3, default=OWN, help=f"deviation of the same {own}")
    data.add_argument(
        "--stride", type=int, default=OWN, help="videos: from frame to frame (default: spread over the clip)"
    )
    data.add_argument("--workers", type=int, default=0, help="processes that read clips")

    model = found.add_argument_group("model")
    model.add_argument("--backbone", choices=tuple(BACKBONES), default="tiny")
    model.add_argument(
        "--width", type=int, default=OWN, help=f"tiny, tpn: channels of the first layer, others follow {own}"
    )
    model.add_argument(
        "--weights", default=OWN, help="of the backbone: a file, or torchvision's name such as DEFAULT; the head is new"
    )
    model.add_argument(
        "--init", help="a checkpoint of this recipe whose weights to start from; DSTS is new where it has none"
    )
    model.add_argument("--aux-head", action="store_true", help="tpn: train with its auxiliary head")
    model.add_argument("--dsts", action=switch, default=True)
    model.add_argument("--where", default=OWN, help=f"the submodule behind which DSTS goes {own}")
    model.add_argument("--literal", action="store_true", help="DSTS written word for word, to compare times")
    model.add_argument("--layers", type=int, default=3)
    model.add_argument("--neurons", type=int, default=4)
    model.add_argument("--skip", action=switch, default=True)
    model.add_argument("--scoring-kernel", type=kernel, default=(1, 1, 1))
    model.add_argument("--scoring-width", type=int, default=1)
    model.add_argument("--mixing-kernel", type=kernel, default=(1, 1, 1))
    model.add_argument("--score-reduction", choices=("sum", "mean"), default="mean")
    ours = "ours, not the paper's: "
    model.add_argument(
        "--score-center",
        choices=("mean", "balance"),
        default=OWN,
        help=ours + "subtract in evaluation what a neuron scores on the mean, or what balances choices",
    )
    model.add_argument("--center-in-training", action="store_true", help=ours + "subtract it in training too")
    model.add_argument("--center-momentum", type=float, default=0.1, help="of the running mean; the step of balance")
    model.add_argument(
        "--gate-offset", type=float, default=0.0, help=ours + "neurons start from this far temporal to spatial"
    )

    learning = found.add_argument_group("learning")
    learning.add_argument(
        "--recipe",
        choices=("paper", "ours"),
        default="paper",
        help="other defaults, which make neurons specialise: joint learning, centred scores, little noise that falls, "
        "gates that start apart and learn fast (docs/train.md)",
    )
    learning.add_argument(
        "--learning", choices=("joint", "upstream-downstream"), help="(default: upstream-downstream with DSTS)"
    )
    learning.add_argument(
        "--fraction",
        type=float,
        default=OWN,
        help="of the clips that train gates and scores (default: 0.25; 0.5 with --both-ways)",
    )
    learning.add_argument(
        "--both-ways", action="store_true", help=ours + "each pair of batches twice, the second time swapped"
    )
    learning.add_argument(
        "--warm-up", type=int, default=0, help=ours + "steps before line 6 of Algorithm 1 begins: operators learn alone"
    )
    learning.add_argument("--second-order", action="store_true")
    learning.add_argument(
        "--balance", type=float, default=0.0, help="ours, not the paper's: weight of the balance term"
    )
    learning.add_argument(
        "--balance-on",
        choices=("training", "evaluation"),
        default="training",
        help="choices that the balance term counts: with noise, or as evaluation makes them",
    )
    pair = {"type": float, "nargs": "+", "default": OWN}
    learning.add_argument(
        "--gumbel-scale", **pair, help=ours + "of the noise in choices: one number, or the first and the last"
    )
    learning.add_argument(
        "--gate-noise", **pair, help=ours + "deviation of the noise on gates, the same way; the paper has 1"
    )
    learning.add_argument("--noise-shape", choices=("linear", "cosine"), default="linear", help="from first to last")
    learning.add_argument("--noise-wait", type=int, default=0, help="steps at the first value")
    learning.add_argument("--epochs", type=int, default=20)
    learning.add_argument("--batch", type=int, default=32, help="clips a process and step, of each split")
    learning.add_argument("--rate", type=float, default=4e-3, help="AdamW's, at its highest")
    learning.add_argument("--upstream-rate", type=float, default=1e-3, help="of gates and scoring kernels")
    learning.add_argument(
        "--gate-rate", type=float, default=OWN, help=ours + "of gates (default: that of scoring kernels)"
    )
    learning.add_argument(
        "--one-rate", action="store_true", help="as the paper: --rate for gates and scoring kernels too"
    )
    learning.add_argument(
        "--backbone-rate", type=float, default=OWN, help="of all but DSTS and the classifier (default: --rate)"
    )
    learning.add_argument("--freeze-backbone", action="store_true", help="train DSTS and the classifier alone")
    learning.add_argument("--weight-decay", type=float, default=1e-2, help="of downstream parameters")
    learning.add_argument("--clip-norm", type=float, default=5.0)
    learning.add_argument("--seed", type=int, default=0)

    run = found.add_argument_group("run")
    run.add_argument("--device", default="cpu")
    run.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    run.add_argument("--out", default="runs/synthetic", help="folder of the checkpoint and the events")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run.add_argument("--quiet", action="store_true", help="no progress bar, no events")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as one option depends on another."""
    this = parser()
    options = this.parse_args(arguments)
    if options.recipe == "ours":
        if not options.dsts:
            this.error("--recipe: got ours with --no-dsts, wanted paper: there is no DSTS")
        this.set_defaults(**OURS)
        options = this.parse_args(arguments)
    if options.learning is None:
        options.learning = "upstream-downstream" if options.dsts else "joint"
    if options.learning == "upstream-downstream" and not options.dsts:
        this.error("--learning: got upstream-downstream with --no-dsts, wanted joint: there is nothing upstream")
    if options.second_order and options.learning == "joint":
        this.error("--second-order: got it with --learning joint, wanted upstream-downstream")
    if options.balance and (not options.dsts or options.literal):
        this.error("--balance: got a weight without FusedDSTS, wanted none")
    check_ours(this, options)
    known = BACKBONES[options.backbone]
    if options.width is not None and known.width is None:
        this.error(f"--width: got {options.width} with --backbone {options.backbone}, wanted none: it has one width")
    if options.aux_head and options.backbone != "tpn":
        this.error(f"--aux-head: got it with --backbone {options.backbone}, wanted tpn")
    if options.where is not None and not options.dsts:
        this.error(f"--where: got {options.where!r} with --no-dsts, wanted none: there is no DSTS to put there")
    if options.stride is not None and options.data in SYNTHETIC:
        this.error(
            f"--stride: got {options.stride} with --data {options.data}, wanted none: its clips have all their frames"
        )
    for name in ("frames", "size", "width", "mean", "std"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(known, name))
    options.mean, options.std = list(options.mean), list(options.std)
    counts = ("epochs", "batch", "clips", "test_clips", "frames", "size", "layers", "neurons")
    for name in (*counts, *(n for n in ("width", "stride") if getattr(options, n) is not None)):
        if getattr(options, name) < 1:
            this.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, wanted at least 1")
    return options


def check_ours(this: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options that go beyond the paper, as far as one depends on another; fills in what follows from others."""
    if not options.dsts:
        given = ("score_center", "gate_offset", "gumbel_scale", "gate_noise", "gate_rate", "one_rate")
        for name in (name for name in given if getattr(options, name)):
            this.error(f"--{name.replace('_', '-')}: got it with --no-dsts, wanted none: there is no DSTS")
    if options.learning == "joint":
        for name in (name for name in ("both_ways", "warm_up") if getattr(options, name)):
            this.error(f"--{name.replace('_', '-')}: got it with --learning joint, wanted upstream-downstream")
    if options.center_in_training and options.score_center is None:
        this.error("--center-in-training: got it without --score-center, wanted mean or balance")
    if options.augment and options.data != "synthetic":
        this.error(f"--augment: got it with --data {options.data}, wanted --data synthetic: others are not turned")
    if options.weights is not None and options.init is not None:
        this.error("--weights: got it with --init, wanted one of them")
    if options.freeze_backbone and options.backbone_rate is not None:
        this.error("--backbone-rate: got it with --freeze-backbone, wanted one of them")
    if options.one_rate:
        options.upstream_rate = options.rate
    for name in ("gumbel_scale", "gate_noise"):
        if len(getattr(options, name) or ()) > 2:
            this.error(f"--{name.replace('_', '-')}: got {len(getattr(options, name))} numbers, wanted 1 or 2")
    for name in ("warm_up", "noise_wait"):
        if getattr(options, name) < 0:
            this.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, wanted at least 0")
    if options.fraction is None:
        options.fraction = 0.5 if options.both_ways else 0.25
    if options.both_ways and options.fraction != 0.5:
        this.error(f"--fraction: got {options.fraction} with --both-ways, wanted 0.5: halves take turns")


def classifier_config(options: argparse.Namespace, class_names: list[str]) -> ClassifierConfig:
    """The model and its clips: what a checkpoint says of them.

    Raises:
        ValueError: a value out of its range; names it.
    """
    sampling = ClipSampling(
        frames=options.frames,
        size=options.size,
        stride=options.stride,
        mean=tuple(options.mean),
        std=tuple(options.std),
    )
    own = {} if options.width is None else {"width": options.width}
    return ClassifierConfig(
        backbone=options.backbone,
        class_names=tuple(class_names),
        sampling=sampling,
        options=own | ({"aux_logits": True} if options.aux_head else {}),
        where=options.where,
        dsts=dsts_options(options) if options.dsts else None,
    )


def dsts_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :class:`~dsts_kernels.FusedDSTS`."""
    return {
        "num_layers": options.layers,
        "num_neurons": options.neurons,
        "skip": options.skip,
        "scoring_kernel": options.scoring_kernel,
        "scoring_width": options.scoring_width,
        "mixing_kernel": options.mixing_kernel,
        "score_reduction": options.score_reduction,
    } | ours_of(options)


def ours_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options of DSTS that go beyond the paper, where they are asked for."""
    found: dict[str, Any] = {}
    if options.score_center is not None:
        found["score_center"] = options.score_center
        found["center_in_training"], found["center_momentum"] = options.center_in_training, options.center_momentum
    return found | ({"gate_offset": options.gate_offset} if options.gate_offset else {})
