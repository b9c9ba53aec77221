"""The first run of the Gluon convolution on a GPU, where a mistake in its barriers would hang.

``python -m benchmarks.gpu.first_run`` runs every case in a child process that is killed when its time is over, so a
deadlock is told and not suffered: the parent names the case, what the child said last, and goes on with the next. A
case compares a frozen module in Gluon with the older kernel and with plain PyTorch, runs it again for the same bits,
and times both kernels. The exit code is 0 only if every case was right; then the switch ``gluon_conv`` may be turned
on.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.gpu.timing import NOT_RUN, require_gpu, time_steps
from dsts_kernels import FusedDSTS, Routing
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import load
from dsts_kernels.backends.triton.gluon import plan
from dsts_kernels.testing import assert_close, exact_float32

SECONDS = 60.0  # of a case: compiling takes most of it


class Case(NamedTuple):
    """Channels, features and options of a frozen module of two layers."""

    channels: int
    batch: int
    size: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    taps: int = 1
    channels_last: bool = True
    split: float = 0.0  # mean of the gates' logits: above 0 more channels are spatial


CASES = {
    "one tile": Case(128, 1, (1, 8, 16)),
    "small": Case(256, 2, (2, 8, 16)),
    "ragged": Case(328, 8, (5, 7, 9)),
    "float16": Case(256, 8, (4, 8, 16), torch.float16),
    "nine taps": Case(256, 8, (4, 8, 16), taps=9),
    "channels-first": Case(256, 8, (4, 8, 16), channels_last=False),
    "unequal": Case(512, 8, (8, 16, 16), split=2.0),
    "swin": Case(1024, 8, (16, 7, 7)),
    "tpn": Case(1024, 8, (8, 16, 16)),
    "tpn batch 1": Case(1024, 1, (8, 16, 16)),
    "tpn batch 32": Case(1024, 32, (8, 16, 16)),
}


def say(text: str) -> None:
    print(text, flush=True)


def frozen_of(case: Case, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """A frozen module, the module in float32 that it comes from, and features."""
    torch.manual_seed(0)
    kernel = (1, 3, 3) if case.taps == 9 else (1, 1, 1)
    options = {"num_layers": 2, "num_neurons": 4, "score_reduction": "mean", "scoring_kernel": kernel}
    module = FusedDSTS(case.channels, **options, device=device, backend="eager").eval()
    with torch.no_grad():
        for layer in module.layers:
            layer.gate.normal_().add_(case.split)
    x = torch.randn(case.batch, case.channels, *case.size, device=device, dtype=case.dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d) if case.channels_last else x
    return module.freeze(dtype=case.dtype, backend="triton"), module, x


def same_routes(routing: Routing, wanted: Routing) -> Tensor:
    """Samples that took the same way through all layers: nearly tied scores are routed by rounding."""
    same = (routing.neuron == wanted.neuron).all(0)
    if not same.any():
        raise AssertionError(f"no sample took the same way: neurons {routing.neuron}, wanted {wanted.neuron}")
    return same


@torch.inference_mode()
def compare(frozen: torch.nn.Module, module: torch.nn.Module, x: Tensor) -> int:
    """How many launches of the Gluon convolution a call made; raises ``AssertionError`` where it was wrong."""
    say("the older kernel")
    older, older_routing = frozen(x, return_routing=True)
    with switched(gluon_conv=True), counted_launches() as count:
        say("compiling and launching the Gluon kernel")
        y, routing = frozen(x, return_routing=True)
        say(f"it ended with a sum of {float(y.float().sum()):.6g}; once more")
        launches = count[0]
        again = frozen(x)
        say(f"and with {float(again.float().sum()):.6g}; comparing")
    if not torch.equal(y, again):
        raise AssertionError("two runs differ in bits")
    same = same_routes(routing, older_routing)
    assert_close(y[same], older[same].double(), name="beside the older kernel")
    with exact_float32():
        wanted, wanted_routing = module(x.float(), return_routing=True)
    same = same_routes(routing, wanted_routing)
    assert_close(y[same], wanted[same].double(), dtype=y.dtype, name="beside plain PyTorch in float32")
    return launches


@contextlib.contextmanager
def counted_launches() -> Iterator[list[int]]:
    """Of the Gluon convolution inside the block."""
    conv, count = load("gluon.conv"), [0]
    whole = conv.conv_packed

    def counted(*arguments: object) -> None:
        count[0] += 1
        whole(*arguments)

    conv.conv_packed = counted
    try:
        yield count
    finally:
        conv.conv_packed = whole


@torch.inference_mode()
def run_case(name: str, device: torch.device) -> None:
    """Compares and times a case; raises where it is wrong."""
    frozen, module, x = frozen_of(CASES[name], device)
    launches = compare(frozen, module, x)
    if not launches:
        say("right, and its waves are not full enough: the older kernel ran")
        return
    old = time_steps([lambda: frozen(x)], 0.3)
    with switched(gluon_conv=True):
        new = time_steps([lambda: frozen(x)], 0.3)
    say(f"right, {launches} launches; a module of two layers {old.median:.3f} ms, in Gluon {new.median:.3f} ms")


def command(name: str) -> list[str]:
    """Of the process that runs a case."""
    return [sys.executable, "-m", "benchmarks.gpu.first_run", "--child", name]


def watched(name: str, seconds: float) -> tuple[bool, str]:
    """Whether the case was right in a child process, and what it said last; a child that takes longer is killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command(name), cwd=ROOT, **pipes) as child:
        try:
            text, _ = child.communicate(timeout=seconds)
            ok = child.returncode == 0
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
            text, ok = f"{text}killed after {seconds:.0f} s: it hangs, or compiles for longer", False
    lines = [line for line in text.splitlines() if line.strip()]
    return ok, "\n    ".join(lines[-1:] if ok else lines[-6:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.first_run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a case, after which its process is killed")
    parser.add_argument("--case", action="append", choices=list(CASES), help="of these; without it every one")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = require_gpu()
    reason = plan.unfit(torch.cuda.get_device_capability(device), torch.bfloat16)
    if reason is not None:
        say(f"benchmarks.gpu.first_run: not run: {reason}")
        return NOT_RUN
    if options.child:
        run_case(options.child, device)
        return 0
    failed = []
    for name in options.case or CASES:
        ok, text = watched(name, options.seconds)
        say(f"{name}: {'' if ok else 'FAILED: '}{text}")
        failed += [] if ok else [name]
    say(f"failed: {', '.join(failed)}" if failed else "every case is right: the switch gluon_conv may be turned on")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
