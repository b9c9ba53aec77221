"""``python -m dsts_kernels``: ``info`` on what runs where, ``bench`` for times here, ``classify`` for videos, ``plot``
and ``probe`` for checkpoints, ``roofline`` for GPU times."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch

from . import __version__, backends, viz
from .backends import processor
from .backends.build import build_details, build_record, why_no_module
from .bench import command as benching
from .classify import command as classifying
from .learning import load_checkpoint
from .probe import command as probing
from .roofline import BACKENDS, CHIPS, SHAPES, STEPS, Case, report, summary

DTYPES = {
    "bfloat16": (torch.bfloat16, "half"),
    "float16": (torch.float16, "half"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
MOST = 65536  # of a count, and channels of a shape
ELEMENTS = 2**31


def info() -> str:
    """A report for a bug tracker: every version that matters and the reason for everything that is missing."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    told = [build_record()[1], why_no_module() or ""]
    lines = [
        f"dsts_kernels  {__version__}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"numpy         {numpy.__version__}",
        f"GPU           {cuda}",
        *(f"{name:<13} {value}" for name, value in build_details().items()),
        *(f"{processor.name_of(dtype):<13} {processor.describe(dtype)}" for dtype in processor.UNITS),
        "backends",
    ]
    for name, backend in backends.BACKENDS.items():
        reason = backend.missing()
        lines.append(
            f"  {name:<11} " + (f"can run ({backend.remark})" if reason is None else f"no: {again(reason, told)}")
        )
        told.append(reason or backend.remark)
    lines.append("")
    on_gpu = torch.cuda.is_available()
    explained = [backends.explain("gated_conv3d", "cuda" if on_gpu else "cpu", torch.float32)]
    if not on_gpu:
        explained.append(backends.explain("gated_conv3d", "cpu", torch.bfloat16))
    for text in explained:
        head, *reasons = text.splitlines()
        lines += [head, *(line for line in reasons if not any(known and known in line for known in told))]
    return "\n".join(lines)


def again(reason: str, told: Sequence[str]) -> str:
    """A reason without what was said before in full."""
    for text in sorted(filter(None, told), key=len, reverse=True):
        if text in reason:
            return reason.replace(text, "as above" if text == reason else "see above")
    return reason


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {' or '.join(choices)}")
        return text.lower()

    return parse


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1 to {MOST}")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number from 0 to 1")
    return value


def shape(text: str) -> tuple[int, tuple[int, int, int]]:
    """``tpn``, ``swin`` or ``CxTxHxW``: channels and size."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = [int(n) for n in text.split("x")] if re.fullmatch(r"[0-9]{1,5}(x[0-9]{1,5}){3}", text) else [0]
    if min(sizes) < 1 or max(sizes) > MOST:
        wanted = " or ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted} or CxTxHxW such as 1024x8x16x16")
    return sizes[0], (sizes[1], sizes[2], sizes[3])


def add_roofline(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", type=shape, action="append", help="tpn, swin or CxTxHxW; repeatable (both)")
    add("--chip", type=one_of(tuple(CHIPS)), action="append", help=f"{', '.join(CHIPS)}; repeatable (all)")
    add("--backend", type=one_of(BACKENDS), help="triton or cuda, where both run (triton; before sm_80 cuda)")
    add("--step", type=one_of((*STEPS, "all")), default="all", help="frozen, training or all (all)")
    add("--dtype", type=one_of(tuple(DTYPES)), default="bfloat16", help=f"{', '.join(DTYPES)} (bfloat16)")
    add("--batch", type=count, default=8, help="samples (8)")
    add("--layers", type=count, default=3, help="layers of the module (3)")
    add("--neurons", type=count, default=10, help="neurons in each layer (10)")
    add("--spatial-share", type=fraction, default=0.5, help="of a neuron's channels that are spatial (0.5)")
    add("--all", action="store_true", help="every launch of every step, with what bounds it")


def roofline(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """Predicted tables: see :mod:`dsts_kernels.roofline`."""
    dtype, kind = DTYPES[given.dtype]
    cases = []
    for channels, size in dict.fromkeys(given.shape or SHAPES.values()):
        case = Case(channels, size, given.batch, given.layers, given.neurons, dtype, kind, given.spatial_share)
        # Small features still take whole tiles, and every tile is walked through.
        if given.batch * case.positions * max(channels, 256) > ELEMENTS:
            sizes = "x".join(map(str, (channels, *size)))
            parser.error(f"argument --shape: got {sizes} with --batch {given.batch}, wanted at most 2^31 elements")
        cases.append(case)
    chips = [CHIPS[name] for name in dict.fromkeys(given.chip or CHIPS)]
    steps = tuple(STEPS) if given.step == "all" else (given.step,)
    return (report if given.all else summary)(cases, chips, steps, given.backend)


def add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file that a training run saved")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures go (NAME-figures beside the checkpoint)")


def plot(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """Figures of a checkpoint: their paths, and what neurons tell about classes and attributes. See :mod:`.viz`."""
    directory = given.out or given.checkpoint.with_name(f"{given.checkpoint.stem}-figures")
    try:
        checkpoint = load_checkpoint(given.checkpoint)
        lines = [str(path) for path in viz.draw(checkpoint, directory)]
        if checkpoint.get("routing") is not None:
            rows = viz.information_table(checkpoint["routing"])
            lines += ["", viz.information_text(rows)]
            if (nothing := viz.learned_text(checkpoint["routing"], rows)) is not None:
                lines += ["", nothing]
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    return "\n".join(lines)


def answer(arguments: Sequence[str] | None) -> tuple[str, int]:
    """What a command has to say, and its exit code; argparse's SystemExit for one that it does not know."""
    parser = argparse.ArgumentParser(prog="python -m dsts_kernels", description="Fused kernels for DSTS.")
    parser.add_argument("--version", action="version", version=f"dsts_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, the native build, and backends with reasons")
    predicting = commands.add_parser(
        "roofline", help="predict a step's milliseconds on GPUs from FLOP, bytes, tiles and waves of every launch"
    )
    add_roofline(predicting)
    plotting = commands.add_parser("plot", help="draw what neurons of a checkpoint learned: gates, routing, usage")
    add_plot(plotting)
    changing = commands.add_parser("probe", help="what a checkpoint's routing and gates are worth: change them and see")
    probing.add_arguments(changing)
    classes = commands.add_parser("classify", help="name the class of videos, the neurons they activate, and the time")
    classifying.add_arguments(classes)
    benches = commands.add_parser("bench", help="time the module here, beside the literal one and the best handwritten")
    benching.add_arguments(benches, shape, count)
    given = parser.parse_args(arguments)
    if given.command == "classify":
        return classifying.classify(classes, given)
    if given.command == "bench":
        return benching.bench(benches, given), 0
    if given.command == "probe":
        return probing.probe_command(changing, given), 0
    if given.command == "plot":
        return plot(plotting, given), 0
    return (info() if given.command == "info" else roofline(predicting, given)), 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. A reader that wants no more of the output, such as ``head``, ends it; that is no error."""
    code = 0
    try:
        try:
            text, code = answer(arguments)
            if text:
                print(text)
        finally:  # after --help too, and not at the interpreter's end, where nothing catches it
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code
