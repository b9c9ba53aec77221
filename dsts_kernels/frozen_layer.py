"""``FrozenLayer``: the packed weights of one layer, how they move, and what keeps wrong addresses from kernels.

Every buffer is dense. Kernels read channel lists as addresses, so these are no buffers, which any tool may write to or
average (rounding integers down): they are made from the gates, and again whenever somebody wrote to those.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .backends.base import FrozenOptions, FrozenWeights, accumulate_dtype, taps_of
from .backends.packing import Layout, channel_lists, filters_size, mixing_shape, repack_filters, repack_mixing
from .frozen_state import BUFFERS, LayerDescription, fingerprint, holds_values
from .ops import _checks

# An average that a tool takes of gates that are the same, in float32, strays by less than this; of others by more.
ROUNDING = 0.01
DTYPE = operator.attrgetter("dtype")


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """A block that makes tensors with a version counter and without gradients, whatever the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read memory: no strides, no lazy sign, no gradient, no class of a user's."""
    if tensor is None:
        return None
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.as_subclass(Tensor) if type(tensor) is not Tensor and holds_values(tensor) else tensor
    return tensor.resolve_conj().resolve_neg().contiguous()


def has_values(gate: Tensor) -> bool:
    """Gates with values, and not those that :meth:`FrozenLayer.moved` gives a module from the meta device."""
    return holds_values(gate) and not bool(gate.isnan().any())


def relaid(tensors: Mapping[str, Tensor | None], taps: int, old: Layout, new: Layout) -> dict[str, Tensor | None]:
    """A layer's buffers for another packing or dtype, dense: scores and biases stay wide. ``taps`` are its mixing's."""
    buffers = {name: dense(tensors[name]) for name in BUFFERS}
    for name in ("scoring", "bias"):
        buffers[name] = buffers[name].to(accumulate_dtype(new.dtype))
    if old != new and has_values(buffers["gate"]):
        channels, starts = buffers["gate"].shape[1], channel_lists(buffers["gate"] > 0.5)[1]
        outputs = buffers["bias"].shape[1]
        buffers["filters"] = repack_filters(buffers["filters"], starts.tolist(), channels, outputs, old, new)
        if buffers["mixing"] is not None:
            buffers["mixing"] = repack_mixing(buffers["mixing"], outputs, taps, old, new)
    for name in ("filters", "mixing"):
        buffers[name] = None if buffers[name] is None else buffers[name].to(new.dtype)
    return buffers


