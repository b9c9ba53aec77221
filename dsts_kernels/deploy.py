"""Models with frozen DSTS modules where our ops are not: :func:`standard` writes them in torch's own operators.

What it gives needs nothing of this package: ``torch.export``, AOTInductor and ONNX take it as they take any model,
and a C++ program runs it with libtorch or onnxruntime alone. :func:`to_onnx` writes an ONNX file. Where the package can
be imported, a frozen module itself is faster and exports as it is: docs/deploy.md compares the ways.

A layer is tap sums, scores and ``argmax``; a gather of the channels that the chosen neuron lists and of its weights by
row; then one matrix product for each sample, of those weights with the channels shifted to every tap. Nothing in it
depends on the batch, which any exporter may leave open: a grouped convolution, whose groups would be samples, does
not let it. Neurons whose lists are shorter than the longest are padded with zero weights.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .backends.base import accumulate_dtype
from .backends.packing import places, unpack_at, unpack_mixing
from .frozen import FrozenDSTS
from .frozen_layer import FrozenLayer, has_values, plain_tensors
from .layer import DSTSLayer
from .module_base import check_input
from .ops import _checks
from .routing import Draws, Routing

__all__ = ["StandardDSTS", "standard", "to_onnx"]

Kernel = tuple[int, int, int]
SPATIAL: Kernel = (1, 3, 3)
TEMPORAL: Kernel = (3, 1, 1)
OPSET = 18  # the oldest that torch's exporter writes


def standard(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose frozen DSTS modules consist of standard operators, with the same results.

    Args:
        model: a :class:`FrozenDSTS`, or any model in evaluation that holds one or more. It is left as it was.

    Returns:
        A :class:`StandardDSTS` for a :class:`FrozenDSTS`; for a model, a deep copy that holds them instead. They have
        the dtype and the device of their sources, and the same call.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in it is frozen, something in it is trained still (a ``FusedDSTS``, or a module in training
            mode), a frozen module has hooks, or has no weights yet.

    >>> classifier.dsts = classifier.dsts.eval().freeze()
    >>> program = torch.export.export(deploy.standard(classifier.eval()), (clips,))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {_checks.describe(model)}, wanted a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    frozen = _check(model)
    with plain_tensors():
        # What a deep copy finds in its memo it does not copy.
        return copy.deepcopy(model, {id(module): StandardDSTS(module) for module in frozen})


def _check(model: nn.Module) -> list[FrozenDSTS]:
    """The frozen modules of a model that is ready to be deployed."""
    frozen = []
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if isinstance(module, DSTSLayer):  # what a FusedDSTS consists of
            raise ValueError(f"{where}: got a DSTSLayer, whose weights train, wanted a FrozenDSTS: freeze() makes it")
        if module.training:
            raise ValueError(f"{where}: got {type(module).__name__} in training mode, wanted evaluation: model.eval()")
        if not isinstance(module, FrozenDSTS):
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{where}: got forward hooks, wanted none: what replaces the module does not run them")
        if not all(has_values(layer.gate) for layer in module.layers):
            raise ValueError(f"{where}: got a frozen module without weights, wanted one that has loaded a state")
        frozen.append(module)
    if not frozen:
        raise ValueError(
            f"model: got {type(model).__name__} without a FrozenDSTS, wanted one at least: FusedDSTS.freeze() makes it"
        )
    return frozen


class StandardDSTS(nn.Module):
    """A :class:`FrozenDSTS` in torch's own operators: made by :func:`standard`.

    The call is that of the frozen module; the output lies contiguous. It follows moves and casts as that does, and
    refuses training mode. Its weights are tables, as wide for every neuron as for the one that lists most channels.
    """

    def __init__(self, frozen: FrozenDSTS) -> None:
        super().__init__()
        self.in_channels, self.skip = frozen.in_channels, frozen.skip
        self.layers = nn.ModuleList(StandardLayer(layer) for layer in frozen.layers)
        self.train(False)

    def train(self, mode: bool = True) -> StandardDSTS:
        """Refused for ``mode=True``: nothing in it trains."""
        if mode:
            raise RuntimeError("train(mode): got True, wanted False: this is a frozen module; train its source")
        return super().train(False)

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to the same shape; ``draws`` are of training, and not used."""
        like = self.layers[0].filters
        check_input(x, self.in_channels, like)
        x = x.to(like.dtype)  # another one under autocast
        h, routings = x, []
        for index, layer in enumerate(self.layers, 1):
            h, routing = layer(h, x if self.skip and index == len(self.layers) else None)
            routings.append(routing)
        if not return_routing:
            return h
        return h, Routing(*(torch.stack(field) for field in zip(*routings, strict=True)))


