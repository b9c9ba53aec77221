"""What a cubin says of its kernels: instructions by kind, threads, readable names. Reads the ELF file itself.

Since Volta an instruction is 16 bytes, and its low 12 bits are the opcode; the upper three of those say what its
operands are. The codes were found by disassembling; tests/backends/cuda/test_ahead.py compares counts with nvdisasm's.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from pathlib import Path
from typing import NamedTuple

NO_REGISTER = 255
MAX_THREADS = 0x05  # an attribute of .nv.info
# By the low nine bits. LDGSTS is an asynchronous copy, RED an atomic operation that returns nothing; LD and ST do not
# know which memory they go to.
KINDS = {
    0x030: "HADD2", 0x031: "HFMA2", 0x032: "HMUL2", 0x03B: "LDSM", 0x03C: "HMMA", 0x11D: "BAR", 0x180: "LD",
    0x181: "LDG", 0x183: "LDL", 0x184: "LDS", 0x185: "ST", 0x186: "STG", 0x187: "STL", 0x188: "STS", 0x18A: "ATOM",
    0x18C: "ATOMS", 0x18E: "RED", 0x1A3: "ATOMG", 0x1A6: "RED", 0x1A8: "ATOMG", 0x1AE: "LDGSTS",
}  # fmt: skip
HALF = ("HADD2", "HFMA2", "HMUL2")
MEMORY, SIXTEEN_BYTES = ("LDG", "STG", "LDS", "STS"), 6  # the code of that width


class Section(NamedTuple):
    name: str
    data: bytes


def sections(cubin: bytes) -> list[Section]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    start, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    strings = headers[names][4]
    found = []
    for name, _, _, _, offset, length in headers:
        end = cubin.index(b"\0", strings + name)
        found.append(Section(cubin[strings + name : end].decode(), cubin[offset : offset + length]))
    return found


def kind_of(low: int, arch: int) -> str | None:
    """Of an instruction's first eight bytes. Half-type operations that only convert or move a constant are none."""
    base = low & 0x1FF
    if base == 0x36:
        return "HMMA.884" if arch < 75 else None  # another instruction from sm_100 on
    if base == 0x35 and arch < 100:
        base = 0x31
    kind = KINDS.get(base)
    if kind in HALF:
        registers = [low >> 24 & 0xFF] + ([low >> 32 & 0xFF] if low >> 9 & 7 == 1 else [])
        return None if NO_REGISTER in registers else kind
    return kind


def instructions(code: bytes, arch: int) -> Counter[str]:
    kinds = (kind_of(low, arch) for low, _ in struct.iter_unpack("<QQ", code))
    return Counter(kind for kind in kinds if kind)


def vectors(code: bytes, arch: int) -> Counter[str]:
    """Of loads and stores, those of 16 bytes a lane."""
    kinds = (kind_of(low, arch) for low, high in struct.iter_unpack("<QQ", code) if high >> 9 & 7 == SIXTEEN_BYTES)
    return Counter(kind for kind in kinds if kind in MEMORY)


def threads(info: bytes) -> int:
    """The threads of a block that a kernel is bound to, of its .nv.info section; 0 if it is not."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            if attribute == MAX_THREADS:
                x, y, z = struct.unpack_from("<III", info, at)
                return x * y * z
            at += size
    return 0


class Kernel(NamedTuple):
    """A kernel of a cubin, by its mangled name."""

    symbol: str
    threads: int
    counts: Counter[str]
    vectors: Counter[str]  # of those, loads and stores of 16 bytes


def kernels(path: Path, arch: int) -> list[Kernel]:
    found = {section.name: section.data for section in sections(path.read_bytes())}
    prefix = ".text."
    return [
        Kernel(name, threads(found[f".nv.info.{name}"]), instructions(code, arch), vectors(code, arch))
        for name, code in ((key.removeprefix(prefix), code) for key, code in found.items() if key.startswith(prefix))
    ]


class Name(NamedTuple):
    """A kernel's name and template arguments."""

    base: str
    arguments: tuple[str | int | bool, ...]

    def __str__(self) -> str:
        """Such as conv<half, by K>."""
        told = {"conv": ("by output", "by K"), "tap_sums": ("by position", "by channel")}.get(self.base, ("no", "yes"))
        words = [told[argument] if isinstance(argument, bool) else str(argument) for argument in self.arguments]
        return f"{self.base}<{', '.join(words)}>" if words else self.base


TYPES = {"__half": "half", "__nv_bfloat16": "bfloat16", "Tf32": "tf32"}


def readable(symbol: str) -> Name:
    """Of a mangled name of a kernel in dsts::cuda: enough of the mangling for what these kernels use."""
    head = re.match(r"_ZN4dsts4cuda(\d+)", symbol)
    if head is None:
        return Name(symbol, ())
    end = head.end() + int(head[1])
    base, rest = symbol[head.end() : end].removesuffix("_kernel"), symbol[end:]
    arguments: list[str | int | bool] = []
    if rest.startswith("I"):
        rest = rest[1:]
        while not rest.startswith("E"):
            found = re.match(r"Lb([01])E|Li(\d+)E|(f)|(?:NS0_)?(\d+)|S\d*_", rest)
            if found is None:
                return Name(symbol, ())
            rest = rest[found.end() :]
            if found[1]:
                arguments.append(found[1] == "1")
            elif found[2]:
                arguments.append(int(found[2]))
            elif found[3]:
                arguments.append("float")
            elif found[4]:
                name, rest = rest[: int(found[4])], rest[int(found[4]) :]
                arguments.append(TYPES.get(name, name))
                rest = rest.removeprefix("E") if found[0].startswith("NS0_") else rest
            else:  # the type before, again
                arguments.append(arguments[-1])
    return Name(base, tuple(arguments))
