"""The DSTS module's training step as a good engineer writes it in plain PyTorch for a GPU.

Features stay ``(B, T, H, W, C)`` between layers, so that both operators are 2-d convolutions of channels-last images
(frames for the spatial one, strips of ``T x HW`` for the temporal one), forward and backward, and mixing is a matrix
product. BatchNorm sees a 4-d view, which is what torch has fast kernels for. Every element of a gradient is written
once: zeros only where nothing else goes.

Which samples run together cannot be known to be best, so :data:`GROUPINGS` are measured. The first two ask the host who
chose which neuron. ``by sample`` does not: it picks weights on the device, spreads samples over streams, and can be
captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsts_kernels.bench.handwritten import collapsed_scores, require_paper_configuration
from dsts_kernels.reference import DSTS, DSTSLayer, Routing, gate_values, score_dtype

__all__ = ["BY_SAMPLE", "GROUPINGS", "MULTIPLE", "SPATIAL", "TEMPORAL", "GpuTrain", "pick", "side_by_side"]

MULTIPLE = 64  # of channels: cuDNN's half-precision kernels want 8 at least, and few distinct shapes
BY_SAMPLE = "by sample"
GROUPINGS = ("lists a sample", "dense a neuron", BY_SAMPLE)
STREAMS = 4

T = TypeVar("T")


def images(h: Tensor) -> Tensor:
    """``(B, T, H, W, C)`` as channels-last images ``(B*T, C, H, W)``."""
    return h.flatten(0, 1).permute(0, 3, 1, 2)


def strips(h: Tensor) -> Tensor:
    """``(B, T, H, W, C)`` as channels-last images ``(B, C, T, H*W)``: the temporal operator is a 3x1 convolution."""
    return h.flatten(2, 3).permute(0, 3, 1, 2)


def from_images(y: Tensor, like: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).unflatten(0, like.shape[:2]).contiguous()


def from_strips(y: Tensor, like: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).unflatten(2, like.shape[2:4]).contiguous()


class Side(NamedTuple):
    """One of the two operators: how features become its images, and back."""

    view: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    padding: tuple[int, int]

    def forward(self, h: Tensor, weight: Tensor) -> Tensor:
        return self.back(F.conv2d(self.view(h), weight, padding=self.padding), h)

    def backward(
        self, grad: Tensor, h: Tensor, weight: Tensor, need_h: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``h`` and of ``weight``. ``torch.nn.grad`` would hand cuDNN an input of stride 0 for the first
        and so ask for channels-first kernels."""
        d_h, d_weight, _ = torch.ops.aten.convolution_backward(
            self.view(grad), self.view(h), weight, None, (1, 1), self.padding, (1, 1), False, (0, 0), 1,
            (need_h, need_weight, False),
        )  # fmt: skip
        return (self.back(d_h, h) if need_h else None), d_weight


SPATIAL, TEMPORAL = Side(images, from_images, (1, 1)), Side(strips, from_strips, (1, 0))
SIDES = (SPATIAL, TEMPORAL)


class Unit(NamedTuple):
    """Samples that run together on one neuron's weights; ``lists`` of a hard sample, ``None``: all channels."""

    neuron: int
    samples: Tensor | slice  # a slice of one sample, whose features are not copied
    lists: tuple[Tensor, Tensor] | None


def units_of(gate: Tensor, neuron: Tensor, grouping: str) -> list[Unit]:
    """Who runs together, by the host: each hard sample on its lists beside soft ones by neuron, or all by neuron."""
    chosen = neuron.tolist()
    listed = grouping == GROUPINGS[0]
    hard = ((gate == 0) | (gate == 1)).all(1).tolist() if listed else [False] * len(chosen)
    units, together = [], {}
    for b, i in enumerate(chosen):
        if hard[b]:
            units.append(Unit(i, slice(b, b + 1), lists_of(gate[b])))
        else:
            together.setdefault(i, []).append(b)
    for i, samples in together.items():
        rows = torch.tensor(samples, device=gate.device) if len(samples) > 1 else slice(samples[0], samples[0] + 1)
        units.append(Unit(i, rows, None))
    return units


