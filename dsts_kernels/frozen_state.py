"""What a frozen module's state says of itself, and the checks before anything of a state reaches a kernel.

A state is tensors alone, so that every tool can carry it: ``layers.{l}.*`` are a layer's buffers, and ``_extra_state``
holds a :class:`Description` as the bytes of a JSON text. Kernels find filters by the gates' channel lists, so a state
is read as a whole: every size and dtype is checked against the description before any of it is used.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.algorithm import ALGORITHMS
from .backends.base import FLOATS, accumulate_dtype
from .backends.packing import PACKINGS, Layout, channel_lists, filters_size, mixing_shape
from .ops._checks import describe
from .ops.mixing_conv import MIXING_KERNELS
from .ops.relevance import SCORING_KERNELS

__all__ = ["ALGORITHMS", "BUFFERS", "EXTRA", "Description", "LayerDescription", "decode", "differences", "encode"]

FORMAT = 2  # of states with a centre of scores, which older versions do not know; others are written as 1
EXTRA = "_extra_state"  # as torch names it
BUFFERS = ("scoring", "gate", "filters", "bias", "mixing")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
ROOM = 256  # bytes of the text for the module and for each layer: modules of as many layers agree in its size

REMAKE = (
    "dsts_kernels 0.1 wrote such states: make it again from its source with freeze(), or read the frozen module there, "
    "keep it with torch.save(module, path), and load that file with torch.load(path, weights_only=False)"
)


class LayerDescription(NamedTuple):
    """What a layer's buffers do not say."""

    scoring_taps: int
    score_elements: int  # outputs of a scoring kernel that a mean is taken over; 0 for sums
    mixing_kernel: tuple[int, int, int]
    relu: bool
    packing: str
    gates: int  # checksum: gates may not change without the filters that go with them
    centered: bool = False  # whether scoring has the tap of a centre

    @property
    def folds(self) -> bool:
        return self.mixing_kernel == (1, 1, 1)


class Description(NamedTuple):
    """What a frozen module is, its weights apart."""

    in_channels: int
    num_neurons: int
    dtype: torch.dtype
    skip: bool
    algorithm: str
    backend: str | None
    layers: tuple[LayerDescription, ...]

    def keys(self) -> list[str]:
        """The keys of its state."""
        own = [
            f"layers.{index}.{name}"
            for index, layer in enumerate(self.layers)
            for name in BUFFERS
            if name != "mixing" or not layer.folds
        ]
        return [*own, EXTRA]


def holds_values(tensor: Tensor) -> bool:
    """Neither on the meta device nor of a class that computes elsewhere: DTensor, a compiler's fake."""
    return not tensor.is_meta and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def fingerprint(gate: Tensor) -> int:
    """A checksum of a layer's gates; 0 where they have no values."""
    if not holds_values(gate):
        return 0
    return zlib.crc32(bytes((gate > 0.5).flatten().to("cpu", torch.uint8).tolist()))


def encode(about: Description) -> Tensor:
    """A description as a flat uint8 tensor on the CPU."""
    number = FORMAT if any(layer.centered for layer in about.layers) else 1
    fields = {"format": number, **about._asdict(), "dtype": str(about.dtype).removeprefix("torch.")}
    fields["layers"] = [layer._asdict() for layer in about.layers]
    for own in fields["layers"]:
        if not own["centered"]:
            del own["centered"]
    text = json.dumps(fields).encode().ljust(ROOM * (1 + len(about.layers)))
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def decode(extra: object) -> Description:
    """The description that :func:`encode` wrote.

    Raises:
        TypeError, ValueError: it is something else, damaged, or of a newer version.
    """
    wanted = f"{EXTRA}: got {describe(extra)}, wanted the description that FrozenDSTS.state_dict() writes"
    if not isinstance(extra, Tensor) or extra.dtype != torch.uint8 or extra.dim() != 1 or extra.is_meta:
        raise TypeError(wanted)
    try:
        fields = json.loads(bytes(extra.tolist()))
        number = fields.pop("format")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}; it is damaged") from error
    if type(number) is int and number > FORMAT:
        raise ValueError(
            f"{EXTRA}: got format {number}, wanted {FORMAT}: a newer version of dsts_kernels wrote this state; install "
            "that one, or save it again with this one"
        )
    try:
        layers = tuple(
            LayerDescription(**{**own, "mixing_kernel": tuple(own["mixing_kernel"])}) for own in fields["layers"]
        )
        about = Description(**{**fields, "dtype": DTYPES[fields["dtype"]], "layers": layers})
        sound = number in (1, FORMAT) and _sound(about)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted}; it is damaged") from error
    if not sound:
        raise ValueError(f"{wanted}; it is damaged")
    return about


