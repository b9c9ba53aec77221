"""Compile every kernel launch ahead of time, for chips that are not here, and report what the compiler made of it.

``python -m benchmarks.compiled.ahead`` traces the launchers of the Triton backend on meta tensors of the paper's
shapes, so what is compiled is what would be launched, with the tiles that ship; it needs no GPU. The table goes to
docs/log/h100.md; tests/backends/triton/test_ahead.py asserts what must hold.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from dsts_kernels.backends.base import FrozenOptions, FrozenWeights
from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import LAUNCHERS, TritonBackend, load, tuning

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
SHAPES = {"tpn": (8, 16, 16), "swin": (16, 7, 7)}
CHANNELS, NEURONS, BATCH = 1024, 10, 8
KINDS = [(torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest")]
MODULES = (*LAUNCHERS, "gluon.conv", "gluon.data_gradient", "gluon.weight_gradient")  # what has kernels
LARGE = ("conv_kernel", "data_gradient_kernel", "weight_gradient_kernel")


Place = tuple[str | int, ...]  # an argument's name, and where in it, if it is a tuple


class Launch(NamedTuple):
    """One launch, as the compiler needs it; hashable, so equal ones are compiled once."""

    step: str  # which op, where
    kernel: str
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[Place, object], ...]
    divisible: tuple[Place, ...]
    warps: int
    stages: int


class Compiled(NamedTuple):
    """What the compiler made of a launch for one architecture."""

    step: str
    kernel: str
    architecture: str
    dtype: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int  # bytes a thread: what was spilled
    shared: int  # bytes a program
    instruction: str  # tcgen05, wgmma, mma, or none
    form: str  # of a convolution's filters, listed or not of a data gradient's
    descriptors: bool  # loads by tensor descriptor
    programs: int  # that fit a multiprocessor
    from_registers: bool  # a wgmma takes its left operand from registers, see triton/launch.py


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, found: list, step: list[str]) -> None:
        self.kernel, self.found, self.step = kernel, found, step

    def __getitem__(self, grid):
        return functools.partial(self.record, grid)

    def record(self, grid, *args, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
        signature, values, divisible = [], {(name,): value for name, value in constants.items()}, []
        for parameter, value in zip(self.kernel.params, args, strict=False):
            kind = specialized((parameter.name,), value, parameter.do_not_specialize, values, divisible)
            signature.append((parameter.name, kind))
        self.found.append(
            Launch(
                self.step[0], self.kernel.fn.__name__, tuple(signature), tuple(sorted(values.items())),
                tuple(divisible), num_warps, num_stages,
            )
        )  # fmt: skip


def specialized(path: Place, value: object, plain: bool, values: dict[Place, object], divisible: list[Place]) -> object:
    """The type of an argument as Triton compiles for it; a tuple's, of all it holds.

    What is compiled in goes to ``values``, what is a multiple of 16 to ``divisible``, unless ``plain``.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, tuple):
        kinds = [specialized((*path, i), one, plain, values, divisible) for i, one in enumerate(value)]
        return type(value)(*kinds)
    if isinstance(value, TensorDescriptor) or hasattr(value, "block_shape"):  # Gluon's own says its layout too
        block, layout = ",".join(map(str, value.block_shape)), getattr(value, "layout", None)
        return f"tensordesc<{DTYPES[value.base.dtype]}[{block}]{f',{layout!r}' if layout else ''}>"
    if isinstance(value, torch.Tensor):
        divisible.append(path)
        return f"*{DTYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and not plain):
        values[path] = value
        return "constexpr"
    if value % 16 == 0 and not plain:
        divisible.append(path)
    return "i32" if abs(value) < 2**31 else "i64"


DTYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


WITHOUT_GLUON = dict.fromkeys(("gluon_conv", "gluon_data_gradient", "gluon_weight_gradient"), False)
"""Switches with which Triton's kernels run everywhere; :mod:`.ahead_gluon` has the others."""


@contextlib.contextmanager
def on_chip(architecture: str, processors: int, stand_in: Callable[[object], object]) -> Iterator[TritonBackend]:
    """The Triton backend on a chip that is not here, with something else in place of every kernel."""
    with contextlib.ExitStack() as stack:
        forget = load("launch").gluon_runs.cache_clear  # of another chip
        forget()
        stack.callback(forget)
        stack.enter_context(mock.patch.object(load("launch"), "chip", lambda device: (architecture, processors)))
        for module in map(load, MODULES):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, stand_in(getattr(module, name))))
        yield TritonBackend()


