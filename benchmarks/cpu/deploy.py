"""What each way to deploy a frozen module costs: the ways of docs/deploy.md, in turns, in one process on a CPU.

``python -m benchmarks.cpu.deploy --threads 1`` builds the literal module, freezes it, and prepares every way that this
machine has packages for, after checking that each agrees with the frozen module. The ways take turns on the same
features; printed are medians, ratios over the frozen module (medians of the ratios of each turn, so that other work on
the machine weighs on both) and the bytes of what is deployed. C++ programs run the same packages: what they save
is Python around the call.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report.machine import describe
from benchmarks.shapes import Problem
from benchmarks.variants import build, make_reference
from dsts_kernels import deploy
from dsts_kernels.testing import relative_error

WAYS = ("frozen", "exported", "aoti", "standard", "aoti-standard", "onnxruntime", "compiled", "literal")
PARITY = 1e-4


def exported(module: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


def packaged(module: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(exported(module, x), package_path=str(path))
    )


def session(module: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    deploy.to_onnx(module, x, path)
    ready = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = ready.get_inputs()[0].name
    return lambda x: torch.from_numpy(ready.run(None, {name: x.numpy()})[0])


def prepare(way: str, problem: Problem, reference: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    """A callable of features; what is deployed goes to a file of the way's name."""
    if way == "literal":
        return build("literal", "evaluation", problem, reference)
    frozen, path = build("frozen", "evaluation", problem, reference), folder / f"{way}.pt2"
    example = torch.cat([x, x])[: max(2, len(x))]
    if way == "frozen":
        frozen.save(path)
        return frozen
    if way == "exported":
        torch.export.save(exported(frozen, example), path)
        return torch.export.load(path).module()
    if way == "standard":
        return deploy.standard(frozen)
    if way == "compiled":
        return torch.compile(frozen, fullgraph=True)
    if way == "onnxruntime":
        return session(frozen, example, path)
    return packaged(frozen if way == "aoti" else deploy.standard(frozen), example, path)


def in_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of every call, each in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.deploy", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 14, 14), metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="frozen is always one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    problem = Problem("deploy", tuple(options.grid), options.batch, options.channels)
    reference = make_reference(problem, torch.float32, torch.device("cpu"))
    x = torch.randn(problem.feature_shape)
    machine = describe(torch.device("cpu"))
    print(f"{problem.label}, {options.turns} turns: " + ", ".join(f"{k} {v}" for k, v in machine.items() if v))
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], object]] = {}
        wanted = build("frozen", "evaluation", problem, reference)(x)
        for way in dict.fromkeys(["frozen", *options.ways]):
            if way == "onnxruntime" and not all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))):
                print("onnxruntime: left out, for onnxruntime or onnxscript is missing (extra deploy)")
                continue
            run = prepare(way, problem, reference, x, Path(folder))
            error = relative_error(run(x), wanted)
            if not error <= PARITY:
                raise AssertionError(f"{way}: relative error {error:.3g}, allowed {PARITY}")
            calls[way] = lambda run=run: run(x)
        times = in_turns(calls, options.turns)
        for way, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(own, times["frozen"], strict=True))
            files = [file.stat().st_size for file in Path(folder).glob(f"{way}.pt2*")]
            size = f"{sum(files) / 2**20:8.1f} MiB" if files else ""
            print(f"{way:14s} {statistics.median(own) * 1e3:9.2f} ms {ratio:6.2f} of frozen {size}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
