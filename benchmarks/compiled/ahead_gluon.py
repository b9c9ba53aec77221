"""Compile the Gluon convolution for Hopper without a GPU, and read what a GPU would be given.

``python -m benchmarks.compiled.ahead_gluon`` compiles what :func:`.ahead.trace` sees launched with the switch on, for
every tile that ships and every end of a tile. The table goes to docs/performance.md;
tests/backends/triton/test_ahead_gluon.py asserts what must hold.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.compiled import ahead
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton.gluon import plan

ARCHITECTURE, KERNEL = plan.ARCHITECTURE, "conv_gluon_kernel"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


class Look(NamedTuple):
    """What the compiler made of one launch."""

    dtype: str
    tile: plan.WaveTile
    end: str  # skip, tap sums, memory format
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
    guarded_release: bool  # all eight warps meet between a product's end and its stage's release
    producer_step: int  # instructions of the producer in a K step
    copies: tuple[str, ...]  # of these, TMA

    @property
    def label(self) -> str:
        return f"{self.dtype} {self.tile.m}x{self.tile.n}x{self.tile.k} {self.end}"


def launches() -> list[ahead.Launch]:
    """Every launch of the kernel in frozen layers of the paper's shapes, with every tile that ships, each once.

    Half types differ in nothing but the product's name, so float16 is compiled at one shape.
    """
    found = {}
    with switched(gluon_conv=True):
        for tile in plan.TILES:
            plan.wave_grid.cache_clear()
            with mock.patch.object(plan, "TILES", (tile,)):
                for shape in ahead.SHAPES:
                    for dtype in (torch.bfloat16, torch.float16) if shape == "tpn" else (torch.bfloat16,):
                        traced = ahead.trace(ARCHITECTURE, shape, dtype)
                        found |= {one._replace(step=""): one for one in traced if one.kernel == KERNEL}
    plan.wave_grid.cache_clear()
    return list(found.values())


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


def look(launch: ahead.Launch) -> Look:
    """Compiles a launch and reads its code."""
    built = ahead.build(launch, ARCHITECTURE)
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    sass = ahead.looked_at(cubin, "nvdisasm", "-c")
    registers, spilled = ahead.resources(cubin)
    constants = {name: value for (name, *place), value in launch.constants if not place}
    signature = dict(launch.signature)
    operands = re.findall(r"wgmma\.mma_async[^;]*\}, (\{|%\w+)[^;]*;", ptx)
    step, producer = step_of(sass, "HGMMA"), step_of(sass, "UTMALDG")
    skip = "skip" if signature["skip"] != "constexpr" else "no skip"
    order = "" if constants["CHANNELS_LAST"] else ", channels-first"
    return Look(
        "bf16" if "bf16" in str(signature["panel"]) else "fp16",
        next(tile for tile in plan.TILES if tile.n == constants["BN"]),
        f"{skip}, {constants['SUM_TAPS']} tap sums{order}",
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
        release_is_guarded(ptx),
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