def _sound(about: Description) -> bool:
    """Whether every field is of its type and among its choices."""
    taps = tuple(math.prod(kernel) for kernel in SCORING_KERNELS)
    counts = (about.in_channels, about.num_neurons, *(layer.scoring_taps for layer in about.layers))
    return (
        len(about.layers) > 0
        and all(type(count) is int and count > 0 for count in counts)
        and type(about.skip) is bool
        and about.algorithm in ALGORITHMS
        and (about.backend is None or type(about.backend) is str)
        and all(
            layer.scoring_taps in taps
            and type(layer.score_elements) is int
            and layer.score_elements >= 0
            and layer.mixing_kernel in MIXING_KERNELS
            and type(layer.relu) is bool
            and layer.packing in PACKINGS
            and type(layer.gates) is int
            and type(layer.centered) is bool
            for layer in about.layers
        )
    )


def differences(theirs: Description, ours: Description) -> list[str]:
    """What a state must share with the module that loads it, and does not, for an error."""
    differing = [
        f"{name}: got {getattr(theirs, name)!r}, wanted {getattr(ours, name)!r}"
        for name in ("in_channels", "num_neurons", "skip")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if len(theirs.layers) != len(ours.layers):
        differing.append(f"num_layers: got {len(theirs.layers)}, wanted {len(ours.layers)}")
    for index, (a, b) in enumerate(zip(theirs.layers, ours.layers, strict=False)):
        differing += [
            f"layers.{index}.{name}: got {getattr(a, name)!r}, wanted {getattr(b, name)!r}"
            for name in LayerDescription._fields
            if name not in ("packing", "gates") and getattr(a, name) != getattr(b, name)
        ]
    return differing


def read(state: Mapping[str, Any]) -> tuple[Description, list[dict[str, Tensor]]]:
    """A whole state, checked: its description, and every layer's buffers.

    Raises:
        TypeError, ValueError: it does not say what it is, something is missing, or anything does not fit the rest.
    """
    if "layers.0.spatial" in state:
        raise ValueError("state: got one of a FusedDSTS, wanted one of a frozen module: load it there, then freeze()")
    if EXTRA not in state:
        raise ValueError(f"{EXTRA}: got none, wanted the description of how this state is packed. {REMAKE}")
    about = decode(state[EXTRA])
    missing = [key for key in about.keys() if key not in state]
    if missing:
        raise ValueError(f"{missing[0]}: got none, wanted a tensor; {len(missing)} of {len(about.keys())} are missing")
    layers = []
    for index, layer in enumerate(about.layers):
        prefix = f"layers.{index}."
        tensors = {name: state.get(prefix + name) for name in BUFFERS}
        if layer.folds and tensors["mixing"] is not None:
            raise ValueError(f"{prefix}mixing: got {describe(tensors['mixing'])}, wanted none: a 1x1x1 kernel folds")
        check_layer(about, layer, tensors, prefix)
        layers.append(tensors)
    return about, layers


def check_layer(
    about: Description, layer: LayerDescription, tensors: Mapping[str, Tensor | None], prefix: str = ""
) -> None:
    """Refuse a layer's buffers where a shape, a dtype or an index does not fit the rest."""
    n, c, wide = about.num_neurons, about.in_channels, accumulate_dtype(about.dtype)
    expect = {
        "scoring": ((n, c, layer.scoring_taps + layer.centered), wide),
        "gate": ((n, c), torch.float32),
        "bias": ((n, c), wide),
    }
    if not layer.folds:
        kernel = mixing_shape(layer.packing, c, math.prod(layer.mixing_kernel), about.dtype)
        expect["mixing"] = ((n, *kernel), about.dtype)
    for name, (shape, dtype) in expect.items():
        _tensor(prefix + name, tensors[name], shape, dtype)
    gate = tensors["gate"]
    if not ((gate == 0) | (gate == 1)).all():
        raise ValueError(f"{prefix}gate: got values between 0 and 1 or beyond, wanted 0 and 1 alone")
    if fingerprint(gate) != layer.gates:
        raise ValueError(f"{prefix}gate: got other gates than the description says; the state is damaged")
    starts = channel_lists(gate > 0)[1].tolist()
    size = filters_size(starts, c, c, *Layout(layer.packing, about.dtype))
    _tensor(prefix + "filters", tensors["filters"], (size,), about.dtype)


def _tensor(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wanted = f"wanted a dense tensor of shape {shape}, {dtype}"
    if not isinstance(value, Tensor) or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        got = type(value).__name__ if isinstance(value, Tensor) else describe(value)
        raise TypeError(f"{name}: got {got}, {wanted}")
    if value.is_meta:
        raise ValueError(f"{name}: got a tensor on the meta device, which has no values, {wanted}")
    if value.layout != torch.strided or tuple(value.shape) != shape or value.dtype != dtype:
        raise ValueError(f"{name}: got {describe(value)}, {wanted}")
