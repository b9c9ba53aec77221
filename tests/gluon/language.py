"""The names that kernels use, and how a file of kernels is read."""

from __future__ import annotations
import __future__

import ast
import builtins
import linecache
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import hopper, machine
from .faults import Fault, Hazard, line, sources
from .hopper import Descriptor
from .machine import Machine, me
from .values import DTYPES, Int, Int64, Memory, Pointer, Tensor, combine, fitting, raw


def barrier() -> None:
    """Of a partition's threads: what they stored goes where a release of any of them goes."""
    for entry in me().stored:
        entry[3][0] = True
    me().pause()


def load_values(pointer: Pointer, mask: object = None, other: object = None, **hints: object) -> object:
    """Masked elements without ``other`` are NaN, or the largest integer."""
    at, mask, _ = pointer.cells(mask)
    flat = pointer.memory.flat
    for task in me().machine.tasks:
        for memory, places, values, _ in task.stored:
            if memory is not pointer.memory or not np.isin(at[mask], places).any():
                continue
            if task is not me():
                who = f"program {task.program.number}"
                raise Hazard(f"{line()}: reads what {who} stored, without a barrier and an atomic between")
            flat = flat.copy()
            flat[places] = values
    carrier = pointer.dtype.carrier
    nothing = np.nan if carrier is np.float32 else np.iinfo(carrier).max
    found = np.where(mask, flat[at], np.asarray(nothing if other is None else raw(other), carrier))
    return Tensor(found) if found.ndim else scalar(found)


def scalar(found: np.ndarray) -> object:
    if found.dtype.kind != "i":
        return float(found)
    return Int64(found) if found.dtype == np.int64 else Int(found)


def store_values(pointer: Pointer, value: object, mask: object = None, **hints: object) -> None:
    at, mask, value = pointer.cells(mask, value)
    places = at[mask]
    np.add.at(pointer.memory.stores, places, 1)
    me().stored.append((pointer.memory, places, pointer.dtype.cast(value[mask]), [False]))


def atomic_add(pointer: Pointer, value: int, mask: object = None, sem: str = "acq_rel", scope: str = "gpu") -> object:
    """Of a scalar. A release shows others what was stored before the last barrier."""
    at, _, value = pointer.cells(mask, value)
    me().pause()
    if sem in ("acq_rel", "release"):
        me().publish()
    before = pointer.memory.flat[at].copy()
    pointer.memory.flat[at] += value
    return scalar(before)


def filled(shape: Sequence[int], value: float, dtype: Any, layout: object = None) -> Tensor:
    check_sides(shape)
    return Tensor(np.full([int(n) for n in shape], value, dtype.carrier))


def check_sides(sides: Sequence[int]) -> None:
    if any(n & (n - 1) or n < 1 for n in sides):
        raise Fault(f"{line()}: sides {list(sides)} are no powers of two")


def arange(start: int, end: int, layout: object = None) -> Tensor:
    check_sides([end - start])
    return Tensor(np.arange(start, end, dtype=np.int32))


def where(condition: object, a: object, b: object) -> object:
    if isinstance(condition, bool) and not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a if condition else b
    condition, a, b = raw(condition), raw(a), raw(b)
    return Tensor(np.where(condition, a, b).astype(np.result_type(a, b)))


def extreme(ints: Callable, arrays: Callable) -> Callable:
    def function(a: object, b: object) -> object:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return combine(a, b, arrays)
        return fitting(ints(int(a), int(b)), Int)

    return function


def added(x: Tensor, axis: int) -> Tensor:
    return Tensor(x.data.sum(axis, dtype=x.data.dtype))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[-1] != 2:
        raise Fault(f"{line()}: {x.shape} cannot be split")
    return Tensor(x.data[..., 0]), Tensor(x.data[..., 1])


def static_assert(condition: bool, message: str = "") -> None:
    if not condition:
        raise Fault(f"{line()}: {message}")


