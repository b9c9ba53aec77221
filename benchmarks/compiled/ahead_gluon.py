"""Compile the Gluon kernels for Hopper without a GPU, and read what a GPU would be given.

``python -m benchmarks.compiled.ahead_gluon`` compiles what is launched with their switches on, for every tile that
ships and every end of a tile: the frozen convolution as :func:`.ahead.trace` sees it, and both gradients of a step.
The table goes to docs/log/gluon.md; tests/backends/triton/test_ahead_gluon.py asserts what must hold.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.compiled import ahead
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton.gluon import plan

ARCHITECTURE = plan.ARCHITECTURE
CONV, DATA, WEIGHT = "conv_gluon_kernel", "data_gradient_gluon_kernel", "weight_gradient_gluon_kernel"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


class Look(NamedTuple):
    """What the compiler made of one launch."""

    kernel: str
    dtype: str
    tile: plan.WaveTile
    end: str  # skip, tap sums, memory format; what a gradient is of
    registers: int  # of a thread as launched; partitions share them out anew
    consumer_registers: int  # that they ask for
    producer_registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes
    product_operands: frozenset[str]  # "shared" or "registers", of every wgmma
    step: int  # instructions of a consumer in a K step
    step_products: int  # of these, wgmma
    step_spills: int  # of these, loads and stores of spilled registers
    step_barriers: int  # of these, barriers of the eight warps
    loops: int  # of K steps; the longest one's instructions are counted
    guarded_release: bool  # all eight warps meet between a product's end and its stage's release, and round parking
    producer_step: int  # instructions of the producer in a K step
    copies: tuple[str, ...]  # of these, TMA

    @property
    def label(self) -> str:
        name = self.kernel.removesuffix("_gluon_kernel").replace("_", " ")
        return f"{name} {self.dtype} {self.tile.m}x{self.tile.n}x{self.tile.k}, {self.end}"


def launches(kernels: tuple[str, ...] = (CONV, DATA, WEIGHT)) -> list[ahead.Launch]:
    """Every launch of these kernels at the paper's shapes, with every tile that ships, each once.

    Half types differ in nothing but the product's name, so float16 is compiled at one shape.
    """
    found = {}
    for shape in ahead.SHAPES:
        for dtype in (torch.bfloat16, torch.float16) if shape == "tpn" else (torch.bfloat16,):
            for kernel in kernels:
                for one in of_frozen(shape, dtype) if kernel == CONV else of_training(kernel, shape, dtype):
                    if one.kernel == kernel:
                        found.setdefault(one._replace(step=""), one)
    return list(found.values())


@contextlib.contextmanager
def only(tile: plan.WaveTile, name: str) -> Iterator[None]:
    """With the switches on, and no other tile than this one."""
    switches = {"gluon_conv": True, "gluon_data_gradient": True, "gluon_weight_gradient": True}
    with switched(**switches), mock.patch.object(plan, name, (tile,)):
        plan.wave_grid.cache_clear()
        yield
    plan.wave_grid.cache_clear()


def of_frozen(shape: str, dtype: torch.dtype) -> Iterator[ahead.Launch]:
    for tile in plan.TILES:
        with only(tile, "TILES"):
            yield from ahead.trace(ARCHITECTURE, shape, dtype)


def of_training(kernel: str, shape: str, dtype: torch.dtype) -> Iterator[ahead.Launch]:
    """Of one of the gradients: features in both memory formats, gates alone, float32 parameters, mixing kernels."""
    empty = functools.partial(torch.empty, device="meta")
    c, n, b, size = ahead.CHANNELS, ahead.NEURONS, ahead.BATCH, ahead.SHAPES[shape]
    x = empty(b, *size, c, dtype=dtype).permute(0, 4, 1, 2, 3)
    neuron, gate = empty(b, dtype=torch.int64), empty(b, c, dtype=dtype)
    for tile in plan.TILES if kernel == DATA else plan.WEIGHT_TILES:
        found: list[ahead.Launch] = []
        stand_in = functools.partial(ahead.Recorder, found=found, step=["training"])
        name = "TILES" if kernel == DATA else "WEIGHT_TILES"
        with only(tile, name), ahead.on_chip(ARCHITECTURE, ahead.PROCESSORS[ARCHITECTURE], stand_in) as backend:
            for of_filters in (dtype, torch.float32)[: 1 if kernel == DATA else 2]:
                filters = [empty(n, c, c, *taps, dtype=of_filters) for taps in ((1, 3, 3), (3, 1, 1))]
                for like in (x, x.contiguous()) if kernel == DATA else (x,):
                    backend.gated_conv3d_backward(x, like, gate, neuron, *filters, [True] * 4)
            if kernel == DATA:
                backend.gated_conv3d_backward(x, x, gate, neuron, *filters, [False, True, False, False])
            else:
                for taps in ((1, 1, 1), (1, 3, 3), (3, 1, 1)):
                    backend.mixing_conv3d_backward(x, x, neuron, empty(n, c, c, *taps, dtype=dtype), [False, True])
        yield from found


def loops(sass: str) -> Iterator[list[str]]:
    """Bodies of all loops, innermost or not: what lies between a label and a jump back to it."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1])
    for end, text in enumerate(code):
        jump = JUMP.search(text)
        if jump and labels.get(jump[1], end + 1) <= end:
            yield code[labels[jump[1]] : end + 1]


