"""``FrozenDSTS``: a trained module folded, packed and made ready for inference (docs/design.md, 2.3 and 4).

At inference a layer is linear up to its activation and its gates are hard, so mixing and BatchNorm fold into the
operators, and each neuron keeps only the weights its gates let through: ``9*|b| + 3*(C - |b|)`` taps an output
instead of ``12*C + O``. :mod:`.freezing` makes the layers (:mod:`.frozen_layer`), :mod:`.frozen_state` reads states;
here they run, move, are kept in files and come back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import files, frozen_state, ops
from .backends import choose
from .backends.packing import Layout
from .freezing import freeze_layer, read_source
from .frozen_layer import FrozenLayer, dense, has_values, plain_tensors, relaid
from .frozen_state import ALGORITHMS, BUFFERS, Description
from .graphed import Graphed
from .module_base import Routed, check_input, memory_format
from .ops import _checks
from .routing import Draws, Routing, check_draws

__all__ = ["FrozenDSTS", "FrozenLayer"]

FORMAT = "dsts_kernels frozen 1"
OLD_FILES = (
    "; FrozenDSTS.save() writes them. What version 0.1 wrote with torch.save(frozen) is brought over by "
    "torch.load(path, weights_only=False).save(new_path), where you trust the file; what it wrote with "
    "torch.save(frozen.state_dict()) does not say how it is packed: freeze its source again"
)


class FrozenDSTS(Routed):
    """A DSTS module for inference: same call as :class:`FusedDSTS`, no autograd, packed weights only.

    Made by :meth:`FusedDSTS.freeze` or :meth:`load`; independent of its source afterwards. It can be pickled,
    deep-copied and exported with ``torch.export``. It behaves as the source does in evaluation.

    **Moved or cast**, by itself or with a module that holds it, it follows: ``.to("cuda")`` packs for the other device;
    ``.half()``, ``.bfloat16()``, ``.float()``, ``.double()`` and ``.to(dtype)`` convert the packed weights, and the
    features it takes are of that dtype from then on. Scores and biases stay float32 (float64 in float64). A cast
    rounds what was rounded before; ``freeze(dtype=...)`` rounds once. A cast to any other dtype leaves it as it is. A
    backend that was asked for by name and cannot run the new dtype or device says so at the next call.

    **A state** (``state_dict()``) says what it is: besides tensors, ``_extra_state`` holds packing, options and sizes.
    ``load_state_dict``, of this module or of one that holds it, takes a state as a whole or leaves this module as it
    was. The gates, and with them the sizes of the buffers, are the state's. Its packing is converted to this module's;
    so is its dtype, unless with ``assign=True``, which takes dtype and device from the state. ``backend`` and
    ``algorithm`` stay. Refused are a state of another ``in_channels``, ``num_neurons``, number of layers, scoring
    kernel, ``score_reduction`` (with the outputs a mean is over), mixing kernel, activation or ``skip``, or with a
    centre of scores where this module has none or the other way round (:meth:`load` takes any); one whose parts do not
    fit one another; one of a newer version; and one of version 0.1, which does not say how it is packed.

    Args:
        source: the :class:`FusedDSTS` to freeze.
        dtype: of features and packed weights; ``None`` keeps the source's. Scores and biases stay float32.
        algorithm: ``"winograd"`` packs for fast convolution, ``"direct"`` for the library's; ``"auto"`` takes
            fast convolution where the backend has it (a CPU, float32 and half types), but for large layers in a half
            type on matrix units, which the library convolves. On a GPU both are direct, ours.
        backend: the name of a backend; ``None`` keeps the source's choice.

    Raises:
        TypeError: ``dtype`` is not a floating dtype we run in; a layer is no :class:`DSTSLayer`, a norm no BatchNorm, a
            weight no plain tensor.
        ValueError: ``algorithm`` is unknown or cannot run; a BatchNorm has no running statistics; a layer or norm has
            forward hooks; weights are on the meta device; layers differ in size, device or backend.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        algorithm: str = "auto",
        backend: str | None = None,
    ) -> None:
        if dtype is not None and dtype not in _checks.FLOATS:
            raise TypeError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, _checks.FLOATS))}")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: got {algorithm!r}, wanted {' or '.join(map(repr, ALGORITHMS))}")
        with plain_tensors():
            sources = read_source(source)
            gate = sources[0].gate
            dtype, device = dtype or gate.dtype, gate.device
            names = {own.layer.backend for own in sources}
            if backend is None and len(names) > 1:
                names = " and ".join(sorted(map(repr, names)))
                raise ValueError(f"backend: got layers with {names}, wanted one for all: freeze(backend=...)")
            backend = names.pop() if backend is None else backend
            chosen = choose("frozen_layer", device, dtype, backend, (1, gate.shape[1]))
            reason = chosen.why_not_fast(device, dtype)
            if algorithm == "winograd" and reason is not None:
                raise ValueError(
                    f"algorithm: got 'winograd', wanted 'auto' or 'direct' for {dtype} on {device}: {reason}"
                )
            packing = chosen.packing(device, dtype, algorithm)
            layers = [freeze_layer(own, dtype, packing) for own in sources]
            n, c = gate.shape
            about = Description(c, n, dtype, source.skip, algorithm, backend, tuple(layer for layer, _ in layers))
            self._fill(about, [{name: dense(own[name]) for name in BUFFERS} for _, own in layers])

    def _fill(self, about: Description, tensors: list[dict[str, Tensor | None]]) -> None:
        """What every way to make one ends with."""
        super().__init__()
        self.in_channels, self.num_neurons, self.dtype, self.skip, self.algorithm, self.backend, layers = about
        self.layers = nn.ModuleList(FrozenLayer(*pair, self.dtype) for pair in zip(layers, tensors, strict=True))
        super().train(False)

    @classmethod
    def load(cls, path: str | os.PathLike, map_location: torch.device | str | None = None) -> FrozenDSTS:
        """A module from a file of :meth:`save`, packed for the device it is put on; nothing in the file is executed.

        Args:
            path: of the file.
            map_location: the device to put it on; ``None`` means the CPU, wherever it was saved.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is damaged, cut off, something else, or of a newer version, and what to do about
                one of version 0.1; a ``map_location`` that is no device of this machine.

        >>> dsts.freeze().save("dsts.pt")
        >>> fast = FrozenDSTS.load("dsts.pt")
        """
        try:
            device = torch.empty(0, device="cpu" if map_location is None else map_location).device
        except (AssertionError, RuntimeError, TypeError) as error:  # torch without CUDA raises the first
            raise ValueError(
                f"map_location: got {map_location!r}, wanted a device of this machine ({error})"
            ) from error
        content = files.read(path, FORMAT, "a file of FrozenDSTS.save()", hint=OLD_FILES)
        try:
            about, tensors = frozen_state.read(content.get("state", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: got {str(path)!r}, whose content does not load: {error}") from error
        self = cls.__new__(cls)
        with plain_tensors():
            self._fill(about, [{name: dense(own[name]) for name in BUFFERS} for own in tensors])
            return self._apply(lambda t: t.to(device))

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole module to a file for :meth:`load`: the old one or the new one is there, never half of one."""
        if not all(has_values(layer.gate) for layer in self.layers):
            raise RuntimeError("save(path): got a module without weights, wanted one that has loaded a state")
        files.write(path, {"state": {key: value.cpu() for key, value in self.state_dict().items()}}, FORMAT)

    def describe(self) -> Description:
        layers = tuple(layer.describe() for layer in self.layers)
        return Description(
            self.in_channels, self.num_neurons, self.dtype, self.skip, self.algorithm, self.backend, layers
        )

    def get_extra_state(self) -> Tensor:
        """What a state says of itself, as a tensor, which every tool can carry."""
        return frozen_state.encode(self.describe())

    def set_extra_state(self, state: Tensor) -> None:
        """Refused unless it says what this module is: by itself it changes nothing, :meth:`load_state_dict` does."""
        theirs = frozen_state.decode(state)
        if theirs != self.describe():
            raise ValueError(f"state: got {theirs}, wanted {self.describe()}: load_state_dict() a whole state")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = {key.removeprefix(prefix): state_dict[key] for key in list(state_dict) if key.startswith(prefix)}
        wanted = self.describe().keys()
        missing_keys += [prefix + key for key in wanted if key not in own]
        unexpected_keys += [prefix + key for key in own if key not in wanted]
        for key in own:  # its layers find nothing left to load
            del state_dict[prefix + key]
        if not any(key in own for key in wanted):
            return
        try:
            with plain_tensors():
                self._take(*frozen_state.read(own), local_metadata.get("assign_to_params_buffers", False))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix or 'state_dict.'}{error} (nothing of this frozen module was loaded)")

    def _take(self, theirs: Description, tensors: list[dict[str, Tensor | None]], assign: bool) -> None:
        """Everything of a checked state, or nothing."""
        wrong = frozen_state.differences(theirs, self.describe())
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: the state is of another module; FrozenDSTS.load() takes any")
        device = (tensors[0]["filters"] if assign else self.layers[0].filters).device
        if device.type == "meta":
            raise ValueError("assign: got False for a module on the meta device, wanted True, or to_empty(device=...)")
        dtype = theirs.dtype if assign else self.dtype
        new = Layout(self._packing(device, dtype), dtype)
        buffers = []
        for own, about in zip(tensors, theirs.layers, strict=True):
            here = {name: None if own[name] is None else own[name].to(device) for name in BUFFERS}
            buffers.append(relaid(here, math.prod(about.mixing_kernel), Layout(about.packing, theirs.dtype), new))
        if all(layer.fits(own, new) for layer, own in zip(self.layers, buffers, strict=True)):
            for layer, own in zip(self.layers, buffers, strict=True):
                layer.write(own)
        else:
            for layer, own in zip(self.layers, buffers, strict=True):
                layer.put({name: None if t is None else t.clone() for name, t in own.items()}, new)
        self.dtype = dtype

    def _packing(self, device: torch.device, dtype: torch.dtype) -> str:
        """How to pack there; as it is where nothing can run there, which the next call says."""
        try:
            chosen = choose("frozen_layer", device, dtype, self.backend, (1, self.in_channels))
            return chosen.packing(device, dtype, self.algorithm)
        except (RuntimeError, ValueError):
            return self.layers[0].packing

    def train(self, mode: bool = True) -> FrozenDSTS:
        """Refused for ``mode=True``: a frozen module has nothing to train."""
        if mode:
            raise RuntimeError("train(mode): got True, wanted False: a frozen module only infers; train its source")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenDSTS:
        """Follows a move or a cast, all layers or none; never raises of itself, or a parent would be left half cast."""
        if not recurse:
            return self
        with plain_tensors():
            probe = fn(torch.empty(0, dtype=self.dtype, device=self.layers[0].filters.device))
            dtype = probe.dtype if probe.dtype in _checks.FLOATS else self.dtype
            packing = self.layers[0].packing if probe.is_meta else self._packing(probe.device, dtype)
            buffers = [layer.moved(fn, Layout(packing, dtype)) for layer in self.layers]
            for layer, own in zip(self.layers, buffers, strict=True):
                layer.put(own, Layout(packing, dtype))
        self.dtype = dtype
        return self

    def graphed(self, sample: Tensor, *, return_routing: bool = False, static_output: bool = False) -> Graphed:
        """A CUDA graph of the module, called like it: see :meth:`FusedDSTS.graphed`."""

        def weights() -> list[Tensor | None]:
            return [t for layer in self.layers for t in (layer.gate, *layer.weights())]

        return Graphed(self, sample, None, return_routing, static_output, weights, lambda x: None, "frozen_layer")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, num_neurons={self.num_neurons}, skip={self.skip}, dtype={self.dtype}"

    def forward(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """``x (B, C, T, H, W)`` to the same shape, in the memory format of ``x``; see :meth:`FusedDSTS.forward`."""
        layers = list(self._modules["layers"]._modules.values())  # asked for by name they cost more than a small layer
        like = layers[0]._buffers["filters"]
        check_input(x, self.in_channels, like)
        if draws is not None:
            check_draws(draws, (len(layers), x.shape[0]), self.in_channels, self.num_neurons, like)
        if torch.is_grad_enabled():  # asking costs less than entering
            with torch.no_grad():
                return self._run(x, layers, return_routing)
        return self._run(x, layers, return_routing)

    def _run(self, x: Tensor, layers: list[FrozenLayer], return_routing: bool) -> Tensor | tuple[Tensor, Routing]:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        y, neurons, scores = ops.frozen_layers(
            x,
            layers,
            skip=self.skip,
            memory_format=torch.contiguous_format if self.skip else memory_format(x),
            routing=return_routing,
            backend=self.backend,
        )
        if not return_routing:
            return y
        gates = [layer.gate[neuron].to(self.dtype) for layer, neuron in zip(layers, neurons, strict=True)]
        return y, Routing(*(t if type(t) is Tensor else torch.stack(t) for t in (neurons, scores)), torch.stack(gates))
