"""What int8 frozen inference would cost in error: ``python -m benchmarks.cpu.int8 [--checkpoint FILE]``.

A simulation: integers are exact in float32 at these sizes, so weights and activations are rounded to the grid that int8
has and everything else runs as it does. Weights are symmetric, one scale per neuron, operator and output; activations
one scale per sample, of 127 steps where they have a sign and 255 where they have none (after a ReLU). Sums, scores,
biases and the skip connection stay as they are. A scale of activations is their largest value (``max``), which takes a
pass of its own or a place in the epilogue; or so many times their mean magnitude, which the sums that route hold where
no value is negative (``means``), or that of the channel where it is largest (``largest means``): what lies beyond it
is cut off.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.margins import separate_features
from benchmarks.shapes import Problem
from benchmarks.variants import make_reference
from dsts_kernels import FrozenDSTS, FusedDSTS, ops
from dsts_kernels.backends.packing import pack, places, unpack_at
from dsts_kernels.classify.config import CLASSIFIER, ClassifierConfig
from dsts_kernels.data.named import build_data
from dsts_kernels.learning import load_checkpoint
from dsts_kernels.testing import relative_error

Scale = Callable[[Tensor], Tensor]
Way = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
MEANS = (6.0, 8.0, 12.0)


def by_max(x: Tensor) -> Tensor:
    """The largest magnitude of each sample ``(B, 1, 1, 1, 1)``."""
    return x.abs().amax((1, 2, 3, 4), keepdim=True)


def by_mean(times: float) -> Scale:
    return lambda x: times * x.abs().mean((1, 2, 3, 4), keepdim=True)


def by_largest_mean(times: float) -> Scale:
    return lambda x: times * x.abs().mean((2, 3, 4), keepdim=True).amax(1, keepdim=True)


def on_grid(values: Tensor, largest: Tensor, signed: bool) -> Tensor:
    """Values rounded to the steps of int8, or of uint8 where none is negative; beyond the largest they are cut off."""
    steps = 127 if signed else 255
    step = (largest / steps).clamp_min(torch.finfo(values.dtype).tiny)
    return (values / step).round().clamp(-steps if signed else 0, steps) * step


def rounded_weights(frozen: FrozenDSTS) -> FrozenDSTS:
    """A copy whose filters lie on int8 grids, one for each output of each filter."""
    frozen = copy.deepcopy(frozen)
    for layer in frozen.layers:
        weights, outputs = layer.weights(), layer.bias.shape[1]
        pieces = []
        for pair in places(weights.starts.tolist(), layer.gate.shape[1], outputs, layer.packing, layer.dtype):
            for place, taps in zip(pair, (9, 3), strict=True):
                panel = unpack_at(weights.filters, place, layer.packing, outputs, taps)
                if place.channels:
                    panel = on_grid(panel, panel.abs().amax((1, 2), keepdim=True), signed=True)
                pieces.append(pack(panel, layer.packing))
        layer.filters.copy_(torch.cat(pieces))
    return frozen


@torch.no_grad()
def run(frozen: FrozenDSTS, x: Tensor, scale: Scale | None) -> tuple[Tensor, list[Tensor]]:
    """The output and each layer's neurons, with the activations of every layer on their grid."""
    h, layers, neurons = x, list(frozen.layers), []
    for index, layer in enumerate(layers):
        sums = ops.tap_sums(h, layer.taps)
        seen = h if scale is None else on_grid(h, scale(h), signed=bool((h < 0).any()))
        skip = x if frozen.skip and index == len(layers) - 1 else None
        h, _, neuron, _ = ops.frozen_layer(seen, sums, skip, layer.weights(), layer.options(0), backend="cpu")
        neurons.append(neuron)
    return h, neurons