def lists_of(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Channels of either operator."""
    return gate.nonzero()[:, 0], (gate == 0).nonzero()[:, 0]


def extended(channels: Tensor) -> Tensor:
    """A list of whole :data:`MULTIPLE`, by its first channel again."""
    extra = -channels.numel() % MULTIPLE
    return torch.cat([channels, channels[:1].expand(extra)]) if channels.numel() and extra else channels


def panel_of(h: Tensor, channels: Tensor) -> Tensor:
    """``h (..., C)`` of these channels, in whole :data:`MULTIPLE`; beyond the list there are zeros."""
    panel = h.index_select(-1, extended(channels))
    panel[..., channels.numel() :] = 0
    return panel


def split_features(h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """What both operators see of ``h (B, T, H, W, C)`` under gates ``(B, C)``."""
    spatial = h * gate[:, None, None, None, :]
    return spatial, h - spatial


def operate(h: Tensor, gate: Tensor, weights: Sequence[Tensor], lists: tuple[Tensor, Tensor] | None) -> Tensor:
    """Both operators on a unit's features, ``(b, T, H, W, O)``; ``weights``: ``(O, C, 3, 3)`` and ``(O, C, 3, 1)``."""
    if lists is None:
        first, second = (s.forward(x, w) for s, x, w in zip(SIDES, split_features(h, gate), weights, strict=True))
        return first.add_(second)
    parts = [  # an operator without channels is left out
        side.forward(panel_of(h, channels), weight.index_select(1, extended(channels)))
        for side, channels, weight in zip(SIDES, lists, weights, strict=True)
        if channels.numel()
    ]
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def operate_backward(
    d_z: Tensor, h: Tensor, gate: Tensor, weights: Sequence[Tensor], lists: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gradients of a unit's features and gates, and of both weights: of the listed channels where there are lists.

    A gate's gradient needs both operators' data gradients on every channel, so these run on all of them.
    """
    inputs = split_features(h, gate) if lists is None else (h, h)
    found = [
        side.backward(d_z, x, weight, True, lists is None)
        for side, x, weight in zip(SIDES, inputs, weights, strict=True)
    ]
    (d_spatial, first), (d_temporal, second) = found
    d_weights = [first, second]
    if lists is not None:
        d_weights = [listed_gradient(*args, d_z, h) for args in zip(SIDES, lists, weights, strict=True)]
    difference = d_spatial.sub_(d_temporal)
    d_gate = (h * difference).sum((1, 2, 3))
    return d_temporal.addcmul_(gate[:, None, None, None, :], difference), d_gate, d_weights


def listed_gradient(side: Side, channels: Tensor, weight: Tensor, d_z: Tensor, h: Tensor) -> Tensor | None:
    """Of a weight's listed channels ``(O, C', ...)``."""
    if not channels.numel():
        return None
    panel = panel_of(h, channels)
    d_weight = side.backward(d_z, panel, weight.index_select(1, extended(channels)), False, True)[1]
    return d_weight[:, : channels.numel()]


class Gradient:
    """A stacked gradient ``(N, O, C, ...)`` of which every element is written once, or added to."""

    def __init__(self, like: Tensor) -> None:
        self.total, self.written = torch.empty(like.shape, dtype=like.dtype, device=like.device), set()

    def add(self, neuron: int, part: Tensor | None, channels: Tensor | None, rest: Tensor | None) -> None:
        """A unit's share; ``channels`` are those that it lists, ``rest`` those that it does not."""
        row, first = self.total[neuron], neuron not in self.written
        self.written.add(neuron)
        if channels is None:
            row.copy_(part) if first else row.add_(part)
            return
        if first:
            row.index_fill_(1, rest, 0)
        if part is not None:
            row.index_copy_(1, channels, part) if first else row.index_add_(1, channels, part)

    def finished(self) -> Tensor:
        """With zeros for the neurons that nobody chose."""
        for neuron in range(len(self.total)):
            if neuron not in self.written:
                self.total[neuron].zero_()
        return self.total


_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def side_by_side(tasks: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Results of tasks that do not depend on each other. On a GPU they take turns on a few streams: one sample's
    convolution is too small for the chip."""
    if device.type != "cuda":
        return [task() for task in tasks]
    if device not in _streams:
        _streams[device] = [torch.cuda.Stream(device) for _ in range(STREAMS)]
    main, streams, results = torch.cuda.current_stream(device), _streams[device], []
    for stream in streams[: len(tasks)]:
        stream.wait_stream(main)
    for index, task in enumerate(tasks):
        with torch.cuda.stream(streams[index % STREAMS]):
            results.append(task())
    for stream in streams[: len(tasks)]:
        main.wait_stream(stream)
    return results


def pick(stack: Tensor, neuron: Tensor) -> Tensor:
    """``stack (N, ...)`` of the one neuron ``(1,)`` that the device knows: a copy."""
    return stack.index_select(0, neuron)[0]


class GroupedOperators(torch.autograd.Function):
    """``z' (B, T, H, W, O)`` of ``h (B, T, H, W, C)``, samples grouped by the host."""

    @staticmethod
    def forward(ctx, h, gate, neuron, spatial, temporal, mixing, grouping):
        units, mixed = units_of(gate, neuron, grouping), []
        out = h.new_empty(*h.shape[:4], mixing.shape[1])
        for unit in units:
            i, rows = unit.neuron, unit.samples
            weights = spatial[i, :, :, 0], temporal[i, ..., 0]
            mixed.append(operate(h[rows], gate[rows], weights, unit.lists))
            out[rows] = mixed[-1] @ mixing[i].flatten(1).t()
        ctx.units, ctx.mixed = units, mixed
        ctx.save_for_backward(h, gate, spatial, temporal, mixing)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, gate, spatial, temporal, mixing = ctx.saved_tensors
        grad = grad.contiguous()
        d_h, d_gate = torch.empty_like(h), torch.empty_like(gate)
        stacks = [Gradient(w) for w in (spatial[:, :, :, 0], temporal[..., 0], mixing.flatten(2))]
        for unit, z in zip(ctx.units, ctx.mixed, strict=True):
            i, rows = unit.neuron, unit.samples
            d_out = grad[rows]
            stacks[2].add(i, d_out.flatten(0, 3).t() @ z.flatten(0, 3), None, None)
            d_z = d_out @ mixing[i].flatten(1)
            weights = spatial[i, :, :, 0], temporal[i, ..., 0]
            d_h[rows], d_gate[rows], parts = operate_backward(d_z, h[rows], gate[rows], weights, unit.lists)
            for side in range(2):
                lists = (None, None) if unit.lists is None else (unit.lists[side], unit.lists[1 - side])
                stacks[side].add(i, parts[side], *lists)
        weights = (s.finished().view(w.shape) for s, w in zip(stacks, (spatial, temporal, mixing), strict=True))
        return d_h, d_gate, None, *weights, None


class PickedOperators(torch.autograd.Function):
    """The same without the host: sample by sample, on weights that the device picks."""

    @staticmethod
    def forward(ctx, h, gate, neuron, spatial, temporal, mixing):
        def task(b: int) -> tuple[Tensor, Tensor]:
            n, rows = neuron[b : b + 1], slice(b, b + 1)
            weights = pick(spatial[:, :, :, 0], n), pick(temporal[..., 0], n)
            z = operate(h[rows], gate[rows], weights, None)
            return z, z @ pick(mixing.flatten(2), n).t()

        found = side_by_side([lambda b=b: task(b) for b in range(len(h))], h.device)
        ctx.mixed = [z for z, _ in found]
        ctx.save_for_backward(h, gate, neuron, spatial, temporal, mixing)
        return torch.cat([out for _, out in found])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, gate, neuron, spatial, temporal, mixing = ctx.saved_tensors
        grad, d_h, d_gate = grad.contiguous(), torch.empty_like(h), torch.empty_like(gate)
        stacks = (spatial[:, :, :, 0], temporal[..., 0], mixing.flatten(2))
        by_sample = [w.new_empty(len(h), *w.shape[1:]) for w in stacks]

        def task(b: int) -> None:
            n, rows, z = neuron[b : b + 1], slice(b, b + 1), ctx.mixed[b]
            torch.mm(grad[b].flatten(0, 2).t(), z.flatten(0, 3), out=by_sample[2][b])
            d_z = grad[rows] @ pick(stacks[2], n)
            weights = pick(stacks[0], n), pick(stacks[1], n)
            d_h[rows], d_gate[rows], parts = operate_backward(d_z, h[rows], gate[rows], weights, None)
            for part, whole in zip(parts, by_sample, strict=False):
                whole[b].copy_(part)

        side_by_side([lambda b=b: task(b) for b in range(len(h))], h.device)
        # One product adds samples up by neuron, and writes the zeros of those that nobody chose.
        members = (neuron[None] == torch.arange(len(mixing), device=h.device)[:, None]).to(mixing.dtype)  # (N, B)
        weights = (members @ part.flatten(1) for part in by_sample)
        weights = (d.view(w.shape) for d, w in zip(weights, (spatial, temporal, mixing), strict=True))
        return d_h, d_gate, None, *weights


class Weighed(torch.autograd.Function):
    """``z (B, ...)`` as it is, with the gradient of ``z * w`` by ``w (B,)``, whose value is 1."""

    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(z)
        ctx.dtype = w.dtype
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        products = torch.bmm(grad.reshape(len(z), 1, -1), z.reshape(len(z), -1, 1))
        return grad, products.flatten().to(ctx.dtype)


def normalised(norm: nn.BatchNorm3d, z: Tensor) -> Tensor:
    """``z (B, T, H, W, O)`` through BatchNorm, by torch's kernels for channels-last images."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    y = F.batch_norm(
        strips(z), norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )
    return from_strips(y, z)


class GpuLayer(DSTSLayer):
    """A reference layer on ``(B, C, T, H, W)`` that lies channels-last."""

    grouping = GROUPINGS[1]

    def scores(self, x: Tensor) -> Tensor:
        wide = score_dtype(self.scoring.dtype)
        scoring = self.scoring.flatten(2).sum(1, dtype=wide)
        return collapsed_scores(x.sum((2, 3, 4), dtype=wide), self, scoring, x[0, 0].numel())

    def forward(self, x, draws=None, return_routing=False):
        noise, hard, gumbel = draws if self.training else (None, None, None)
        v = self.scores(x)
        noisy = v + gumbel if self.training else v
        neuron = noisy.argmax(1)
        gate = gate_values(self.gate[neuron], noise, hard)
        h = x.permute(0, 2, 3, 4, 1).contiguous()
        arguments = h, gate, neuron, self.spatial, self.temporal, self.mixing
        if self.grouping == BY_SAMPLE:
            z = PickedOperators.apply(*arguments)
        else:
            z = GroupedOperators.apply(*arguments, self.grouping)
        if self.training:
            z = Weighed.apply(z, torch.softmax(noisy / self.gumbel_tau, 1).gather(1, neuron[:, None])[:, 0])
        z = z if self.norm is None else normalised(self.norm, z)
        y = (F.relu(z) if self.activation == "relu" else z).permute(0, 4, 1, 2, 3)
        return (y, Routing(neuron, v, gate)) if return_routing else y


class GpuTrain(DSTS):
    """Training on the reference's parameters (same ``state_dict``); also runs in evaluation, on live parameters."""

    def __init__(self, in_channels: int, *, num_layers: int = 3, num_neurons: int = 10, **options) -> None:
        super().__init__(in_channels, num_layers=0, num_neurons=num_neurons)
        self.layers = nn.ModuleList(
            GpuLayer(in_channels, num_neurons=num_neurons, **options) for _ in range(num_layers)
        )
        for layer in self.layers:
            require_paper_configuration(layer)

    def group(self, grouping: str) -> GpuTrain:
        """How samples run together from now on: one of :data:`GROUPINGS`."""
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping: got {grouping!r}, wanted one of {', '.join(GROUPINGS)}")
        for layer in self.layers:
            layer.grouping = grouping
        return self
