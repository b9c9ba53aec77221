"""From a trained module to frozen layers: read its weights, refuse what cannot be folded, fold, pack (docs/design.md).

Everything is read once, as a forward pass in evaluation would see it: parametrizations are computed, and so are the
weights that pruning and the older weight and spectral norms set in a hook. Folding is done in float64 and rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import ops
from .backends.base import accumulate_dtype, with_center
from .backends.packing import channel_lists, pack, pack_mixing
from .frozen_state import LayerDescription, fingerprint
from .layer import DSTSLayer
from .ops import _checks
from .ops.mixing_conv import MIXING_KERNELS
from .ops.relevance import SCORING_KERNELS

NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)
# Hooks that change no output: our own monitors count, FSDP's gather what must have been gathered by now.
HARMLESS = (f"{__package__}.", "torch.distributed.")
RECOMPUTE = "torch.nn.utils."  # pruning, weight and spectral norm: such a hook sets the weight that forward reads


class Source(NamedTuple):
    """A layer as it is in evaluation."""

    layer: DSTSLayer
    scoring: Tensor  # (N, K, C, *scoring_kernel)
    gate: Tensor  # (N, C)
    spatial: Tensor  # (N, O, C, 1, 3, 3)
    temporal: Tensor  # (N, O, C, 3, 1, 1)
    mixing: Tensor  # (N, O, O, *mixing_kernel)
    scale: Tensor  # (O,) float64: the norm is scale*z + shift
    shift: Tensor
    center: Tensor | None = None  # (N,) of scores


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """A block in which ``module`` is in evaluation, whatever each of its modules was in."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for m, training in modes:
            m.training = training


def read_source(module: nn.Module) -> list[Source]:
    """Every layer's weights, checked; the module is left as it was.

    Raises:
        TypeError, ValueError: a layer that is no :class:`DSTSLayer`, a norm that does not fold, hooks, weights without
            values or spread over processes, layers of different sizes, dtypes or devices.
    """
    with evaluation(module):
        sources = [_read_layer(layer, f"layers.{index}") for index, layer in enumerate(module.layers)]
    if not sources:
        raise ValueError("layers: got none, wanted at least 1")
    first = sources[0]
    n, c = first.gate.shape
    for index, source in enumerate(sources):
        for name in ("gate", "spatial", "temporal", "mixing"):
            value, where = getattr(source, name), f"layers.{index}.{name}"
            if value.dtype != first.gate.dtype:
                raise TypeError(f"{where}: got {value.dtype}, wanted {first.gate.dtype}, which layers.0.gate has")
        for name in ("scoring", "gate", "spatial", "temporal", "mixing", "scale"):
            where = f"layers.{index}.{'norm' if name == 'scale' else name}"
            _checks.same_device(where, getattr(source, name), first.gate.device)
        if source.spatial.shape[:3] != (n, c, c):
            got = ", ".join(f"{size} {what}" for size, what in zip(source.spatial.shape[:3], SIZES, strict=True))
            raise ValueError(f"layers.{index}: got {got}, wanted {n} neurons, {c} channels in and out, as layers.0 has")
    return sources


SIZES = ("neurons", "channels out", "channels in")


def _read_layer(layer: nn.Module, where: str) -> Source:
    layer = getattr(layer, "_orig_mod", layer)  # torch.compile wraps a layer in a module of its own
    if not isinstance(layer, DSTSLayer) or getattr(layer.forward, "__func__", None) is not DSTSLayer.forward:
        raise TypeError(f"{where}: got {type(layer).__name__}, wanted DSTSLayer, whose forward pass is what is folded")
    _run_hooks(layer, where)
    gate = _weight(f"{where}.gate", layer.gate, 2)
    weights = {name: _weight(f"{where}.{name}", getattr(layer, name), 6) for name in SHAPED}
    (n, c), o = gate.shape, weights["spatial"].shape[1]
    for name, value in weights.items():
        lead, kernels = SHAPED[name]
        sizes = tuple({"N": n, "O": o, "C": c, "K": value.shape[1]}[size] for size in lead)
        if 0 in value.shape or tuple(value.shape) not in [(*sizes, *kernel) for kernel in kernels]:
            wanted = " or ".join(str((*sizes, *kernel)) for kernel in kernels)
            raise ValueError(f"{where}.{name}: got {_checks.describe(value)}, wanted {wanted}")
    center = None if layer.subtracted is None else _weight(f"{where}.center", layer.subtracted, 1)
    if center is not None and center.shape != (n,):
        raise ValueError(f"{where}.center: got {_checks.describe(center)}, wanted shape {(n,)}")
    return Source(layer, gate=gate, **weights, **_norm(layer.norm, f"{where}.norm", o, gate.device), center=center)


SHAPED = {
    "scoring": ("NKC", SCORING_KERNELS),
    "spatial": ("NOC", ((1, 3, 3),)),
    "temporal": ("NOC", ((3, 1, 1),)),
    "mixing": ("NOO", MIXING_KERNELS),
}