def warp_specialize(
    functions: Sequence[tuple[Callable, tuple]], warps: Sequence[int], registers: Sequence[int] | None = None
) -> object:
    """The first function in this thread, each other one in a worker; goes on when all have ended."""
    task, ((first, arguments), *others) = me(), functions
    if not len(others) == len(warps) == len(registers or warps):
        raise Fault(f"{line()}: {len(others)} workers, with warps {warps} and registers {registers}")
    task.title = first.__name__
    workers = [
        task.machine.start(task.program, one.__name__, lambda one=one, given=given: one(*given))
        for one, given in others
    ]
    result = first(*arguments)
    task.pause(lambda: all(worker.ended for worker in workers), lambda: "has ended, a worker has not")
    return result


def unchanged(value: object, *args: object) -> object:
    return value


def layout(*args: object, **kwargs: object) -> None:
    """Layouts are left to the compiler."""


def counted(*limits: int) -> map:
    return map(Int, builtins.range(*(int(limit) for limit in limits)))


gl = SimpleNamespace(
    **DTYPES,
    constexpr=unchanged,
    static_range=builtins.range,
    static_assert=static_assert,
    program_id=lambda axis: Int(me().program.number if axis == 0 else 0),
    num_programs=lambda axis: Int(me().machine.programs if axis == 0 else 1),
    cdiv=lambda a, b: (a + b - 1) // b,
    arange=arange,
    full=filled,
    zeros=lambda shape, dtype, layout=None: filled(shape, 0, dtype),
    where=where,
    minimum=extreme(min, np.fmin),
    maximum=extreme(max, np.fmax),
    sum=added,
    reshape=lambda x, shape: Tensor(x.data.reshape([int(n) for n in shape])),
    permute=lambda x, order: Tensor(x.data.transpose(order)),
    split=halves,
    convert_layout=unchanged,
    load=load_values,
    store=store_values,
    atomic_add=atomic_add,
    allocate_shared_memory=hopper.allocate,
    warp_specialize=warp_specialize,
    SliceLayout=layout,
    BlockedLayout=layout,
    NVMMADistributedLayout=layout,
)
NAMES: dict[str, object] = {
    "gl": gl,
    "tl": gl,
    "range": counted,
    "barrier": barrier,
    "fence_async_shared": hopper.fence,
    "mbarrier": hopper.mbarrier,
    "tma": hopper.tma,
    "warpgroup_mma": hopper.multiply,
    "warpgroup_mma_init": unchanged,
    "warpgroup_mma_wait": hopper.wait_for_products,
}


def jit(function: Callable | None = None, **options: object) -> Callable:
    return function if function is not None else lambda function: function


def load(path: Path, changed: Mapping[Path, str] | None = None, *, seen: dict[Path, dict] | None = None) -> dict:
    """The jitted functions of a file by name, with those that it imports from its own package; ``changed`` sources."""
    path, seen = Path(path).resolve(), {} if seen is None else seen
    if path in seen:
        return seen[path]
    source = (changed or {}).get(path) or path.read_text()
    tree, names = ast.parse(source), {**NAMES, "gluon": SimpleNamespace(jit=jit), "triton": SimpleNamespace(jit=jit)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            file = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
            found = load(file, changed, seen=seen) if file.is_file() else {}
            names |= {one.asname or one.name: found[one.name] for one in node.names if one.name in found}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and is_jitted(node)]
    tree.body = functions
    linecache.cache[str(path)] = len(source), None, source.splitlines(keepends=True), str(path)
    sources.add(str(path))
    exec(compile(tree, str(path), "exec", flags=__future__.annotations.compiler_flag), names)
    seen[path] = {node.name: names[node.name] for node in functions}
    return seen[path]


def is_jitted(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).split("(")[0] in ("gluon.jit", "triton.jit") for decorator in node.decorator_list)


def argument(value: object) -> object:
    """As a kernel gets it."""
    if isinstance(value, Memory):
        return Pointer(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(argument, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return fitting(value, Int if -(2**31) <= value < 2**31 else Int64)
    return value


def launch(kernel: Callable, programs: int, *arguments: object, seed: int = 0, **constants: object) -> Machine:
    """Runs ``programs`` programs to their end, or raises a :class:`.faults.Fault`; returns the machine, for its counts.

    Arguments are a :class:`.values.Memory`, a :class:`.hopper.Descriptor`, integers, or named tuples of these.
    """
    given = [one if isinstance(one, Descriptor) else argument(one) for one in arguments]
    return machine.run(programs, seed, lambda: kernel(*given, **constants))