def kernel_named(name: str) -> object:
    return next(getattr(module, name) for module in map(load, MODULES) if hasattr(module, name))


def trace(architecture: str, shape: str, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a training step, an evaluation and a frozen module, batch 8, paper's sizes."""
    found: list[Launch] = []
    step = [""]
    empty = functools.partial(torch.empty, device="meta")
    c, n, b, size = CHANNELS, NEURONS, BATCH, SHAPES[shape]
    x = empty(b, *size, c, dtype=dtype).permute(0, 4, 1, 2, 3)
    neuron = empty(b, dtype=torch.int64)
    gate, logits, noise = empty(b, c, dtype=dtype), empty(n, c, dtype=dtype), empty(b, c, dtype=dtype)
    spatial, temporal = empty(n, c, c, 1, 3, 3, dtype=dtype), empty(n, c, c, 3, 1, 1, dtype=dtype)
    stand_in = functools.partial(Recorder, found=found, step=step)
    with on_chip(architecture, PROCESSORS[architecture], stand_in) as launch:
        step[0] = "training"
        launch.semhash_gate(logits, neuron, noise, empty(b, dtype=torch.bool))
        launch.semhash_gate_backward(gate, logits, neuron, noise)
        launch.tap_sums(x, 1)
        launch.tap_sums(x, 9)
        wide, scores = empty(b, c, dtype=torch.float32), empty(b, n, dtype=torch.float32)
        for taps in (1, 9):
            scoring, sums = empty(n, c, taps, dtype=torch.float32), empty(b, c * taps, dtype=torch.float32)
            for keep, drawn in ((False, (None,) * 3), (True, (wide, empty(b, dtype=torch.bool), scores))):
                launch.kernels.route(x, scoring, logits, *drawn, 1, 1.0, keep)
            launch.kernels.route_backward(
                (scores, gate, scores[:, 0]), scores, scores, neuron, sums, scoring, logits, wide, 1, 1.0, (True,) * 3
            )
        launch.gated_conv3d(x, gate, neuron, spatial, temporal)
        launch.gated_conv3d_backward(x, x, gate, neuron, spatial, temporal, [True] * 4)
        step[0] = "gates frozen"
        launch.gated_conv3d_backward(x, x, gate, neuron, spatial, temporal, [True, False, False, False])
        for kernel in ((1, 1, 1), (1, 3, 3), (3, 1, 1)):
            step[0] = f"mixing {'x'.join(map(str, kernel))}"
            mixing = empty(n, c, c, *kernel, dtype=dtype)
            launch.mixing_conv3d(x, neuron, mixing)
            launch.mixing_conv3d_backward(x, x, neuron, mixing, [True, True])
        for taps in (1, 9):
            step[0] = f"frozen, {taps} scoring taps"
            weights = FrozenWeights(
                empty(n, c, taps), empty(n, c, dtype=torch.int32), empty(n + 1, dtype=torch.int64),
                empty(n * 2 * c * c * 6, dtype=dtype), empty(n, c), None,
            )  # fmt: skip
            options = FrozenOptions(0, [1, 1, 1], True, "tiled", taps)
            first = x.contiguous()
            launch.frozen_layer(first, None, None, weights, options)
            launch.frozen_layer(x, empty(b, c, taps), None, weights, options)
            launch.frozen_layer(x, empty(b, c, taps), first, weights, options._replace(next_taps=0))
            launch.frozen_layer(x, empty(b, c, taps), x, weights, options._replace(next_taps=0))
    return found


def launches(architecture: str, shape: str, dtype: torch.dtype, precision: str) -> list[Launch]:
    """The launches of :func:`trace` with every tile that ships, each once."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with switched(**WITHOUT_GLUON):
            found = trace(architecture, shape, dtype)
            kind = tuning.kind_of(dtype)
            for kernel in tuning.KERNELS:
                for tile in tuning.candidates(kernel, architecture, kind):
                    with tuning.forced(**{kernel: tile}):
                        more = trace(architecture, shape, dtype)
                    # Nine taps' sums take the registers of a large tile: the launchers never ask for both.
                    found += [m for m in more if not (tile.n > 128 and dict(m.constants).get(("SUM_TAPS",)) == 9)]
    finally:
        torch.set_float32_matmul_precision(before)
    unique = {}
    for launch in found:
        unique.setdefault(launch._replace(step=""), launch)
    return list(unique.values())


def build(launch: Launch, architecture: str, kernel: object | None = None) -> object:
    """What Triton makes of a launch, its code in every form and metadata; ``kernel`` stands in for the one of that
    name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = kernel or kernel_named(launch.kernel)
    signature = dict(launch.signature)
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name), *place): value for (name, *place), value in launch.constants}
    attributes = {
        (kernel.arg_names.index(name), *place): [["tt.divisibility", 16]] for name, *place in launch.divisible
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(
        source(kernel, full, values, attributes),
        target=GPUTarget("cuda", TARGETS[architecture], 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )


def looked_at(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the tools that come with Triton says of a binary."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of a thread's own memory: what was spilled."""
    text = looked_at(cubin, "cuobjdump", "--dump-resource-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups())
    return registers, stack + local


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile one launch and read its resources off the binary."""
    signature = dict(launch.signature)
    constants = {name: value for (name, *place), value in launch.constants if not place}
    built = build(launch, architecture)
    registers, stack = resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    instruction = next((name for name in ("tcgen05", "wgmma", "mma") if f"{name}." in ptx), "none")
    shared = built.metadata.shared
    positions = math.prod(constants.get("BOX", ()))
    if launch.kernel == "weight_gradient_kernel":  # whose reduction runs over positions
        sides = constants["BM"], constants["BN"], positions
    else:
        sides = positions, constants.get("BN"), constants.get("BK")
    fits = min(65536 // (-(-registers // 8) * 8 * 32 * launch.warps), 64 // launch.warps, 32)
    fits = min(fits, grids.SMEM_KIB[TARGETS[architecture]] * 1024 // (shared + 1024))  # 1 KiB is the system's
    return Compiled(
        launch.step,
        launch.kernel,
        architecture,
        next((kind for kind in ("bf16", "fp16") if any(kind in text for text in map(str, signature.values()))), "fp32"),
        "x".join(map(str, sides)) if launch.kernel in LARGE else "",
        launch.warps,
        launch.stages,
        registers,
        stack,
        shared,
        instruction,
        str(constants.get("FORM", "listed" if constants.get("dgate", ...) is None else "")),
        "cp.async.bulk.tensor" in ptx,
        fits,
        re.search(r"warp_group_dot [^\n]*: tensor<", built.asm["ttgir"]) is not None,
    )


def compile_all(
    architectures: list[str], shapes: list[str], kinds: list[tuple[torch.dtype, str]], processes: int
) -> list[Compiled]:
    work = {
        (launch._replace(step=""), architecture): launch
        for architecture in architectures
        for dtype, precision in kinds
        for shape in (shapes if dtype != torch.float32 else shapes[:1])
        for launch in launches(architecture, shape, dtype, precision)
    }
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_launch, work.values(), [key[1] for key in work], chunksize=4))


def markdown(compiled: list[Compiled]) -> str:
    """The large kernels, worst of each tile: what limits a chip."""
    by_tile: dict[tuple[str, ...], list[Compiled]] = {}
    for one in compiled:
        if one.kernel in LARGE:
            key = (one.kernel, one.architecture, one.dtype, one.tile, one.instruction)
            by_tile.setdefault(key, []).append(one)
    lines = [
        "| kernel | chip | dtype | tile | warps | stages | registers | spilled | shared KiB | unit | programs an SM |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for (kernel, architecture, dtype, tile, instruction), alike in sorted(by_tile.items()):
        worst = max(alike, key=lambda one: (one.stack, one.registers))
        lines.append(
            f"| {kernel.removesuffix('_kernel')} | {architecture} | {dtype} | {tile} | {worst.warps} | "
            f"{worst.stages} | "
            f"{worst.registers} | {worst.stack} | {max(one.shared for one in alike) // 1024} | {instruction} | "
            f"{min(one.programs for one in alike)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", action="append", choices=list(TARGETS))
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write everything here")
    options = parser.parse_args(arguments)
    shapes = options.shape or list(SHAPES)
    compiled = compile_all(options.architecture or list(TARGETS), shapes, KINDS, options.processes)
    print(markdown(compiled))
    if options.json:
        options.json.write_text(json.dumps([one._asdict() for one in compiled], indent=1))


if __name__ == "__main__":
    main()