class FrozenLayer(nn.Module):
    """The packed weights of one layer: see :class:`~dsts_kernels.backends.base.FrozenWeights`.

    Buffers: ``scoring (N, C, taps)`` (with a centre one tap more) and ``bias (N, O)`` in float32 (float64 in float64),
    ``gate (N, C)`` float32 of 0 and 1, ``filters`` flat and ``mixing (N, packed)`` (or ``None``) in the module's dtype.
    Beside them ``channels`` and ``starts``, which follow from the gates.
    """

    channels: Tensor
    starts: Tensor
    prepared: tuple[object, object] | None = None  # see backends.base.FrozenSource

    def __init__(self, about: LayerDescription, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> None:
        super().__init__()
        self.score_elements, self.relu = about.score_elements, about.relu
        self.mixing_kernel = list(about.mixing_kernel)
        for name in BUFFERS:
            self.register_buffer(name, None)
        self.put(tensors, Layout(about.packing, dtype))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what only this process can read."""
        return {name: value for name, value in super().__getstate__().items() if name != "prepared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, version 0.1's too, which had bool gates, lists among its buffers, and strides."""
        super().__setstate__(state)
        with plain_tensors():
            tensors = {name: dense(self._buffers.get(name)) for name in BUFFERS}
            tensors["gate"] = tensors["gate"].to(torch.float32)
            for name in ("channels", "starts"):
                self._buffers.pop(name, None)
            self.put(tensors, Layout(self.packing, self.__dict__.get("dtype", tensors["filters"].dtype)))

    @property
    def layout(self) -> Layout:
        return Layout(self.packing, self.dtype)

    def describe(self) -> LayerDescription:
        kernel, gates = tuple(self.mixing_kernel), fingerprint(self.gate)
        centered = self.scoring.shape[2] != self.taps
        return LayerDescription(self.taps, self.score_elements, kernel, self.relu, self.packing, gates, centered)

    def put(self, tensors: Mapping[str, Tensor | None], layout: Layout) -> None:
        """Take these buffers as they are."""
        for name in BUFFERS:
            self._buffers[name] = tensors[name]
        self.packing, self.dtype = layout
        self.prepared = None
        self.num_neurons, self.taps = len(self.scoring), taps_of(self.scoring)
        self.channels, self.starts = channel_lists(self.gate > 0.5)
        self._stamp = self._now() if has_values(self.gate) and self._unsound() is None else None

    def fits(self, tensors: Mapping[str, Tensor | None], layout: Layout) -> bool:
        """Whether :meth:`write` can take these buffers: where all but values is the same, gates included."""

        def same(now: Tensor | None, new: Tensor | None) -> bool:
            if now is None or new is None:
                return now is new
            sizes = (now.shape, now.dtype, now.device) == (new.shape, new.dtype, new.device)
            return sizes and now.is_contiguous() and not now.is_inference()

        return (
            self.layout == layout
            and self._stamp == self._now()
            and all(same(self._buffers[name], tensors[name]) for name in BUFFERS)
            and torch.equal(self.gate > 0.5, tensors["gate"] > 0.5)
        )

    def write(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Take the values of these buffers in place, where CUDA graphs and other processes look for them."""
        for name, now in self._buffers.items():
            if now is not None:
                now.copy_(tensors[name])
        self._stamp = self._now()

    def _now(self) -> tuple:
        """Changes when somebody writes to the gates, or puts other buffers, or other memory, in place."""
        tensors = [t for t in self._buffers.values() if t is not None]
        try:
            version = self._buffers["gate"]._version
        except RuntimeError:  # put in place in inference mode, past every way we know
            version = 0
        return version, *map(Tensor.data_ptr, tensors), *map(DTYPE, tensors), *map(id, tensors)

    def _unsound(self) -> str | None:
        """Why kernels must not see these buffers; ``None`` where they may."""
        hard = (self.gate > 0.5).to(torch.float32)
        if not (self.gate - hard).abs().max() <= ROUNDING:
            return (
                "gate: got values other than 0 and 1: the frozen module has no weights yet, or was averaged with one "
                "of other gates"
            )
        wide, outputs, channels = accumulate_dtype(self.dtype), self.bias.shape[1], self.gate.shape[1]
        size = filters_size(channel_lists(hard > 0)[1].tolist(), channels, outputs, *self.layout)
        mixing = mixing_shape(self.packing, outputs, math.prod(self.mixing_kernel), self.dtype)
        for name, shape, dtype in (
            ("filters", (size,), self.dtype),
            ("scoring", (*self.gate.shape, self.scoring.shape[2]), wide),
            ("bias", (len(hard), outputs), wide),
            ("mixing", (len(hard), *mixing), self.dtype),
        ):
            value = self._buffers[name]
            if value is not None and (value.shape != shape or value.dtype != dtype):
                return (
                    f"{name}: got {_checks.describe(value)}, wanted shape {shape}, {dtype}: a frozen module's buffers "
                    "were written to or cast one by one"
                )
        return None

    def _settle(self) -> None:
        """Bring the lists up to date with gates that somebody wrote to; an error where they no longer fit."""
        if not holds_values(self.gate):
            return
        with plain_tensors():
            reason = self._unsound()
            if reason is not None:
                raise RuntimeError(f"{reason}; load_state_dict() the state of a frozen module")
            hard = self.gate > 0.5
            if self.gate.is_inference():
                self._buffers["gate"] = hard.to(torch.float32)
            elif not torch.equal(self.gate, hard.to(torch.float32)):
                self.gate.copy_(hard)
            channels, starts = channel_lists(hard)
            if channels.device == self.channels.device and channels.shape == self.channels.shape:
                self.channels.copy_(channels)
                self.starts.copy_(starts)
            else:
                self.channels, self.starts = channels, starts
        self._stamp = self._now()

    def moved(self, fn: Callable[[Tensor], Tensor], new: Layout) -> dict[str, Tensor | None]:
        """The buffers as ``fn`` of :meth:`torch.nn.Module._apply` leaves them: it says where, ``new`` says which dtype.

        Gates keep their values whatever ``fn`` does (``to_empty`` gives garbage); coming from the meta device, where
        they have none, they are NaN until a state is loaded.
        """
        buffers = {}
        for name, before in self._buffers.items():
            if before is None:
                buffers[name] = None
                continue
            # Memory formats are for features, and torch tells those by having 4 or 5 dimensions.
            after = fn(before) if before.dim() < 4 else fn(before.flatten(1)).view(before.shape)
            if after.dtype != before.dtype:
                after = before.to(after.device)
            if name == "gate" and after is not before and not after.is_meta:
                after = after.fill_(math.nan) if before.is_meta else before.to(after.device)
            buffers[name] = after
        return relaid(buffers, math.prod(self.mixing_kernel), self.layout, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLayer:
        """Moves to another device; by itself, a layer keeps its dtype and packing: its module changes them."""
        with plain_tensors():
            self.put(self.moved(fn, self.layout), self.layout)
        return self

    def repack(self, packing: str) -> None:
        """Lays filters out for another device's kernels, bit for bit the same."""
        if packing != self.packing:
            with plain_tensors():
                new = Layout(packing, self.dtype)
                self.put(relaid(self._buffers, math.prod(self.mixing_kernel), self.layout, new), new)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._now() != self._stamp and has_values(self.gate):
            self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Nothing is left to do where the module that holds the layer has loaded it."""
        if any(key.startswith(prefix) for key in state_dict):
            error_msgs.append(
                f"{prefix or 'state_dict'}: got the state of one frozen layer, wanted a FrozenDSTS's: only a whole "
                "state says how it is packed"
            )

    def settled(self) -> object:
        """The stamp of the buffers as they are now, which kernels may see."""
        if self._now() != self._stamp:
            self._settle()
        return self._stamp

    def weights(self) -> FrozenWeights:
        """What kernels read, every index of it in range."""
        own = self._buffers
        if not torch.compiler.is_compiling():
            self.settled()
        return FrozenWeights(own["scoring"], self.channels, self.starts, own["filters"], own["bias"], own["mixing"])

    def options(self, next_taps: int) -> FrozenOptions:
        return FrozenOptions(self.score_elements, self.mixing_kernel, self.relu, self.packing, next_taps)