def step_of(sass: str, name: str) -> list[str]:
    """The shortest loop with an instruction ``name``: a K step."""
    return min((body for body in loops(sass) if any(name in text for text in body)), key=len)


def steps_of(sass: str, name: str, count: int) -> list[list[str]]:
    """All loops with just ``count`` instructions ``name``, but those around others of them: K steps."""
    bodies = sorted((body for body in loops(sass) if sum(name in text for text in body) == count), key=len)
    return [body for body in bodies if len(body) <= 2 * len(bodies[0])]


def release_is_guarded(ptx: str) -> bool:
    """Whether a barrier of the consumers lies between every wait for products and the arrival that follows it.

    Warps of the other group may still read the stage, which the stand-in does not see: a partition is one thread there.
    """
    threads = 32 * plan.CONSUMER_WARPS
    events = re.findall(rf"wgmma\.wait_group|bar\.sync\s+0, {threads}|mbarrier\.arrive\.shared", ptx)
    if not any(event.startswith("mbarrier") for event in events):
        return False
    met = False
    for event in events:
        if event.startswith("mbarrier") and not met:
            return False
        met = event.startswith("bar")
    return True


def parking_is_guarded(ptx: str) -> bool:
    """Whether the consumers meet before they park an accumulator in memory, in pairs of columns, and after."""
    events = re.findall(rf"st\.global\.v2\.b32|ld\.global|wgmma|bar\.sync\s+0, {32 * plan.CONSUMER_WARPS}", ptx)
    parked = [i for i, event in enumerate(events) if event == "st.global.v2.b32"]
    whole = bool(parked) and parked == list(range(parked[0], parked[-1] + 1))
    return whole and all(events[i].startswith("bar") for i in (parked[0] - 1, parked[-1] + 1))


def end_of(launch: ahead.Launch, constants: dict[str, object]) -> str:
    """What is told of a launch beside its tile."""
    signature = dict(launch.signature)
    if launch.kernel == WEIGHT:
        filters = "fp32" if "fp32" in str(signature["out"]) else "half"
        if signature["plan"] == "constexpr":
            return f"mixing {'x'.join(map(str, constants['KERNEL']))}, {filters}"
        return f"both operators, {filters}"
    order = "" if constants["CHANNELS_LAST"] else ", channels-first"
    if launch.kernel == DATA:
        return ("gates alone" if signature["dx"] == "constexpr" else "features and gates") + order
    skip = "skip" if signature["skip"] != "constexpr" else "no skip"
    return f"{skip}, {constants['SUM_TAPS']} tap sums{order}"


def look(launch: ahead.Launch) -> Look:
    """Compiles a launch and reads its code."""
    built = ahead.build(launch, ARCHITECTURE)
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    sass = ahead.looked_at(cubin, "nvdisasm", "-c")
    registers, spilled = ahead.resources(cubin)
    constants = {name: value for (name, *place), value in launch.constants if not place}
    operands = re.findall(r"wgmma\.mma_async[^;]*\}, (\{|%\w+)[^;]*;", ptx)
    tiles = plan.WEIGHT_TILES if launch.kernel == WEIGHT else plan.TILES
    tile = next(tile for tile in tiles if tile.n == constants["BN"])
    steps, producer = steps_of(sass, "HGMMA", tile.k // 16), step_of(sass, "UTMALDG")
    step = steps[-1]
    return Look(
        launch.kernel,
        "bf16" if "bf16" in str(launch.signature[0]) else "fp16",
        tile,
        end_of(launch, constants),
        registers,
        max(map(int, re.findall(r"setmaxnreg\.dec\.\S+\s+(\d+)", ptx))),
        min(map(int, re.findall(r"setmaxnreg\.inc\.\S+\s+(\d+)", ptx))),
        spilled,
        built.metadata.shared,
        frozenset("shared" if operand.startswith("%rd") else "registers" for operand in operands),
        len(step),
        sum("HGMMA" in text for text in step),
        sum(re.search(r"\b(LDL|STL)\b", text) is not None for text in step),
        sum(text.startswith("BAR.SYNC") for text in step),
        len(steps),
        release_is_guarded(ptx) and (launch.kernel != DATA or parking_is_guarded(ptx)),
        len(producer),
        tuple(match[0] for text in producer if (match := re.search(r"UTMALDG\.\dD", text))),
    )


def markdown(looks: list[Look]) -> str:
    lines = [
        "| kernel | registers as launched, of consumers, of the producer | spilled | shared KiB | "
        "instructions a K step, of the producer |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for one in looks:
        lines.append(
            f"| {one.label} | {one.registers}, {one.consumer_registers}, {one.producer_registers} | {one.spilled} | "
            f"{one.shared / 1024:.0f} | {one.step}, {one.producer_step} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.compiled.ahead_gluon", description=__doc__).parse_args(arguments)
    print(markdown([look(launch) for launch in launches()]))


if __name__ == "__main__":
    main()
