"""The recipe's command line."""

from __future__ import annotations

import argparse
import re
from typing import Any

from examples.data import DATA


def kernel(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\dx\dx\d", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a kernel such as 1x3x3")
    return tuple(int(side) for side in text.split("x"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Train a small 3-d ResNet with or without DSTS.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction
    data = found.add_argument_group("data")
    data.add_argument("--data", choices=DATA, default="synthetic")
    data.add_argument("--clips", type=int, default=1024, help="synthetic: of the training set")
    data.add_argument("--test-clips", type=int, default=512, help="synthetic")
    data.add_argument("--noise", type=float, default=0.12, help="synthetic: standard deviation of the pixels")
    data.add_argument("--videos", help="folder of videos")
    data.add_argument("--annotation", help="training annotation, as published")
    data.add_argument("--test-annotation")
    data.add_argument("--classes", help="Diving48's vocabulary, FineGym's categories")
    data.add_argument("--segments", help="FineGym: the annotation that times elements within full videos")
    data.add_argument("--frames", type=int, default=8)
    data.add_argument("--size", type=int, default=32, help="side of a frame")
    data.add_argument("--workers", type=int, default=0, help="processes that read clips")

    model = found.add_argument_group("model")
    model.add_argument("--width", type=int, default=12, help="channels of the first stage; DSTS has four times as many")
    model.add_argument("--dsts", action=switch, default=True)
    model.add_argument("--literal", action="store_true", help="DSTS written word for word, to compare times")
    model.add_argument("--layers", type=int, default=3)
    model.add_argument("--neurons", type=int, default=4)
    model.add_argument("--skip", action=switch, default=True)
    model.add_argument("--scoring-kernel", type=kernel, default=(1, 1, 1))
    model.add_argument("--scoring-width", type=int, default=1)
    model.add_argument("--mixing-kernel", type=kernel, default=(1, 1, 1))
    model.add_argument("--score-reduction", choices=("sum", "mean"), default="mean")

    learning = found.add_argument_group("learning")
    learning.add_argument(
        "--learning", choices=("joint", "upstream-downstream"), help="default: upstream-downstream with DSTS"
    )
    learning.add_argument("--fraction", type=float, default=0.25, help="of the clips that train gates and scores")
    learning.add_argument("--second-order", action="store_true")
    learning.add_argument(
        "--balance", type=float, default=0.0, help="ours, not the paper's: weight of the balance term"
    )
    learning.add_argument("--epochs", type=int, default=20)
    learning.add_argument("--batch", type=int, default=32, help="clips a process and step, of each split")
    learning.add_argument("--rate", type=float, default=4e-3, help="AdamW's, at its highest")
    learning.add_argument("--upstream-rate", type=float, default=1e-3, help="of gates and scoring kernels")
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
    if options.learning is None:
        options.learning = "upstream-downstream" if options.dsts else "joint"
    if options.learning == "upstream-downstream" and not options.dsts:
        this.error("--learning: got upstream-downstream with --no-dsts, wanted joint: there is nothing upstream")
    if options.second_order and options.learning == "joint":
        this.error("--second-order: got it with --learning joint, wanted upstream-downstream")
    if options.balance and (not options.dsts or options.literal):
        this.error("--balance: got a weight without FusedDSTS, wanted none")
    for name in ("epochs", "batch", "clips", "test_clips", "frames", "size", "width", "layers", "neurons"):
        if getattr(options, name) < 1:
            this.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, wanted at least 1")
    return options


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
    }
