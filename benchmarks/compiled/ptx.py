"""Runs a compiled Triton or Gluon kernel on the CPU: one CTA of its PTX, all threads in step, in NumPy.

    memory = Memory()
    x = memory.put(tensor)                      # an address
    accesses = run(parse(ptx), memory, [x, 5], cta=(0, 0), shared=1024)
    memory.get(x, like)                         # what the kernel left there

What is run is what a GPU would be given, but for ptxas: layouts, widths, addresses and barriers are those of the
compiled code. Every load, store and asynchronous copy is recorded, warp by warp: lines and sectors of device memory,
passes of shared memory. It raises :class:`Fault` where a kernel reads shared memory that nobody wrote, or that another
warp wrote or will write without a barrier between (asynchronous copies land when they are waited for, not before),
where it leaves its tensors, and where threads of a CTA branch apart. Instructions that such kernels do not use are
missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .ptx_arithmetic import ARITHMETIC, compare, widen
from .ptx_memory import LINE, SECTOR, WARP, Fault, Memory, Shared, passes_of, words_of

__all__ = ["Access", "Fault", "Memory", "Program", "parse", "run"]
IGNORED = ("fence", "griddepcontrol", "bar.warp", "membar", "createpolicy")


class Instruction(NamedTuple):
    line: int  # of the PTX
    guard: str  # predicate register, or nothing
    negated: bool
    op: tuple[str, ...]  # split at its dots
    operands: tuple[str, ...]  # vectors and addresses in one piece


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]
    threads: int


class Access(NamedTuple):
    """One warp's load, store or copy, of ``width`` bytes a lane. A copy into shared memory has two of them."""

    line: int  # of the PTX
    name: str  # ld, st, cp.async or prefetch
    space: str  # global or shared
    width: int
    lanes: int  # that take part
    address: int  # of the first of them
    lines: int  # of device memory, 128 bytes
    sectors: int  # of those, 32 bytes
    passes: int  # of shared memory


