"""Measure what is best on this GPU, Triton's tiles and then either backend's ops: ``python -m benchmarks.gpu.tune``.

Each of the three large kernels is timed by the op that launches it, everything else in the op included alike. Results
are checked against the first candidate's before they are timed. The file goes to
``dsts_kernels/backends/triton/tuned/<architecture>.json``, where launchers look problems up. Where both GPU backends
run, :mod:`benchmarks.gpu.faster` then says which runs each op faster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import faster
from benchmarks.gpu.timing import NOT_RUN
from benchmarks.gpu.workload import gpu_backends
from benchmarks.report.machine import describe
from dsts_kernels.backends.base import FrozenOptions, FrozenWeights
from dsts_kernels.backends.gpu import measured
from dsts_kernels.backends.triton import TritonBackend, tuning
from dsts_kernels.testing import TOLERANCES, relative_error

SIZES = ((8, 16, 16), (16, 7, 7))
BATCHES = (1, 8, 32)


def frozen_call(
    size: tuple[int, int, int], batch: int, channels: int, dtype: torch.dtype, neurons: int = 10
) -> Callable:
    """One frozen layer with half the channels spatial, as the middle layer of a module sees it."""
    from dsts_kernels import FusedDSTS

    dsts = FusedDSTS(channels, num_layers=1, num_neurons=neurons, device="cuda").eval()
    with torch.no_grad():
        dsts.layers[0].gate.normal_()
    layer = dsts.freeze(dtype=dtype, backend="triton").layers[0]
    x = features(size, batch, channels, dtype)
    weights: FrozenWeights = layer.weights()
    options: FrozenOptions = layer.options(1)
    sums = x.sum((2, 3, 4), dtype=torch.float32)[:, :, None]
    run = TritonBackend().frozen_layer
    return lambda: run(x, sums, None, weights, options)[0]


def features(size: tuple[int, int, int], batch: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(batch, *size, channels, device="cuda", dtype=dtype)
    return x.permute(0, 4, 1, 2, 3)


def gradient_call(
    size: tuple[int, int, int], batch: int, channels: int, dtype: torch.dtype, needs: list[bool], neurons: int = 10
) -> Callable:
    """One backward pass of the gated convolution: ``needs`` picks the kernel."""
    x, grad = (features(size, batch, channels, dtype) for _ in range(2))
    gate = (torch.rand(batch, channels, device="cuda") < 0.5).to(dtype)
    neuron = torch.arange(batch, device="cuda") % neurons
    scale = 1 / math.sqrt(channels)
    spatial = torch.randn(neurons, channels, channels, 1, 3, 3, device="cuda", dtype=dtype) * scale
    temporal = torch.randn(neurons, channels, channels, 3, 1, 1, device="cuda", dtype=dtype) * scale
    run = TritonBackend().gated_conv3d_backward
    wanted = needs.index(True)
    return lambda: run(grad, x, gate, neuron, spatial, temporal, needs)[wanted]


def calls(size: tuple[int, int, int], batch: int, channels: int, dtype: torch.dtype) -> dict[str, Callable]:
    return {
        "conv": lambda: frozen_call(size, batch, channels, dtype),
        "data_gradient": lambda: gradient_call(size, batch, channels, dtype, [True, True, False, False]),
        "weight_gradient": lambda: gradient_call(size, batch, channels, dtype, [False, False, True, True]),
    }


def best_tile(
    kernel: str, call: Callable, tiles: tuple[tuning.Tile, ...], dtype: torch.dtype
) -> tuple[int, list[float]]:
    """Index of the fastest candidate, and every candidate's milliseconds."""
    from triton.testing import do_bench

    first, times = None, []
    for tile in tiles:
        with tuning.forced(**{kernel: tile}):
            y = call()
            if first is None:
                first = y.double()
            error = relative_error(y, first)
            if error > 2 * TOLERANCES[dtype]:
                raise AssertionError(f"{kernel} with {tile}: relative error {error:.3g} against the first candidate")
            times.append(do_bench(call, warmup=20, rep=60, return_mode="median"))
    return times.index(min(times)), times


def tune(channels: int, batches: tuple[int, ...], dtypes: dict[str, torch.dtype]) -> tuple[dict[str, int], list[dict]]:
    architecture = tuning.architecture_of(torch.cuda.get_device_capability())
    best, log = {}, []
    for kind, dtype in dtypes.items():
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        for size in SIZES:
            for batch in batches:
                for kernel, make in calls(size, batch, channels, dtype).items():
                    tiles = tuning.candidates(kernel, architecture, kind)
                    if len(tiles) == 1:
                        continue
                    index, times = best_tile(kernel, make(), tiles, dtype)
                    name = tuning.problem(kernel, kind, size, channels, batch)
                    best[name] = index
                    log.append({"problem": name, "best": index, "ms": [round(t, 4) for t in times]})
                    print(f"{name:<48} {index}  " + "  ".join(f"{t:8.3f}" for t in times), flush=True)
    return best, log


def tune_tiles(options: argparse.Namespace, folder: Path) -> None:
    """Writes ``folder/<architecture>.json``, what was measured before included, and makes launchers read it."""
    dtypes = {"half": torch.bfloat16, "tf32": torch.float32}
    chosen = {kind: dtypes[kind] for kind in options.kind or ["half"]}
    best, log = tune(options.channels, tuple(options.batch or BATCHES), chosen)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tuning.architecture_of(torch.cuda.get_device_capability())}.json"
    before = json.loads(path.read_text()) if path.exists() else {"tiles": {}, "log": []}
    names = {entry["problem"] for entry in log}
    record = {
        "device": torch.cuda.get_device_name(),
        "machine": describe(torch.device("cuda")),
        "tiles": {**before["tiles"], **best},
        "log": [entry for entry in before["log"] if entry["problem"] not in names] + log,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    tuning.TUNED = folder
    tuning.measured.cache_clear()
    print(f"wrote {path}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--batch", type=int, action="append", help="of the tiles' problems")
    parser.add_argument("--kind", action="append", choices=["half", "tf32"], help="of the tiles' problems")
    parser.add_argument("--only", choices=["tiles", "backends"], help="one of the two measurements")
    parser.add_argument("--out", type=Path, help="folder of tuned/ and measured/, else where launchers look")
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tiles are measured on a CUDA GPU, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = {name: reason for name, reason in gpu_backends(device, torch.bfloat16).items() if reason}
    if options.only != "backends" and "triton" not in reasons:
        tune_tiles(options, options.out / "tuned" if options.out else tuning.TUNED)
    if options.only != "tiles" and not reasons:  # after the tiles, which Triton then runs with
        path = faster.write(options.out / "measured" if options.out else measured.FOLDER, device, options.commit)
        print(f"wrote {path}")
    for name, reason in reasons.items():
        print(f"not measured: {name}: {reason}")
    return NOT_RUN if "triton" in reasons else 0


if __name__ == "__main__":
    sys.exit(main())