def _run_hooks(module: nn.Module, where: str) -> None:
    """Have hooks that compute weights do so; refuse the others: a frozen module has nowhere to run them."""
    before = list(module._forward_pre_hooks.values())
    for hook in (*before, *module._forward_hooks.values()):
        origin = str(getattr(hook, "__module__", ""))
        if origin.startswith(RECOMPUTE) and hook in before:
            hook(module, None)
        elif not origin.startswith(HARMLESS):
            raise ValueError(
                f"{where}: got a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)}), wanted none: a "
                "frozen module cannot run it; take it off with its handle's remove(), then freeze"
            )


def _weight(name: str, value: object, dims: int) -> Tensor:
    """A plain dense tensor with values; what a user's own class of tensor holds, without the class."""
    if is_lazy(value):
        raise ValueError(f"{name}: got {type(value).__name__}, wanted a tensor: run a forward pass first")
    if isinstance(value, Tensor) and type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name}: got a {type(value).__name__}, wanted a plain tensor: freeze a module that holds whole weights "
            "(under FSDP call unshard() first, or load the full state into a FusedDSTS of one process)"
        )
    value = _checks.floating(name, value, dims)
    if value.is_meta:
        raise ValueError(
            f"{name}: got a tensor on the meta device, which has no values, wanted weights: bring the module to a "
            "device with to_empty(device=...), load its state, then freeze"
        )
    return value.detach().as_subclass(Tensor)


def _norm(norm: nn.Module | None, where: str, outputs: int, device: torch.device) -> dict[str, Tensor]:
    """BatchNorm at inference as ``scale*z + shift``: two ``(O,)`` in float64."""
    if norm is None:
        scale = torch.ones(outputs, dtype=torch.float64, device=device)
        return {"scale": scale, "shift": torch.zeros_like(scale)}
    if not isinstance(norm, NORMS) or getattr(norm.forward, "__func__", None) not in [kind.forward for kind in NORMS]:
        raise TypeError(
            f"{where}: got {type(norm).__name__}, wanted BatchNorm3d, SyncBatchNorm or None: only these are affine at "
            "inference and fold into the convolutions; use the module as it is, or train it with such a norm"
        )
    _run_hooks(norm, where)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{where}: got a BatchNorm without running statistics, wanted one that tracks them")
    statistics = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = getattr(norm, name)
        if value is None and name in ("weight", "bias"):
            continue
        statistics[name] = _weight(f"{where}.{name}", value, 1).double()
        if statistics[name].shape != (outputs,):
            raise ValueError(f"{where}.{name}: got {_checks.describe(value)}, wanted shape {(outputs,)}")
    scale = (statistics["running_var"] + norm.eps).rsqrt()
    scale = scale * statistics["weight"] if "weight" in statistics else scale
    shift = -statistics["running_mean"] * scale
    return {"scale": scale, "shift": shift + statistics["bias"] if "bias" in statistics else shift}


def freeze_layer(source: Source, dtype: torch.dtype, packing: str) -> tuple[LayerDescription, dict[str, Tensor | None]]:
    """A layer folded and packed: what it is, and its buffers."""
    layer, wide = source.layer, accumulate_dtype(dtype)
    hard = source.gate > 0
    channels, starts = channel_lists(hard)
    gate = hard.to(torch.float32)
    about = LayerDescription(
        scoring_taps=source.scoring[0, 0, 0].numel(),
        score_elements=source.scoring.shape[1] if layer.score_reduction == "mean" else 0,
        mixing_kernel=tuple(source.mixing.shape[3:]),
        relu=layer.activation == "relu",
        packing=packing,
        gates=fingerprint(gate),
        centered=source.center is not None,
    )
    scoring = ops.collapse_scoring(source.scoring).to(wide)
    packed = [
        pack(panel.to(dtype), packing)
        for n in range(len(hard))
        for panel in _panels(source, n, channels[n].long(), int(starts[n + 1] - starts[n]), about.folds)
    ]
    mixing = None
    if not about.folds:
        scaled = source.mixing.double() * source.scale[None, :, None, None, None, None]
        panels = scaled.flatten(3).transpose(2, 3).to(dtype).contiguous()
        mixing = torch.stack([pack_mixing(panel, packing) for panel in panels])
    return about, {
        "scoring": scoring if source.center is None else with_center(scoring, source.center),
        "gate": gate,
        "filters": torch.cat(packed),
        "bias": source.shift.to(wide).expand(len(hard), -1),
        "mixing": mixing,
    }


def _panels(source: Source, n: int, channels: Tensor, split: int, folds: bool) -> Iterator[Tensor]:
    """Neuron ``n``'s two panels ``(O, taps, c)`` in float64; folded with mixing and norm where they fold."""
    fold = source.mixing[n].flatten(1).double() * source.scale[:, None] if folds else None
    for weight, own in ((source.spatial, channels[:split]), (source.temporal, channels[split:])):
        panel = weight[n].index_select(1, own).flatten(2).transpose(1, 2).double()  # (O, taps, c)
        yield panel if fold is None else (fold @ panel.flatten(1)).view(panel.shape)
