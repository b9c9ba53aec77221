"""What launchers share: the chip, the precision of products, operands as tensor descriptors, and the launch itself.

Triton looks at every argument of every launch anew to find the compiled kernel: 9 us for a small kernel, 26 us for the
convolution. :func:`start` remembers which one it found, by all that the choice depends on (:func:`key_of`), and then
hands addresses and numbers to the driver. What a problem's launches have in common, a :class:`Launch`, is kept as well.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gpu import switches
from ..gpu.grids import Box, next_power
from . import tuning
from .gluon import plan

if TYPE_CHECKING:
    from .recorder import Recorder

_runtime = knobs.runtime


class Current(threading.local):
    """What this thread is at: backward passes run in threads of autograd's own."""

    recorder: Recorder | None = None  # that watches the call


current = Current()


@functools.cache
def chip(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessors."""
    if device.type != "cuda":
        return tuning.INTERPRETER, 3
    properties = torch.cuda.get_device_properties(device)
    return tuning.architecture_of((properties.major, properties.minor)), properties.multi_processor_count


@functools.cache
def gluon_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels in Gluon are for this device and dtype, their switch aside."""
    architecture, _ = chip(device)
    return architecture == plan.ARCHITECTURE and plan.unfit(plan.CAPABILITY, dtype) is None


def precision(dtype: torch.dtype) -> str:
    return "ieee" if tuning.kind_of(dtype) == "ieee" else "tf32"


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows of whole 16 bytes, and coordinates that fit."""
    return (tensor.shape[-1] * tensor.element_size()) % 16 == 0 and tensor.data_ptr() % 16 == 0


def dense_strides(shape: torch.Size) -> list[int]:
    """Strides of dense memory. Those that torch gives a side of 1 may be anything, and no descriptor takes that."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def boxed(panel: Tensor, box: Box, columns: int, tma: bool, *, left: bool) -> tuple[object, bool]:
    """A panel ``(B, T, H, W, c)`` as a kernel takes it, and whether that is a tensor descriptor.

    ``left`` says that it is a product's left operand. Triton feeds such an operand to Hopper's ``wgmma`` from registers
    where a descriptor's box is reshaped first, and loads the next block into them while products still read them:
    results change from run to run (seen on an H100 with Triton 3.6). By pointers it is read from shared memory.
    """
    if not (tma and aligned(panel)) or (left and chip(panel.device)[0] == "sm_90"):
        return panel, False
    return descriptor(panel, (1, *box, columns)), True


def described(matrix: Tensor, block: tuple[int, ...], tma: bool) -> tuple[object, bool]:
    """Likewise for filters."""
    if not (tma and aligned(matrix)):
        return matrix, False
    return descriptor(matrix, block), True


class Address:
    """Memory as a tensor descriptor asks for it; a tensor in its place would be kept alive by those that are kept."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Of dense memory, in boxes of ``block``."""
    if tensor.is_meta or chip(tensor.device)[0] == tuning.INTERPRETER:  # which reads the tensor itself
        return TensorDescriptor(tensor, list(tensor.shape), dense_strides(tensor.shape), list(block))
    return described_at(tensor.data_ptr(), tensor.dtype, tensor.shape, block)


@functools.lru_cache(maxsize=1024)  # making one checks every side of it; memory comes back at the same addresses
def described_at(address: int, dtype: torch.dtype, shape: torch.Size, block: tuple[int, ...]) -> TensorDescriptor:
    """:func:`descriptor` of memory at an address."""
    return TensorDescriptor(Address(address, dtype), list(shape), dense_strides(shape), list(block))


class Compiled(NamedTuple):
    """What Triton compiled for tensors of some kinds."""

    kernel: JITFunction
    run: Callable[..., None]
    function: int
    metadata: object
    rest: tuple  # numbers and constants, in the order of the kernel's arguments


class Launch:
    """All of a launch but its tensors: made once for each problem (:func:`remembered`).

    Args:
        grid: programs, by axis.
        numbers: the arguments that follow the tensors: integers, floats, and tuples of integers.
        constants: constexprs, ``num_warps`` and ``num_stages``.
    """

    __slots__ = ("compiled", "constants", "grid", "numbers")

    def __init__(self, grid: tuple[int, ...], numbers: tuple, **constants: object) -> None:
        self.grid, self.numbers, self.constants = tuple(grid), numbers, constants
        self.compiled: dict[tuple, Compiled] = {}  # by key_of its tensors


# For functions that return a Launch. Sizes that change with every batch push others out.
remembered = functools.lru_cache(maxsize=1024, typed=True)


_counters: dict[torch.device, Tensor] = {}  # of the default stream, whose launches come after one another


def zeroed(count: int, device: torch.device) -> Tensor:
    """At least ``count`` int32 that are zero, for a kernel that leaves them so, on the current stream of ``device``.

    Kept from launch to launch, which saves a fill before each, for the default stream alone. On others somebody may be
    making a graph, which is replayed beside what else its stream does, or may be warming up for one in the graph's
    memory: Inductor's CUDA graphs refuse an allocation that outlives the call.
    """
    if not switches.current().keep_counters or (
        device.type == "cuda" and torch._C._cuda_getCurrentRawStream(device.index) != 0
    ):
        return torch.zeros(count, dtype=torch.int32, device=device)
    found = _counters.get(device)
    if found is None or found.shape[0] < count:
        with torch.inference_mode(False):
            found = _counters[device] = torch.zeros(next_power(count), dtype=torch.int32, device=device)
    if current.recorder is not None:
        current.recorder.takes_counters(found, count)
    return found


def is_apart(x: Tensor) -> bool:
    """Whether launches on ``x`` go into a CUDA graph, or nowhere: a meta tensor."""
    return torch.cuda.is_current_stream_capturing() if x.is_cuda else x.is_meta


def key_of(device: int, kinds: list) -> tuple:
    """All that Triton's choice of a compiled kernel depends on, beside numbers and constants.

    ``kinds`` say of every tensor its dtype, and whether it is aligned to 16 bytes, or its descriptor's box.
    """
    return device, *kinds


def start(kernel: JITFunction, launch: Launch, tensors: tuple[object, ...]) -> None:
    """``kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)``, by what an earlier launch found out.

    Args:
        tensors: the kernel's first arguments: tensors, tensor descriptors, ``None``.
    """
    recorder = current.recorder
    listened = recorder is None and watched()  # which listens itself
    if not isinstance(kernel, JITFunction) or listened or not switches.current().remember_launches:
        if recorder is not None:
            recorder.refuse(f"{kernel} is not launched in a way that is remembered")
        kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)
        return
    arguments, kinds = [], []
    for tensor in tensors:
        if tensor is None:
            arguments.append(None)
            kinds.append(None)
        elif hasattr(tensor, "block_shape"):  # a tensor descriptor, Triton's or Gluon's, whose layout its rank says
            arguments.append(tensor)
            kinds.append((tensor.base.dtype, *tensor.block_shape))
        else:
            address = tensor.data_ptr()
            arguments.append(address)
            kinds.append((tensor.dtype,) if address % 16 else tensor.dtype)
    active = driver.active
    device = active.get_current_device()
    key = key_of(device, kinds)
    found = launch.compiled.get(key)
    if found is None or found.kernel is not kernel:
        found, known = compiled_for(kernel, launch, tensors), False
        launch.compiled[key] = found
    else:
        _, run, function, metadata, rest = found
        x, y, z = (*launch.grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *arguments, *rest)
        known = True
    if recorder is not None:
        recorder.launched(found, known, launch.grid, tensors)


def compiled_for(kernel: JITFunction, launch: Launch, tensors: tuple[object, ...]) -> Compiled:
    """Launches by Triton's own way, and says what was launched."""
    compiled = kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)
    names = kernel.arg_names[len(tensors) + len(launch.numbers) :]
    rest = (*launch.numbers, *(launch.constants[name] for name in names))
    return Compiled(kernel, compiled.run, compiled.function, compiled.packed_metadata, rest)


def watched() -> bool:
    """Whether somebody, as a profiler, waits for launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))