class StandardLayer(nn.Module):
    """One layer. Buffers, with ``S`` and ``T`` the most channels that a neuron's operators list:

    ``scoring (N, C*taps)``, ``center (N,)`` or ``None`` and ``bias (N, O)`` in float32 (float64 in float64),
    ``gate (N, C)``, ``listed (N, S + T)`` int64, ``filters (N, O, 9*S + 3*T)`` and ``mixing (N, O, taps*O)`` or
    ``None``.
    """

    def __init__(self, layer: FrozenLayer) -> None:
        super().__init__()
        (neurons, channels), outputs = layer.gate.shape, layer.bias.shape[1]
        self.score_elements, self.relu, self.taps = layer.score_elements, layer.relu, layer.taps
        self.mixing_kernel: Kernel = tuple(layer.mixing_kernel)
        starts = layer.starts.tolist()
        pairs = places(starts, channels, outputs, layer.packing, layer.dtype)
        self.widths = [max(pair[side].channels for pair in pairs) for side in range(2)]
        listed = torch.zeros(neurons, sum(self.widths), dtype=torch.int64, device=layer.gate.device)
        size = 9 * self.widths[0] + 3 * self.widths[1]
        filters = layer.filters.new_zeros(neurons, outputs, size)
        for n, pair in enumerate(pairs):
            own, columns, rows = layer.channels[n].long(), 0, 0
            for place, taps, width in zip(pair, (9, 3), self.widths, strict=True):
                listed[n, columns : columns + place.channels] = own[: place.channels]
                panel = filters[n, :, rows : rows + taps * width].view(outputs, taps, width)
                panel[:, :, : place.channels] = unpack_at(layer.filters, place, layer.packing, outputs, taps)
                own, columns, rows = own[place.channels :], columns + width, rows + taps * width
        mixing = None
        if layer.mixing is not None:
            taps = self.mixing_kernel[0] * self.mixing_kernel[1] * self.mixing_kernel[2]
            kernels = [unpack_mixing(kernel, layer.packing, outputs, taps).flatten(1) for kernel in layer.mixing]
            mixing = torch.stack(kernels)
        for name, tensor in (
            ("scoring", layer.scoring[:, :, : layer.taps].flatten(1).clone()),
            ("center", -layer.scoring[:, 0, -1] if layer.scoring.shape[2] != layer.taps else None),
            ("bias", layer.bias.clone()),
            ("gate", layer.gate.clone()),
            ("listed", listed),
            ("filters", filters),
            ("mixing", mixing),
        ):
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandardLayer:
        """Follows a move or a cast; scores and biases stay wide, and are not rounded on the way."""
        names = [name for name in ("scoring", "center", "bias", "gate") if self._buffers[name] is not None]
        kept = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            wide = torch.float32 if name == "gate" else accumulate_dtype(self.filters.dtype)
            if self._buffers[name].dtype != wide or before.dtype != wide:
                self._buffers[name] = before.to(self.filters.device, wide)
        return self

    def forward(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to ``(B, O, T, H, W)``, plus ``skip``; all in the dtype of the filters."""
        b, _, t, h, w = x.shape
        outputs = self.bias.shape[1]
        sums = tap_sums(x.to(self.scoring.dtype), self.taps)
        scores = F.linear(sums, self.scoring)
        if self.score_elements:
            scores = scores / (self.score_elements * t * h * w)
        scores = scores if self.center is None else scores - self.center
        neuron = scores.argmax(dim=1)
        columns = []
        for panel, kernel in zip(self.panels(x, neuron), (SPATIAL, TEMPORAL), strict=True):
            columns += [] if panel is None else under_taps(panel, kernel)
        z = torch.matmul(self.filters[neuron], torch.cat(columns, 1).flatten(2))
        if self.mixing is not None:
            columns = under_taps(z.reshape(b, outputs, t, h, w), self.mixing_kernel)
            z = torch.matmul(self.mixing[neuron], torch.cat(columns, 1).flatten(2))
        z = z.to(self.bias.dtype) + self.bias[neuron][:, :, None]
        z = (F.relu(z) if self.relu else z).reshape(b, outputs, t, h, w)
        z = z if skip is None else z + skip.to(z.dtype)
        return z.to(x.dtype), Routing(neuron, scores, self.gate[neuron].to(x.dtype))

    def panels(self, x: Tensor, neuron: Tensor) -> list[Tensor | None]:
        """The channels that each sample's neuron lists for its spatial and for its temporal operator, as rows."""
        b, c, t, h, w = x.shape
        first = torch.arange(b, device=x.device)[:, None] * c
        rows, panels = x.reshape(b * c, t, h, w), []
        for listed in self.listed[neuron].split(self.widths, dim=1):
            width = listed.shape[1]
            panel = rows.index_select(0, (first + listed).reshape(-1)).reshape(b, width, t, h, w) if width else None
            panels.append(panel)
        return panels


def tap_sums(x: Tensor, taps: int) -> Tensor:
    """``(B, C, T, H, W)`` to ``(B, C*taps)``: sums over the positions that each tap of a scoring kernel meets."""
    if taps == 1:
        return x.sum((2, 3, 4))
    plane = x.sum(2)
    rows = torch.stack([plane[:, :, :-1].sum(2), plane.sum(2), plane[:, :, 1:].sum(2)], 2)  # (B, C, 3, W)
    return torch.stack([rows[..., :-1].sum(3), rows.sum(3), rows[..., 1:].sum(3)], 3).flatten(1)


def under_taps(x: Tensor, kernel: Kernel) -> list[Tensor]:
    """What each tap of a zero-padded kernel sees of ``x (B, c, T, H, W)``: as many tensors of that shape."""
    t, h, w = x.shape[2:]
    (i, j, k), (pt, ph, pw) = kernel, (size // 2 for size in kernel)
    padded = F.pad(x, (pw, pw, ph, ph, pt, pt))
    return [
        padded[:, :, dt : dt + t, dh : dh + h, dw : dw + w] for dt in range(i) for dh in range(j) for dw in range(k)
    ]


def to_onnx(
    model: nn.Module,
    args: Tensor | Sequence[Any],
    path: str | os.PathLike,
    *,
    dynamic_shapes: Sequence[Any] | None = None,
) -> None:
    """Write ``standard(model)`` as ONNX, opset 18. Needs the extra ``deploy``.

    The old file or the new one is there, never half of one. Weights beyond 1.5 GB go to ``<path>.data`` beside it,
    which is written first. It is removed where an older model left one that
    the new one does not need.

    Args:
        model: what :func:`standard` takes, in float32, float64 or float16.
        args: what it is called with, one tensor or a sequence; the values do not matter.
        path: of the file.
        dynamic_shapes: sizes that stay open, one entry an argument as ``torch.export.export`` takes them, such as
            ``[{0: "batch", 2: "frames", 3: "height", 4: "width"}]``; an open one must be 2 at least in ``args``.
            ``None``: the first of every tensor, as one ``"batch"``.

    Raises:
        ImportError: onnx and onnxscript are not installed.
        TypeError: weights or arguments in bfloat16, or a convolution outside DSTS in float64: onnxruntime runs neither
            on a CPU.
        ValueError: as :func:`standard`; ``path`` is a folder.
        Exception: what ``torch.export`` raises where the model does not take ``args`` or ``dynamic_shapes``.
    """
    try:
        import onnxscript  # noqa: F401 - torch's exporter writes with it
    except ImportError as error:
        raise ImportError("to_onnx: onnx and onnxscript are missing: pip install 'dsts_kernels[deploy]'") from error
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: got the folder {str(path)!r}, wanted the name of a file")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    model, tensors = standard(model), [a for a in args if isinstance(a, Tensor)]
    for name, tensor in [*model.state_dict(keep_vars=True).items(), *(("args", a) for a in tensors)]:
        if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16:
            raise TypeError(
                f"{name}: got torch.bfloat16, wanted float32, float64 or float16: onnxruntime runs no bfloat16 "
                "on a CPU; model.float() converts a model and its frozen modules"
            )
    for name, part in model.named_modules():
        if isinstance(part, _ConvNd) and part.weight.dtype == torch.float64:
            raise TypeError(
                f"{name}.weight: got torch.float64, wanted float32 or float16: onnxruntime runs no convolution in "
                "float64 on a CPU; model.float() converts a model and its frozen modules"
            )
    if dynamic_shapes is None:
        args = tuple(torch.cat([a, a]) if isinstance(a, Tensor) and a.shape[0] == 1 else a for a in args)
        dynamic_shapes = [{0: "batch"} if isinstance(a, Tensor) else None for a in args]
    with torch.no_grad():
        program = torch.onnx.export(
            model, args, dynamo=True, opset_version=OPSET, dynamic_shapes=tuple(dynamic_shapes), verbose=False
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:
        program.save(Path(beside, path.name))
        names = sorted(os.listdir(beside), key=path.name.__eq__)  # weights first
        for name in names:
            os.replace(Path(beside, name), path.parent / name)
    if (data := f"{path.name}.data") not in names:
        (path.parent / data).unlink(missing_ok=True)
