"""The first run of the Gluon kernels on a GPU, where a mistake in their barriers would hang.

``python -m benchmarks.gpu.first_run`` runs every case in a child process that is killed when its time is over, so a
deadlock is told and not suffered: the parent names the case, what the child said last, and goes on with the next. A
case compares a frozen module, or the gradients of one convolution, in Gluon with the older kernels and with plain
PyTorch, runs it again for the same bits, and times both. The exit code is 0 only if every case was right. A switch may
be turned on when all of its cases were: the last lines name these.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.gpu.timing import NOT_RUN, require_gpu, time_steps
from dsts_kernels import FusedDSTS, Routing
from dsts_kernels.backends import BACKENDS
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


class Gradients(NamedTuple):
    """One convolution, whose samples are hard and soft in turn, or only mixing where it names a ``kernel``."""

    channels: int
    neurons: tuple[int, ...]
    size: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    kernel: tuple[int, int, int] | None = None
    switch: str = "gluon_weight_gradient"  # whose kernel is asked for
    all_neurons: int = 4  # that there are: a sample's may be out of range

    @property
    def needs(self) -> list[bool]:
        """Of features and gates, or of filters."""
        data = self.switch == "gluon_data_gradient"
        return [data, data, not data, not data] if self.kernel is None else [False, True]


def both(name: str, *fields: object, **more: object) -> dict[str, Gradients]:
    """A case of either gradient."""
    kinds = {"data": "gluon_data_gradient", "weight": "gluon_weight_gradient"}
    return {f"{kind} {name}": Gradients(*fields, **more, switch=switch) for kind, switch in kinds.items()}


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
    **both("small", 256, (0, 1), (2, 8, 16)),
    **both("ragged", 328, (0, 3, 1, 0, 2, 2, 1, 0), (5, 7, 9)),
    **both("float16", 256, (0, 1, 2, 3) * 2, (4, 8, 16), torch.float16),
    **both("channels-first", 256, (0, 1, 2, 3) * 2, (4, 8, 16), channels_last=False),
    **both("one neuron", 512, (2,) * 8, (8, 16, 16)),
    **both("no neuron", 512, (1, -1, 0, 9, 2, 1, 0, 3), (8, 16, 16)),
    "weight mixing": Gradients(512, (0, 3, 1, 0), (8, 16, 16), kernel=(1, 1, 1)),
    "weight mixing 1x3x3": Gradients(256, (0, 3, 1, 0), (4, 8, 16), kernel=(1, 3, 3)),
    **both("swin", 1024, tuple(range(8)), (16, 7, 7), all_neurons=8),
    **both("tpn", 1024, tuple(range(8)), (8, 16, 16), all_neurons=8),
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
    with switched(gluon_conv=False):
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


LAUNCHERS = {"conv": "conv_packed", "data_gradient": "data_gradient", "weight_gradient": "weight_gradient"}


@contextlib.contextmanager
def counted_launches() -> Iterator[list[int]]:
    """Of the Gluon kernels inside the block."""
    count = [0]

    def counted(whole: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: object) -> None:
            count[0] += 1
            whole(*arguments)

        return launch

    with contextlib.ExitStack() as stack:
        for module, name in LAUNCHERS.items():
            found = load(f"gluon.{module}")
            stack.enter_context(mock.patch.object(found, name, counted(getattr(found, name))))
        yield count


@torch.inference_mode()
def run_frozen(case: Case, device: torch.device) -> None:
    """Compares and times a frozen module; raises where it is wrong."""
    frozen, module, x = frozen_of(case, device)
    launches = compare(frozen, module, x)
    if not launches:
        say("right, and its waves are not full enough: the older kernel ran")
        return
    with switched(gluon_conv=False):
        old = time_steps([lambda: frozen(x)], 0.3)
    with switched(gluon_conv=True):
        new = time_steps([lambda: frozen(x)], 0.3)
    say(f"right, {launches} launches; a module of two layers {old.median:.3f} ms, in Gluon {new.median:.3f} ms")


def operands_of(case: Gradients, device: torch.device) -> list[Tensor]:
    """Gradient, features, gates, neurons and filters, or of mixing without gates; in half types, neurons as given."""
    torch.manual_seed(0)
    b, c, neurons = len(case.neurons), case.channels, case.all_neurons

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(case.dtype)

    order = torch.channels_last_3d if case.channels_last else torch.contiguous_format
    grad, x = drawn(b, c, *case.size), drawn(b, c, *case.size).contiguous(memory_format=order)
    neuron = torch.tensor(case.neurons, device=device)
    if case.kernel is not None:
        return [grad, x, neuron, drawn(neurons, c, c, *case.kernel, scale=c**-0.5)]
    soft = (torch.rand(b, c, device=device) * 1.4 - 0.2).clamp(0, 1)
    hard = torch.arange(b, device=device)[:, None] % 2 == 0
    gate = torch.where(hard, (soft > 0.5).float(), soft).to(case.dtype)
    filters = [drawn(neurons, c, c, *kernel, scale=(6 * c) ** -0.5) for kernel in ((1, 3, 3), (3, 1, 1))]
    return [grad, x, gate, neuron, *filters]


def compare_gradients(case: Gradients, operands: Sequence[Tensor]) -> int:
    """How many launches of the kernel a call made; raises ``AssertionError`` where it was wrong.

    A sample whose neuron is out of range gets NaN from both kernels, and is left out of what plain PyTorch does.
    """
    op = "gated_conv3d_backward" if case.kernel is None else "mixing_conv3d_backward"

    def gradients() -> list[Tensor]:
        return [t for t in getattr(BACKENDS["triton"], op)(*operands, case.needs) if t is not None]

    say("the older kernel")
    with switched(**{case.switch: False}):
        older = gradients()
    with switched(**{case.switch: True}), counted_launches() as count:
        say("compiling and launching the Gluon kernel")
        found = gradients()
        say(f"it ended with a sum of {float(found[0].nansum()):.6g}; once more")
        launches = count[0]
        again = gradients()
        say(f"and with {float(again[0].nansum()):.6g}; comparing")
    by_sample = case.switch == "gluon_data_gradient"
    samples, filters = (operands[:4], operands[4:]) if case.kernel is None else (operands[:3], operands[3:])
    inside = (samples[-1] >= 0) & (samples[-1] < len(filters[0]))
    with exact_float32():
        *of_samples, neuron = (t[inside] for t in samples)
        exact = [*(t.float() for t in of_samples), neuron, *(t.float() for t in filters)]
        wanted = [t for t in getattr(BACKENDS["eager"], op)(*exact, case.needs) if t is not None]
    for one, twice, old, right in zip(found, again, older, wanted, strict=True):
        if not torch.equal(one.nan_to_num(7), twice.nan_to_num(7)):
            raise AssertionError("two runs differ in bits")
        if by_sample:
            if not one[~inside].isnan().all():
                raise AssertionError("samples without a neuron are not NaN")
            one, old = one[inside], old[inside]
        assert_close(one, old.double(), name="beside the older kernel")
        assert_close(one, right.double(), name="beside plain PyTorch in float32")
    return launches


@torch.inference_mode()
def run_gradients(case: Gradients, device: torch.device) -> None:
    """Compares and times gradients; raises where they are wrong. Times hold what comes before and after the kernel."""
    operands = operands_of(case, device)
    launches = compare_gradients(case, operands)
    if not launches:
        say("right, and no tile fits, or its waves are not full enough: the older kernel ran")
        return
    op = "gated_conv3d_backward" if case.kernel is None else "mixing_conv3d_backward"
    backward = getattr(BACKENDS["triton"], op)
    with switched(**{case.switch: False}):
        old = time_steps([lambda: backward(*operands, case.needs)], 0.3)
    with switched(**{case.switch: True}):
        new = time_steps([lambda: backward(*operands, case.needs)], 0.3)
    say(f"right, {launches} launches; with what surrounds it {old.median:.3f} ms, in Gluon {new.median:.3f} ms")


def run_case(name: str, device: torch.device) -> None:
    case = CASES[name]
    run_frozen(case, device) if isinstance(case, Case) else run_gradients(case, device)


def switch_of(name: str) -> str:
    """That a case stands for."""
    case = CASES[name]
    return "gluon_conv" if isinstance(case, Case) else case.switch


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
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time: sooner right or wrong, but no times")
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
    names, failed = options.case or list(CASES), []
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, (ok, text) in zip(names, pool.map(lambda name: watched(name, options.seconds), names), strict=True):
            say(f"{name}: {'' if ok else 'FAILED: '}{text}")
            failed += [] if ok else [name]
    wrong = {switch_of(name) for name in failed}
    for switch in dict.fromkeys(map(switch_of, names)):
        say(f"{switch}: " + ("a case failed" if switch in wrong else "every case is right: it may be turned on"))
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
