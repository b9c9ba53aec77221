"""Kernels as functions of bytes: memory shows what was launched, with what and where. No GPU, nothing is compiled.

What a launch writes depends on the kernel, on all that Triton would compile it for, on its grid and numbers, and on
every byte that it reads at the addresses it is given (:class:`Machine`). So a stale launch, a wrong address, a byte too
few or memory that is shared too early shows in the results.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.base import FrozenOptions, FrozenWeights
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import load

from ...support.inputs import gated_inputs
from .compiling import STREAM, Driver, forget_launches, launch, specialization, tl, triton

recorded, recorder = load("recorded"), load("recorder")
BACKEND = BACKENDS["triton"]
# What kernels write; all else they read. Arrival counters are zero before and after a convolution.
WRITTEN = {
    "tap_sums_kernel": {"sums"},
    "group_samples_kernel": {"slots", "neuron_of", "slot_of", "groups", "members"},
    "list_channels_kernel": {"order", "plans", "listed"},
    "gather_panel_kernel": {"panel"},
    "pack_filters_kernel": {"filters"},
    "unpack_filters_kernel": {"weight"},
    "conv_kernel": {"out", "box_sums", "sums", "workspace"},
    "data_gradient_kernel": {"dx", "dgate"},
    "gate_sums_kernel": {"dgate"},
    "weight_gradient_kernel": {"out"},
    "semhash_kernel": {"gate"},
    "semhash_backward_kernel": {"dlogits"},
    "route_kernel": {"neuron", "scores", "gate", "share", "sums"},
    "route_backward_kernel": {"dsums", "dscoring", "dlogits"},
    "route_and_gather_kernel": {"panel", "plan", "neuron", "scores"},
    "route_and_gather_rows_kernel": {"panel", "plan", "neuron", "scores"},
}
WRITTEN["one_kernel"] = {"x"}
LEFT_OUT = {"workspace"}  # written and read within a launch: nobody else may rely on it


@triton.jit
def one_kernel(x, channels, BLOCK: tl.constexpr):
    tl.store(x, channels)


def leaves_some(name: str, named: dict[str, object]) -> bool:
    """Whether a launch writes part of its result, so that what was there counts."""
    return bool(name == "pack_filters_kernel" and named["first_tap"]) or bool(named.get("BY_NEURON"))


def bytes_of(tensor: object) -> int:
    """From the first to the last that a kernel may reach."""
    if type(tensor) is launch.TensorDescriptor:
        tensor_size = 1
        for side in tensor.shape:
            tensor_size *= side
        return tensor_size * tensor.base.dtype.itemsize
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in sides) + 1) * tensor.element_size()


class Machine:
    """Stands in for Triton's compiler, for the driver and for the chip."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver, self.replayed = Driver(), 0
        self.extents: list[int | None] | None = None  # bytes of the tensors of the launch that comes
        self.queue: Iterator[list[int | None]] = iter(())  # of launches that are done again
        active = type("Active", (), {"active": self.driver})
        monkeypatch.setattr(launch, "driver", active)
        monkeypatch.setattr(recorded, "driver", active)
        monkeypatch.setattr(launch, "chip", lambda device: ("sm_90", 132))
        monkeypatch.setattr(launch.JITFunction, "run", self.compiler())
        forget_launches(monkeypatch)
        self.watch_launches(monkeypatch)
        self.watch_recordings(monkeypatch)
        recorded.forget()

    def watch_launches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = launch.start

        def start(kernel: object, one: object, tensors: tuple) -> None:
            self.extents = [None if t is None else bytes_of(t) for t in tensors]
            if kernel.__name__ == "data_gradient_kernel" and tensors[7] is None:
                self.extents[5] = 0  # without a gradient of gates nobody reads the features
            original(kernel, one, tensors)
            self.extents = None

        monkeypatch.setattr(launch, "start", start)

    def watch_recordings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Addresses do not say how much lies there: a recording does as its first call did."""
        launched, made, done = recorder.Recorder.launched, recorded.Recording.__init__, recorded.Recording.__call__

        def note(watcher: object, *args: object) -> None:
            vars(watcher).setdefault("extents", []).append(self.extents)
            launched(watcher, *args)

        def make(recording: object, watcher: object, found: object) -> None:
            made(recording, watcher, found)
            recording.extents = watcher.extents

        def again(recording: object, tensors: object) -> object:
            self.queue = iter(recording.extents)
            found = done(recording, tensors)
            assert next(self.queue, None) is None
            return found

        monkeypatch.setattr(recorder.Recorder, "launched", note)
        monkeypatch.setattr(recorded.Recording, "__init__", make)
        monkeypatch.setattr(recorded.Recording, "__call__", again)

    def compiler(self) -> Callable:
        def compile(kernel: object, *args: object, grid: tuple, warmup: bool, **constants: object) -> object:
            mine, names = specialization(kernel, args, constants), kernel.arg_names
            rest = [constants[name] for name in names[len(args) :]]

            def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
                assert stream == STREAM and len(values) == len(names)
                self.replayed += self.extents is None
                extents = next(self.queue) if self.extents is None else self.extents
                self.execute(kernel.__name__, mine, (x, y, z), names, values, extents)

            launch.knobs.runtime.launch_enter_hook(None)
            plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
            self.execute(kernel.__name__, mine, (*grid, 1, 1)[:3], names, (*plain, *rest), self.extents)
            return type("CompiledKernel", (), {"run": staticmethod(run), "function": 1, "packed_metadata": (4, 1, 0)})

        return compile

    def execute(self, name: str, mine: str, grid: tuple, names: list[str], values: tuple, extents: list) -> None:
        """One launch: what it reads decides what it writes."""
        tensors, numbers = values[: len(extents)], values[len(extents) :]
        addresses = [v.base.data_ptr() if type(v) is launch.TensorDescriptor else v for v in tensors]
        boxes = [(v.shape, v.strides, v.block_shape) for v in tensors if type(v) is launch.TensorDescriptor]
        digest = hashlib.blake2b(repr((mine, grid, numbers, boxes)).encode())
        named, later = dict(zip(names, values, strict=True)), []
        for argument, address, size in zip(names, addresses, extents, strict=False):
            if not size or argument in LEFT_OUT:
                continue
            if argument == "arrival_counters":
                if name == "conv_kernel":
                    assert not any(ctypes.string_at(address, size)), "counters are zero before a convolution"
                else:
                    ctypes.memset(address, 0, size)
            elif argument in WRITTEN[name]:
                later.append((argument, address, size))
                if leaves_some(name, named):
                    digest.update(ctypes.string_at(address, size))
            else:
                digest.update(ctypes.string_at(address, size))
        for argument, address, size in later:
            block = hashlib.shake_128(digest.digest() + argument.encode()).digest(size)
            ctypes.memmove(address, block, size)


def contents(found: object) -> list[tuple]:
    """What results are and hold, to compare."""
    if isinstance(found, Tensor):
        dense = found.contiguous()
        data = ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size()) if dense.numel() else b""
        return [(found.dtype, tuple(found.shape), tuple(found.stride()), data)]
    if isinstance(found, (tuple, list)):
        return [part for one in found for part in contents(one)]
    return [(found,)]


Call = tuple[str, tuple]


def calls(channels: int, outputs: int, size: tuple, batch: int, dtype: torch.dtype, change: Callable) -> list[Call]:
    """Methods of the backend with arguments: forward, backward, frozen."""
    x, gate, neuron, spatial, temporal = gated_inputs(batch, channels, outputs, size, dtype)
    x, gate, spatial = change(x), change(gate), change(spatial)
    wide = dict(dtype=torch.float32)
    noise, hard, gumbel = torch.randn(batch, channels), torch.rand(batch) > 0.5, torch.randn(batch, 3)
    scoring, logits = torch.randn(3, channels, 1), torch.randn(3, channels, dtype=dtype)
    sums, scores = torch.randn(batch, channels), torch.randn(batch, 3)
    gradients = torch.randn(batch, 3), torch.randn(batch, channels, dtype=dtype), torch.randn(batch)
    grad = change(torch.randn(batch, *size, outputs, dtype=dtype).permute(0, 4, 1, 2, 3))
    mixing = torch.randn(3, outputs, outputs, 1, 1, 1, dtype=dtype)
    found = [
        ("route", (x, scoring, logits, None, None, None, 1, 1.0, False)),
        ("route", (x, scoring, logits, noise, hard, gumbel, 1, 1.0, True)),
        ("route", (x, scoring, logits, noise, hard, gumbel, 2, 0.5, True)),
        ("gated_conv3d", (x, gate, neuron, spatial, temporal)),
        ("gated_conv3d_keeping", (x, gate, neuron, spatial, temporal, (True,) * 5)),
        ("gated_conv3d_keeping", (x, gate, neuron, spatial, temporal, (False,) * 5)),
        ("mixing_conv3d", (grad, neuron, mixing)),
        ("mixing_conv3d", (grad, neuron, mixing, "transposed")),
        ("mixing_conv3d_backward", (grad, torch.randn_like(grad), neuron, mixing, [True, True])),
        ("mixing_conv3d_backward", (grad, torch.randn_like(grad), neuron, mixing, [False, True])),
    ]
    for needs in ((True, True, True), (False, True, True), (True, False, True)):
        routed = (gradients, scores, gumbel, neuron, sums, scoring, logits, noise, 1, 1.0, needs)
        found.append(("route_backward", routed))
    _, kept = BACKEND.gated_conv3d_keeping(x, gate, neuron, spatial, temporal, (True,) * 5)
    for needs in ([True] * 4, [True, False, False, False], [False, False, True, False]):
        for given in ([], list(kept)):
            found.append(("gated_conv3d_backward", (grad, x, gate, neuron, spatial, temporal, needs, given)))
    if channels != outputs:
        return found
    filters = torch.randn(3 * 12 * channels * (-(-channels // 32) * 64), dtype=dtype)
    channel_lists, starts = torch.zeros(3, channels, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    weights = FrozenWeights(scoring, channel_lists, starts, filters, torch.randn(3, channels, **wide), None)
    for next_taps, given, skip in ((1, None, None), (0, torch.randn(batch, channels, 1), torch.randn_like(x))):
        options = FrozenOptions(0, [1, 1, 1], True, "tiled", next_taps)
        found.append(("frozen_layer", (x, given, skip, weights, options)))
    return found


def other_values(one: object) -> object:
    """The same call of other tensors of the same kinds."""
    if isinstance(one, Tensor):
        if not one.numel() or 0 in one.stride():
            return one
        other = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype).copy_(one.flip(0))
        return other if other.data_ptr() % 16 == one.data_ptr() % 16 else one
    if isinstance(one, (tuple, list)):
        parts = [other_values(part) for part in one]
        return type(one)(*parts) if hasattr(one, "_fields") else type(one)(parts)
    return one


def plain(call: Call) -> list[tuple]:
    with switched(record_calls=False):
        return contents(getattr(BACKEND, call[0])(*call[1]))
