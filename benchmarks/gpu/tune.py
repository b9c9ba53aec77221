"""Which of Triton's tiles is the fastest on this GPU: ``python -m benchmarks.gpu.tune``.

Each of the three large kernels is timed by the op that launches it, with every candidate tile, everything else in the
op included alike. Results are compared with the first candidate's before they are timed. Launchers take the first
candidate that fits (:data:`dsts_kernels.backends.triton.tuning.CANDIDATES`); where another one is faster the last lines
say so, and whoever believes it moves it up in that table, whose tiles the tests compile. Times go to
``tiles-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.gpu.record import describe
from benchmarks.gpu.timing import NOT_RUN, require_gpu, slug, time_steps
from dsts_kernels import FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.triton import tuning
from dsts_kernels.testing import TOLERANCES, relative_error

SIZES = ((8, 16, 16), (16, 7, 7))
BATCHES = (8, 1, 32)
NEURONS = 10
SECONDS = 480.0
TILE_SECONDS = 0.1
GAIN = 0.02  # from which on another tile is worth a word

Call = Callable[[], Tensor]
Timer = Callable[[Call], float]


def features(size: tuple[int, int, int], batch: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(B, C, T, H, W)``, channels-last."""
    return torch.randn(batch, *size, channels, device=device).to(dtype).permute(0, 4, 1, 2, 3)


def frozen_call(x: Tensor, device: torch.device) -> Call:
    """One frozen layer with half the channels spatial, as the middle layer of a module sees it."""
    dsts = FusedDSTS(x.shape[1], num_layers=1, num_neurons=NEURONS, device=device).eval()
    with torch.no_grad():
        dsts.layers[0].gate.normal_()
    layer = dsts.freeze(dtype=x.dtype, backend="triton").layers[0]
    weights, options = layer.weights(), layer.options(1)
    sums = x.sum((2, 3, 4), dtype=torch.float32)[:, :, None]
    run = BACKENDS["triton"].frozen_layer
    return lambda: run(x, sums, None, weights, options)[0]


def gradient_call(x: Tensor, needs: list[bool]) -> Call:
    """One backward pass of the gated convolution: ``needs`` picks the kernel."""
    (batch, channels), device, dtype = x.shape[:2], x.device, x.dtype
    gate = (torch.rand(batch, channels, device=device) < 0.5).to(dtype)
    neuron, scale = torch.arange(batch, device=device) % NEURONS, 1 / math.sqrt(channels)
    kernels = (1, 3, 3), (3, 1, 1)
    stacks = [torch.randn(NEURONS, channels, channels, *k, device=device).mul_(scale).to(dtype) for k in kernels]
    run, grad, wanted = BACKENDS["triton"].gated_conv3d_backward, torch.randn_like(x), needs.index(True)
    return lambda: run(grad, x, gate, neuron, *stacks, needs)[wanted]


CALLS: dict[str, Callable[[Tensor], Call]] = {
    "conv": lambda x: frozen_call(x, x.device),
    "data_gradient": lambda x: gradient_call(x, [True, True, False, False]),
    "weight_gradient": lambda x: gradient_call(x, [False, False, True, True]),
}


def tile_times(kernel: str, call: Call, tiles: Sequence[tuning.Tile], dtype: torch.dtype, timer: Timer) -> list[float]:
    """Every candidate's milliseconds.

    Raises:
        AssertionError: one gives something else than the first.
    """
    first, times = None, []
    for tile in tiles:
        with tuning.forced(**{kernel: tile}):
            y = call().double()
            first = y if first is None else first
            error = relative_error(y, first)
            if not error <= 2 * TOLERANCES[dtype]:
                raise AssertionError(f"{kernel} with {tile}: relative error {error:.3g} against the first candidate")
            times.append(timer(call))
    return times


def median_ms(call: Call) -> float:
    return time_steps([call], TILE_SECONDS).median


def tune(
    architecture: str,
    problems: Sequence[tuple[str, torch.dtype, tuple[int, int, int], int]],
    channels: int,
    device: torch.device,
    timer: Timer,
    deadline: float,
) -> list[dict[str, Any]]:
    """One entry a kernel and problem (kind, dtype, size, batch), until the deadline of :func:`time.monotonic`."""
    log = []
    for kind, dtype, size, batch in problems:
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        x = features(size, batch, channels, dtype, device)
        for kernel, make in CALLS.items():
            tiles = tuning.candidates(kernel, architecture, kind)
            if len(tiles) == 1 or time.monotonic() > deadline:
                continue
            times = tile_times(kernel, make(x), tiles, dtype, timer)
            chosen = tiles.index(tuning.choose_tile(kernel, architecture, kind, size, channels))
            name = f"{kernel} {kind} {'x'.join(map(str, size))} {channels} b{batch}"
            log.append({"problem": name, "chosen": chosen, "ms": [round(t, 4) for t in times], "tiles": tiles})
            print(f"{name:<48} {chosen}  " + "  ".join(f"{t:8.3f}" for t in times), flush=True)
    return log


def better(log: Sequence[dict[str, Any]]) -> list[str]:
    """Problems whose tile is not the fastest, in words."""
    lines = []
    for entry in log:
        times = entry["ms"]
        index = times.index(min(times))
        if times[index] < (1 - GAIN) * times[entry["chosen"]]:
            share, tiles = 1 - times[index] / times[entry["chosen"]], entry["tiles"]
            lines.append(f"{entry['problem']}: {tiles[index]} takes {share:.0%} less than {tiles[entry['chosen']]}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--batch", type=int, action="append", help=f"default: {', '.join(map(str, BATCHES))}")
    parser.add_argument("--kind", action="append", choices=["half", "tf32"], help="default: both")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all problems ({SECONDS:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tiles-<device>.json")
    parser.add_argument("--commit", help="written beside the numbers where the files are no git checkout")
    options = parser.parse_args(arguments)
    device = require_gpu()
    if (reason := BACKENDS["triton"].why_not("frozen_layer", device, torch.float32)) is not None:
        print(f"not measured: triton: {reason}")
        return NOT_RUN
    dtypes = {"half": torch.bfloat16, "tf32": torch.float32}
    batches, kinds = options.batch or BATCHES, options.kind or dtypes
    problems = [(kind, dtypes[kind], size, batch) for kind in kinds for batch in batches for size in SIZES]
    architecture = tuning.architecture_of(torch.cuda.get_device_capability(device))
    deadline = time.monotonic() + options.seconds
    log = tune(architecture, problems, options.channels, device, median_ms, deadline)
    facts = describe(device, options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"tiles-{slug(facts['device'])}.json"
    path.write_text(json.dumps({"machine": facts, "log": log}, indent=1) + "\n")
    print("\n".join(better(log) or [f"no tile is faster by more than {GAIN:.0%} than the one that runs"]))
    print(f"{len(log)} of {len(problems) * len(CALLS)} problems at most, written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
