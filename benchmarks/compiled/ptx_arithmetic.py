"""What PTX instructions compute, on bits of registers in NumPy: for :mod:`.ptx`.

Registers are uint64 whatever their type. An entry of :data:`ARITHMETIC` takes the instruction's parts behind its name
and its sources' bits, and returns bits; who calls it cuts them to the width of the destination.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Bits = np.ndarray
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64, 8: np.int8}
UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64, 8: np.uint8}


def widen(kind: str) -> tuple[str, int]:
    """A type's letter and width, as in ``s32``; ``pred`` is a bit."""
    if kind == "pred":
        return "b", 1
    if kind in ("bf16", "f32x2", "bf16x2", "f16x2"):
        return kind, {"bf16": 16, "f32x2": 64}.get(kind, 32)
    return kind[0], int(kind[1:])


def numbers(bits: Bits, kind: str) -> np.ndarray:
    """Bits as numbers to compute with: integers of their width, floats in float64."""
    letter, width = widen(kind)
    if kind == "bf16":
        return ((bits & 0xFFFF) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    if letter == "f":
        cut = bits.astype(UNSIGNED[width])
        return cut.view({16: np.float16, 32: np.float32, 64: np.float64}[width]).astype(np.float64)
    if width == 1:
        return bits.astype(bool)
    cut = bits.astype(UNSIGNED[width])
    return cut.view(SIGNED[width]) if letter == "s" else cut


def bits_of(values: np.ndarray, kind: str) -> Bits:
    """Numbers as bits, rounded to nearest, ties to even, once."""
    letter, width = widen(kind)
    values = np.asarray(values)
    if kind == "bf16":
        return bfloat16_bits(values)
    if letter == "f":
        with np.errstate(over="ignore"):
            cut = values.astype({16: np.float16, 32: np.float32, 64: np.float64}[width])
        return cut.view(UNSIGNED[width]).astype(np.uint64)
    if width == 1:
        return values.astype(np.uint64)
    return values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values.astype(np.uint64)


def bfloat16_bits(values: np.ndarray) -> Bits:
    """Of numbers that float32 holds, or that are sums of two such: rounded from float64 in one step.

    Odd rounding to float32 first keeps what the second step needs to know.
    """
    near = values.astype(np.float32)
    raw = near.view(np.uint32).astype(np.int64)
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    odd = np.where(inexact, np.where(away, raw - 1, raw) | 1, raw)
    rounded = (odd + 0x7FFF + (odd >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded & 0xFFFF).astype(np.uint64)


def elementwise(function: Callable[..., np.ndarray]) -> Callable[..., Bits]:
    """Of operands and a result of the type at the end of the instruction; packed pairs, half by half."""

    def compute(op: tuple[str, ...], *sources: Bits) -> Bits:
        kind = op[-1]
        if kind.endswith("x2"):
            half = {"f32x2": 32}.get(kind, 16)
            parts = [
                compute((*op[:-1], kind.removesuffix("x2")), *(s >> np.uint64(shift) for s in sources))
                for shift in (0, half)
            ]
            mask = np.uint64(2**half - 1)
            return (parts[0] & mask) | (parts[1] & mask) << np.uint64(half)
        with np.errstate(all="ignore"):
            return bits_of(function(*(numbers(s, kind) for s in sources)), kind)

    return compute


def bitwise(function: Callable[..., np.ndarray]) -> Callable[..., Bits]:
    return lambda op, *sources: function(*sources)


def division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers towards zero; floats as they are (``div.full`` is within two units of the last place)."""
    if a.dtype.kind == "f":
        return a / b
    wide_a, wide_b = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return np.sign(wide_a) * np.sign(wide_b) * (np.abs(wide_a) // np.abs(wide_b))


def wide_product(op: tuple[str, ...], a: Bits, b: Bits) -> np.ndarray:
    letter, _ = widen(op[-1])
    kind = np.int64 if letter == "s" else np.uint64
    return numbers(a, op[-1]).astype(kind) * numbers(b, op[-1]).astype(kind)


def multiply(op: tuple[str, ...], a: Bits, b: Bits) -> Bits:
    """``mul.lo``, ``mul.wide``, and of floats."""
    if "wide" in op:
        return wide_product(op, a, b).view(np.uint64)
    if "hi" in op:
        return (wide_product(op, a, b) >> widen(op[-1])[1]).view(np.uint64)
    if "lo" in op:
        return a * b
    return elementwise(np.multiply)(op, a, b)


def multiply_add(op: tuple[str, ...], a: Bits, b: Bits, c: Bits) -> Bits:
    if "wide" in op:
        return wide_product(op, a, b).view(np.uint64) + c
    return a * b + c


def shift(op: tuple[str, ...], a: Bits, by: Bits, left: bool) -> Bits:
    letter, width = widen(op[-1])
    by = by & np.uint64(0xFFFFFFFF)
    if left:
        return np.where(by < width, a << np.minimum(by, 63), 0).astype(np.uint64)
    value = numbers(a, op[-1])
    if letter == "s":
        return (value.astype(np.int64) >> np.minimum(by, width - 1).astype(np.int64)).view(np.uint64)
    return np.where(by < width, value.astype(np.uint64) >> np.minimum(by, 63), 0).astype(np.uint64)


def extract(op: tuple[str, ...], a: Bits, position: Bits, length: Bits) -> Bits:
    """``bfe``: a field of bits, with its sign where the type has one."""
    at, size = int(position[0]), int(length[0])
    field = (a >> np.uint64(at)) & np.uint64(2**size - 1)
    if widen(op[-1])[0] == "s" and size:
        return np.where(field >> np.uint64(size - 1) & 1, field | np.uint64(2**64 - 2**size), field).astype(np.uint64)
    return field


def logic(op: tuple[str, ...], a: Bits, b: Bits, c: Bits, table: Bits) -> Bits:
    """``lop3``: three bits choose one of the table."""
    found, code = np.zeros_like(a), int(table[0])
    for i in range(8):
        if code >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def permute(op: tuple[str, ...], a: Bits, b: Bits, selector: Bits) -> Bits:
    """``prmt``: each byte one of eight, or that byte's sign."""
    both = (a & np.uint64(0xFFFFFFFF)) | b << np.uint64(32)
    found = np.zeros_like(a)
    for i in range(4):
        pick = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        found |= np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return found


def convert(op: tuple[str, ...], *sources: Bits) -> Bits:
    """``cvt.to.from``; two floats become a packed pair, the first on top."""
    to, source = op[-2], op[-1]
    if to.endswith("x2"):
        high, low = (convert((*op[:-2], to.removesuffix("x2"), source), one) for one in sources)
        return high << np.uint64(16) | low
    values = numbers(sources[0], source)
    if values.dtype.kind == "f" and widen(to)[0] in "su":
        values = np.trunc(values).astype(np.int64)
    return bits_of(values, to)


def compare(name: str, kind: str, a: Bits, b: Bits) -> np.ndarray:
    """``setp``: comparisons without an order are true of NaN where their name ends in u."""
    x, y = numbers(a, kind), numbers(b, kind)
    unknown = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
    if name in ("num", "nan"):
        return unknown == (name == "nan")
    plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    orderless = len(plain) == 3 and plain.endswith("u")
    functions = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                 "ge": np.greater_equal}  # fmt: skip
    return np.where(unknown, orderless, functions[plain[:2]](x, y))


def largest(a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
    found = np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)
    return largest(found, *more) if more else found


def smallest(a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
    found = np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)
    return smallest(found, *more) if more else found


def population(values: np.ndarray) -> np.ndarray:
    return sum((values >> np.uint64(i) & np.uint64(1) for i in range(64)), np.zeros_like(values))


ARITHMETIC: dict[str, Callable[..., Bits]] = {
    "add": elementwise(np.add),
    "sub": elementwise(np.subtract),
    "mul": multiply,
    "mad": multiply_add,
    "fma": elementwise(lambda a, b, c: a * b + c),  # exact enough: float64 holds a product of two float32
    "div": elementwise(division),
    "rem": elementwise(lambda a, b: a - division(a, b) * b),
    "max": elementwise(largest),
    "min": elementwise(smallest),
    "neg": elementwise(np.negative),
    "abs": elementwise(np.abs),
    "and": bitwise(np.bitwise_and),
    "or": bitwise(np.bitwise_or),
    "xor": bitwise(np.bitwise_xor),
    "not": lambda op, a: a ^ np.uint64(1) if op[-1] == "pred" else ~a,
    "shl": lambda op, a, by: shift(op, a, by, True),
    "shr": lambda op, a, by: shift(op, a, by, False),
    "bfe": extract,
    "lop3": logic,
    "prmt": permute,
    "popc": lambda op, a: population(a.astype(UNSIGNED[widen(op[-1])[1]]).astype(np.uint64)),
    "cvt": convert,
    "selp": lambda op, a, b, choice: np.where(choice & np.uint64(1), a, b),
}