def operands(text: str) -> tuple[str, ...]:
    """Split at commas outside brackets and braces."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[]+)+", text) if part.strip())


def parse(ptx: str) -> Program:
    """A module with one kernel."""
    code, labels, parameters = [], {}, re.findall(r"\.param\b[^,\n)]*?(\w+_param_\d+)", ptx.split("{", 1)[0])
    threads = re.search(r"\.reqntid (\d+)", ptx)
    body = ptx[ptx.index("{") :]
    offset = ptx[: ptx.index("{")].count("\n")
    for number, raw in enumerate(body.split("\n"), offset + 1):
        text = raw.split("//")[0].strip()
        if re.match(r"\.(section|file|loc|reg|shared|pragma)|\{$|\}$", text):
            if text.startswith(".section"):
                break
            continue
        for statement in re.split(r";", text):
            statement = statement.strip().lstrip("{").strip() if not statement.strip().startswith("{%") else statement
            if label := re.match(r"(\$?[\w$]+):", statement):
                labels[label[1]] = len(code)
                statement = statement[label.end() :].strip()
            if not statement or statement in "{}" or statement.startswith("."):
                continue
            found = re.match(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$", statement, re.DOTALL)
            if found is None:
                raise ValueError(f"line {number}: got {statement!r}, wanted a PTX instruction")
            op = tuple(found[3].replace("::", "~").split("."))
            code.append(Instruction(number, found[2] or "", found[1] == "!", op, operands(found[4])))
    return Program(code, labels, parameters, int(threads[1]) if threads else WARP)


class Cta:
    """The state of one block of threads; :func:`run` drives it."""

    def __init__(
        self, program: Program, memory: Memory, arguments: list[int | float], cta: tuple[int, int],
        grid: tuple[int, int], shared: int,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.shared = program, memory, Shared(shared)
        self.threads = program.threads
        self.thread, self.everyone = np.arange(self.threads), np.ones(self.threads, bool)
        self.registers: dict[str, np.ndarray] = {}
        self.arguments = dict(zip(program.parameters, arguments, strict=False))
        self.special = {
            "%tid.x": self.thread, "%tid.y": 0, "%tid.z": 0, "%ctaid.x": cta[0], "%ctaid.y": cta[1], "%ctaid.z": 0,
            "%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": 1, "global_smem": 0,
        }  # fmt: skip
        self.accesses: list[Access] = []
        self.groups: list[list[tuple]] = [[]]  # copies under way, by commit

    # Operands

    def value(self, text: str) -> np.ndarray:
        """Bits of a register or a constant, as uint64."""
        if text.startswith("!"):
            return self.value(text[1:]) ^ 1
        if text in self.special:
            return np.broadcast_to(np.asarray(self.special[text], np.uint64), self.threads)
        if text in self.registers:
            return self.registers[text]
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            bits = int(text[2:], 16)
        elif re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            bits = int(text.rstrip("U"), 0)
        else:
            raise Fault(f"register {text} is read before it is written")
        return np.full(self.threads, bits & (2**64 - 1), np.uint64)

    def half(self, text: str) -> np.ndarray:
        """Part of a pair, which the compiler leaves unwritten where nobody uses it: NaN, so that a use shows."""
        if text.startswith("%") and text not in self.registers and text not in self.special:
            return np.full(self.threads, 0x7FFFFFFF, np.uint64)
        return self.value(text)

    def write(self, name: str, bits: np.ndarray, active: np.ndarray, width: int) -> None:
        if name == "_":
            return
        bits = np.broadcast_to(np.asarray(bits, np.uint64), self.threads)
        bits = bits & np.uint64(2**width - 1)
        before = self.registers.get(name)
        self.registers[name] = np.where(active, bits, bits if before is None else before)

    def address(self, text: str) -> np.ndarray:
        inside = text.strip("[] ").replace(" ", "")
        found = re.match(r"([%\w.$]+?)(?:\+(-?\w+))?$", inside)
        return self.value(found[1]) + np.uint64(int(found[2] or "0", 0) & (2**64 - 1))

    def vector(self, text: str) -> list[str]:
        return [name.strip() for name in text.strip("{} ").split(",")]

    # Memory

    def record(self, line: int, name: str, space: str, addresses: np.ndarray, width: int, active: np.ndarray) -> None:
        for first in range(0, self.threads, WARP):
            mine = addresses[first : first + WARP][active[first : first + WARP]]
            if len(mine):
                device = space == "global"
                self.accesses.append(
                    Access(
                        line, name, space, width, len(mine), int(mine[0]),
                        len(words_of(mine, width, LINE)) if device else 0,
                        len(words_of(mine, width, SECTOR)) if device else 0,
                        0 if device else passes_of(mine, width),
                    )
                )  # fmt: skip

    def load(self, one: Instruction, active: np.ndarray) -> None:
        space, bits = one.op[1], widen(one.op[-1])[1]
        to = self.vector(one.operands[0])
        if space == "param":
            name = one.operands[1].strip("[] ")
            if name not in self.arguments:
                raise Fault(f"line {one.line}: parameter {name} was not given")
            value = self.arguments[name]
            data = np.float32(value).view(np.uint32) if isinstance(value, float) else int(value) & (2**64 - 1)
            return self.write(to[0], np.full(self.threads, data, np.uint64), active, bits)
        addresses, size = self.address(one.operands[1]), bits // 8
        width = size * len(to)
        self.record(one.line, "ld", space, addresses, width, active)
        data = self.fetch(space, addresses[active], width, self.thread[active] // WARP, one.line)
        for i, name in enumerate(to):
            part = np.zeros((self.threads, 8), np.uint8)
            part[active, :size] = data[:, i * size : (i + 1) * size]
            self.write(name, part.view(np.uint64)[:, 0], active, bits)

    def fetch(self, space: str, addresses: np.ndarray, width: int, warps: np.ndarray, line: int) -> np.ndarray:
        if space == "global":
            return self.memory.bytes[self.memory.places(addresses, width, line)]
        return self.shared.read(self.shared.places(addresses, width, line), warps, line)

    def store(self, one: Instruction, active: np.ndarray) -> None:
        space, bits = one.op[1], widen(one.op[-1])[1]
        addresses, names = self.address(one.operands[0]), self.vector(one.operands[1])
        size, width = bits // 8, bits // 8 * len(names)
        self.record(one.line, "st", space, addresses, width, active)
        parts = [self.value(name).copy().view(np.uint8).reshape(-1, 8)[:, :size] for name in names]
        data = np.concatenate(parts, 1)[active]
        if space == "global":
            self.memory.bytes[self.memory.places(addresses[active], width, one.line)] = data
        else:
            at = self.shared.places(addresses[active], width, one.line)
            self.shared.write(at, data, self.thread[active] // WARP, one.line)

    def copy_async(self, one: Instruction, active: np.ndarray) -> None:
        """``cp.async``: bytes are read at once, and land when they are waited for."""
        to, source, width = self.address(one.operands[0]), self.address(one.operands[1]), int(one.operands[2], 0)
        size = self.value(one.operands[3]) if len(one.operands) > 3 else np.full(self.threads, width, np.uint64)
        reads = active & (size > 0)
        self.record(one.line, "cp.async", "global", source, width, reads)
        self.record(one.line, "cp.async", "shared", to, width, active)
        data = np.zeros((self.threads, width), np.uint8)
        data[reads] = self.memory.bytes[self.memory.places(source[reads], width, one.line)]
        at, warps = self.shared.places(to[active], width, one.line), self.thread[active] // WARP
        self.shared.claim(at, warps, one.line)
        self.shared.written[at] = False
        self.groups[-1].append((at, data[active], warps))

    def wait_group(self, outstanding: int) -> None:
        """All but the last ``outstanding`` committed groups have landed."""
        done, kept = self.groups[:-1], []
        while outstanding and done:
            kept.insert(0, done.pop())
            outstanding -= 1
        for at, data, warps in (copy for group in done for copy in group):
            self.shared.bytes[at], self.shared.written[at] = data, True
            self.shared.writer[at] = np.broadcast_to(warps[:, None], at.shape)
        self.groups = [*kept, self.groups[-1]]

    # Registers

    def move(self, one: Instruction, active: np.ndarray) -> None:
        """``mov``, also of a register from its parts and back."""
        to, source = one.operands
        width = widen(one.op[-1])[1]
        if source.startswith("{"):
            parts = self.vector(source)
            each = np.uint64(width // len(parts))
            mask = np.uint64(2 ** (width // len(parts)) - 1)
            pieces = [(self.half(part) & mask) << each * np.uint64(i) for i, part in enumerate(parts)]
            self.write(to, np.bitwise_or.reduce(pieces), active, width)
        elif to.startswith("{"):
            parts = self.vector(to)
            each = width // len(parts)
            for i, part in enumerate(parts):
                self.write(part, self.value(source) >> np.uint64(each * i), active, each)
        else:
            self.write(to, self.value(source), active, width)

    def shuffle(self, one: Instruction, active: np.ndarray) -> None:
        """``shfl.sync`` of whole warps."""
        mode, lane = one.op[2], self.thread % WARP
        other = self.value(one.operands[2]).astype(np.int64)
        sources = {"bfly": lane ^ other, "idx": other % WARP, "up": lane - other, "down": lane + other}[mode]
        inside = (sources >= 0) & (sources < WARP)
        chosen = self.thread - lane + np.where(inside, sources, lane)
        to = one.operands[0].split("|")
        self.write(to[0], self.value(one.operands[1])[chosen], active, 32)
        if len(to) > 1:
            self.write(to[1], inside, active, 1)

    def matrix(self, one: Instruction, active: np.ndarray) -> None:
        """``ldmatrix`` and ``stmatrix``: squares of 8 rows of 16 bytes, whose addresses lanes 8 by 8 have."""
        loads = one.op[0] == "ldmatrix"
        address, names = one.operands if not loads else one.operands[::-1]
        registers, addresses = self.vector(names), self.address(address)
        lane, first = self.thread % WARP, self.thread - self.thread % WARP
        for i, name in enumerate(registers):
            rows, pairs = (lane // 4, lane % 4) if "trans" not in one.op else (None, None)
            owners = self.thread[(lane >= 8 * i) & (lane < 8 * i + 8)]
            self.record(one.line, "ld" if loads else "st", "shared", addresses, 16, np.isin(self.thread, owners))
            at = self.shared.places(addresses[owners], 16, one.line).reshape(-1, 8, 16)  # [warps, rows, bytes]
            warps = np.repeat(owners[::8] // WARP, 8)
            warp = first // WARP
            if rows is not None:
                cells = at[warp, rows][np.arange(self.threads)[:, None], pairs[:, None] * 4 + np.arange(4)]
            else:  # element (row, column) of what is kept is (column, row) of memory
                column = lane // 4
                low = at[warp, lane % 4 * 2][np.arange(self.threads)[:, None], column[:, None] * 2 + np.arange(2)]
                high = at[warp, lane % 4 * 2 + 1][np.arange(self.threads)[:, None], column[:, None] * 2 + np.arange(2)]
                cells = np.concatenate([low, high], 1)
            if loads:
                self.shared.read(at.reshape(-1, 16), warps, one.line)
                data = np.zeros((self.threads, 8), np.uint8)
                data[:, :4] = self.shared.bytes[cells]
                self.write(name, data.view(np.uint64)[:, 0], active, 32)
            else:
                data = self.value(name).copy().view(np.uint8).reshape(-1, 8)[:, :4]
                self.shared.claim(at.reshape(-1, 16), warps, one.line)
                self.shared.bytes[cells], self.shared.written[cells] = data, True

    def compare(self, one: Instruction, active: np.ndarray) -> None:
        a, b = map(self.value, one.operands[1:3])
        self.write(one.operands[0], compare(one.op[1], one.op[-1], a, b), active, 1)

    def arithmetic(self, one: Instruction, active: np.ndarray) -> None:
        if one.op[0] not in ARITHMETIC:
            raise NotImplementedError(f"line {one.line}: {'.'.join(one.op)}")
        bits = ARITHMETIC[one.op[0]](one.op, *map(self.value, one.operands[1:]))
        width = widen(one.op[-1])[1]
        if one.op[0] == "cvt":
            width = widen(one.op[-2])[1]
        elif one.op[0] == "popc":
            width = 32
        elif "wide" in one.op:
            width *= 2
        self.write(one.operands[0], bits, active, width)

    def step(self, one: Instruction, active: np.ndarray) -> None:
        """One instruction that is no branch."""
        name, text = one.op[0], ".".join(one.op)
        if text.startswith("cp.async.commit_group"):
            self.groups.append([])
        elif text.startswith("cp.async.wait_"):
            self.wait_group(int(one.operands[0], 0) if one.operands else 0)
        elif text.startswith("cp.async.c"):
            self.copy_async(one, active)
        elif text.startswith(("bar.sync", "barrier.sync")):
            self.shared.barrier()
        elif name == "prefetch":
            self.record(one.line, "prefetch", "global", self.address(one.operands[0]), 1, active)
            self.memory.places(self.address(one.operands[0])[active], 1, one.line)
        elif not text.startswith(IGNORED):
            handlers = {"ld": self.load, "st": self.store, "mov": self.move, "shfl": self.shuffle, "setp": self.compare}
            handlers |= {"ldmatrix": self.matrix, "stmatrix": self.matrix}
            handlers.get(name, self.arithmetic)(one, active)

    def walk(self) -> Iterator[Instruction]:
        """Instructions in the order in which the CTA meets them."""
        at = 0
        while True:
            one = self.program.instructions[at]
            active = self.everyone
            if one.guard:
                active = self.value(one.guard).astype(bool) != one.negated
            at += 1
            if one.op[0] in ("bra", "ret", "exit"):
                if active.any() and not active.all():
                    raise Fault(f"line {one.line}: threads of a CTA branch apart")
                if active.all():
                    if one.op[0] != "bra":
                        return
                    at = self.program.labels[one.operands[-1]]
                continue
            self.step(one, active)
            yield one


def run(
    program: Program,
    memory: Memory,
    arguments: list[int | float],
    *,
    cta: tuple[int, int] = (0, 0),
    grid: tuple[int, int] = (1, 1),
    shared: int = 0,
    limit: int = 1_000_000,
) -> list[Access]:
    """Run one CTA; returns its accesses in order.

    Args:
        arguments: of the kernel's parameters, in order: addresses, integers, floats.
        shared: bytes of shared memory.
        limit: instructions after which it is taken to be stuck.

    Raises:
        Fault: the kernel did something that it must not.
        NotImplementedError: an instruction is not known here.
    """
    block = Cta(program, memory, arguments, cta, grid, shared)
    for count, one in enumerate(block.walk()):
        if count > limit:
            raise Fault(f"line {one.line}: still running after {limit} instructions")
    return block.accesses