def schemes(fused: FusedDSTS) -> dict[str, Way]:
    """Ways to run a module, by name."""
    wide = fused.float().eval().freeze()
    half = fused.freeze(dtype=torch.bfloat16)
    whole = rounded_weights(wide)
    found = {
        "float32": lambda x: run(wide, x, None),
        "bfloat16": lambda x: run(half, x.to(torch.bfloat16), None),
        "int8 weights": lambda x: run(whole, x, None),
        "int8, max": lambda x: run(whole, x, by_max),
    }
    for times in MEANS:
        found[f"int8, {times:g} means"] = lambda x, times=times: run(whole, x, by_mean(times))
        found[f"int8, {times:g} largest means"] = lambda x, times=times: run(whole, x, by_largest_mean(times))
    return found


def features(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Random features after a ReLU: normal, or log-normal channels of very different size, as backbones have them."""
    x = torch.randn(shape).relu()
    return x if kind == "normal" else x * torch.randn(1, shape[1], 1, 1, 1).exp()


def random_errors(channels: int, grid: tuple[int, int, int], batch: int) -> list[str]:
    """Relative errors of three layers with the benchmark's weights against the module in float64."""
    problem = Problem("random", grid, batch, channels)
    reference = make_reference(problem, torch.float32, torch.device("cpu"))
    fused = FusedDSTS(channels, num_layers=problem.layers, num_neurons=problem.neurons)
    fused.load_state_dict(reference.state_dict())
    exact, lines = copy.deepcopy(fused).double().eval().freeze(), []
    ways = schemes(fused)
    for kind in ("normal", "log-normal"):
        x = separate_features(
            lambda x: exact(x.double(), return_routing=True)[1], features(kind, problem.feature_shape)
        )
        wanted, neurons = run(exact, x.double(), None)
        for name, way in ways.items():
            y, chosen = way(x)
            moved = wanted - x.double()  # what the layers add: the skip connection has no error
            error = relative_error(y.double() - x.double(), moved)
            same = sum(int((a == b).all()) for a, b in zip(chosen, neurons, strict=True))
            lines.append(f"{kind}, C = {channels}: {name}: {error:.2e}, {same} of {len(neurons)} layers routed alike")
    return lines


class Simulated(nn.Module):
    """A way in place of the module that it simulates."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.neurons = way, []

    def forward(self, x: Tensor) -> Tensor:
        y, neurons = self.way(x)
        self.neurons.append(torch.stack(neurons))
        return y.to(x.dtype)


@torch.no_grad()
def task_errors(path: Path) -> list[str]:
    """Accuracy on the synthetic test set, how many answers change and how far logits move, of a checkpoint."""
    state = load_checkpoint(path)
    model = ClassifierConfig.from_dict(state[CLASSIFIER]).build().eval()
    model.load_state_dict(state["model"])
    clips = build_data(argparse.Namespace(**state["options"]))[1]
    batches = [tuple(map(torch.stack, zip(*part, strict=True))) for part in _parts(clips)]
    labels = torch.cat([torch.as_tensor(label) for _, label in batches])
    host = next(m for m in model.modules() if isinstance(m._modules.get("dsts"), FusedDSTS))
    lines, first = [f"synthetic task, {len(labels)} clips, {host.dsts.layers[0].in_channels} channels"], None
    for name, way in schemes(host.dsts).items():
        host.dsts = simulated = Simulated(way)
        logits = torch.cat([model(part) for part, _ in batches])
        found = logits.argmax(1), torch.cat(simulated.neurons, 1), logits
        first = found if first is None else first
        top1 = (found[0] == labels).double().mean()
        answers, routes = ((a != b).double().mean() for a, b in zip(found[:2], first[:2], strict=True))
        moved = relative_error(logits, first[2])
        lines.append(
            f"  {name}: top-1 {top1:.1%}, answers changed {answers:.1%}, choices {routes:.2%}, logits {moved:.1e}"
        )
    return lines


def _parts(data: Dataset, size: int = 32) -> list[list[tuple[Tensor, Tensor]]]:
    pairs = [(clip, torch.as_tensor(label)) for clip, label in (data[i] for i in range(len(data)))]
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.int8", description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--size", type=int, nargs=3, default=(4, 7, 7), help="frames, rows, columns")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="of examples/train.py on the synthetic task")
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    lines = random_errors(given.channels, tuple(given.size), given.batch)
    lines += task_errors(given.checkpoint) if given.checkpoint else []
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
