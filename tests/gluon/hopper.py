"""What Hopper does by itself: barriers in shared memory, TMA boxes, and matrix products of a warp group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from .faults import Fault, Hazard, PhaseFault, line
from .machine import Task, me
from .values import DType, Memory, Tensor, raw

ABSENT, COMING, THERE = "absent", "coming", "there"
TMA_SIDE = 256  # of a box, at most
TMA_ROW_BYTES = 128  # of a box whose rows are swizzled


class Stage:
    """A piece of shared memory that a copy fills as a whole: its data, and whether that is there."""

    def __init__(self, name: str, data: np.ndarray) -> None:
        self.name, self.data, self.state = name, data, ABSENT

    def poison(self, state: str) -> None:
        """Whatever was there may be gone."""
        self.data[...], self.state = np.nan, state


class View:
    """A shared memory descriptor of a stage."""

    def __init__(self, stage: Stage, data: np.ndarray) -> None:
        self.stage, self.data, self.shape = stage, data, list(data.shape)

    def reshape(self, shape: Sequence[int]) -> View:
        found = self.data.reshape(shape)
        if not np.shares_memory(found, self.data):
            raise Fault(f"{line()}: {self.stage.name} cannot be seen as {list(shape)}")
        return View(self.stage, found)

    def permute(self, order: Sequence[int]) -> View:
        return View(self.stage, self.data.transpose(order))


class Ring:
    """Stages, or barriers, by index."""

    def __init__(self, name: str, pieces: list[Any]) -> None:
        self.name, self.pieces = name, pieces

    def index(self, i: int) -> Any:
        if not 0 <= i < len(self.pieces):
            raise Fault(f"{line()}: {self.name} has no stage {int(i)}")
        piece = self.pieces[i]
        return View(piece, piece.data) if isinstance(piece, Stage) else piece


def allocate(dtype: DType, shape: Sequence[int], layout: object) -> Ring:
    """Shared memory of ``shape[0]`` stages, named as the kernel names it; barriers where ``layout`` says so."""
    name = line().split(": ", 1)[1].split("=")[0].strip()
    names = [f"{name}[{i}]" for i in range(shape[0])]
    if layout == "barriers":
        barriers = [Barrier(one) for one in names]
        me().program.barriers += barriers
        return Ring(name, barriers)
    return Ring(name, [Stage(one, np.full(shape[1:], np.nan, dtype.carrier)) for one in names])


class Barrier:
    """Phases, each complete after ``count`` arrivals and all the bytes that it was told to expect."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.complete = self.pending = self.bytes = 0
        self.fenced = False  # copies see that it was initialised
        self.announced = self.heard = 0  # phases told to expect bytes, phases that somebody waited for
        self.guarded: dict[str, Stage] = {}  # what may be overwritten once a phase is complete

    def __str__(self) -> str:
        return f"{self.name}: {self.complete} phases complete, {self.pending} arrivals and {self.bytes} bytes pending"

    def init(self, count: int) -> None:
        if self.count:
            raise Fault(f"{line()}: {self.name} is initialised twice")
        self.count = self.pending = int(count)

    def expect(self, bytes_per_cta: int, pred: bool = True) -> None:
        me().pause()
        if pred:
            self.announced = self.complete + 1
            self.settle(1, int(bytes_per_cta), line())

    def arrive(self, *, count: int = 1, pred: bool = True) -> None:
        me().pause()
        if pred:
            self.settle(int(count), 0, line())

    def settle(self, arrivals: int, size: int, where: str) -> None:
        if not self.count:
            raise Fault(f"{where}: {self.name} was not initialised")
        if arrivals > self.pending:
            raise PhaseFault(f"{where}: more than {self.count} arrivals in phase {self.complete} of {self}")
        self.pending, self.bytes = self.pending - arrivals, self.bytes + size
        if self.bytes < 0 and self.pending == self.count:
            raise PhaseFault(f"{where}: {-size} bytes land that phase {self.complete} does not expect, {self}")
        if self.pending == 0 == self.bytes:
            self.complete, self.pending = self.complete + 1, self.count
            for stage in self.guarded.values():
                self.release(stage)

    def release(self, stage: Stage) -> None:
        """From now on the stage may be overwritten."""
        for task in me().machine.tasks:
            for product in task.products:
                if stage in product.stages():
                    raise Hazard(f"{product.where}: {self.name} frees {stage.name} before a wait covers the product")
        stage.poison(ABSENT)

    def wait(self, phase: int, pred: bool = True, deps: Sequence[object] = ()) -> None:
        """Until the phase that is next for this thread is complete; ``phase`` must be that one's parity.

        A first wait is for phase 0, or with parity 1 for the one before it, which counts as complete.
        """
        task, where, parity = me(), line(), int(phase)
        if not pred:
            return
        due = task.phases.get(self, -1 - (parity & 1)) + 1
        if parity not in (0, 1) or due & 1 != parity:
            raise PhaseFault(f"{where}: parity {parity}, but phase {due} is due of {self}")
        task.pause(lambda: self.passes(due, where), lambda: f"{where} (parity {parity}, phase {due})\n    {self}")
        task.phases[self], task.guard, self.heard = due, self, max(self.heard, due + 1)

    def passes(self, phase: int, where: str) -> bool:
        if self.complete > phase + 1:  # the parity is that of a later phase: the hardware waits for another one
            raise PhaseFault(f"{where}: phase {phase + 1} went by before the wait for phase {phase} passed, {self}")
        return self.complete == phase + 1

    def check_end(self) -> None:
        """At a program's end nothing may be on its way."""
        if self.announced > self.heard:
            raise Hazard(f"the program ends, and nobody waited for phase {self.announced - 1} of {self}")


class Descriptor:
    """What TMA knows of a tensor in device memory: dense, cut into boxes of ``block``."""

    def __init__(self, memory: Memory, block: Sequence[int]) -> None:
        self.dtype, self.block, self.layout = memory.dtype, list(block), "swizzled"
        self.bytes = math.prod(block) * memory.dtype.itemsize
        sides, row = memory.data.shape, memory.data.shape[-1] * memory.dtype.itemsize
        if not len(sides) == len(block) <= 5 or max(block) > TMA_SIDE or row % 16:
            raise Fault(f"no descriptor has boxes {self.block} of {sides}")
        long = block[-1] * memory.dtype.itemsize
        if long > TMA_ROW_BYTES and long % TMA_ROW_BYTES:  # the compiler cuts longer ones into copies of that
            raise Fault(f"rows of {block[-1]} elements are no whole {TMA_ROW_BYTES} bytes")
        self.data, self.block_type = memory.data, SimpleNamespace(shape=self.block)

    def box(self, corner: Sequence[int]) -> np.ndarray:
        """Zero wherever it leaves the tensor, on either side."""
        found = np.zeros(self.block, self.data.dtype)
        spans = [(max(c, 0), min(c + n, size)) for c, n, size in zip(corner, self.block, self.data.shape, strict=True)]
        if all(low < high for low, high in spans):
            target = tuple(slice(low - c, high - c) for (low, high), c in zip(spans, corner, strict=True))
            found[target] = self.data[tuple(slice(*span) for span in spans)]
        return found


class Copy:
    """A box on its way to shared memory."""

    def __init__(self, task: Task, where: str, found: np.ndarray, barrier: Barrier, view: View, size: int) -> None:
        self.task, self.where, self.found, self.barrier, self.view, self.size = task, where, found, barrier, view, size

    def happen(self) -> None:
        machine = self.task.machine
        machine.copies.remove(self)
        machine.landed += 1
        self.view.data[...], self.view.stage.state = self.found, THERE
        self.barrier.settle(0, -self.size, self.where)


def copy_box(
    descriptor: Descriptor,
    coord: Sequence[int],
    barrier: Barrier,
    result: View,
    pred: bool = True,
    multicast: bool = False,
) -> None:
    """Issues a copy. Its stage is freed by the barrier that this thread waited for last, if that is another one."""
    task, where, corner = me(), line(), [int(c) for c in coord]
    task.pause()
    if not pred:
        return
    if multicast or result.shape != descriptor.block or len(corner) != len(descriptor.block):
        raise Fault(f"{where}: {result.stage.name} {result.shape} takes no box {descriptor.block} at {corner}")
    if not barrier.fenced:
        raise Hazard(f"{where}: {barrier.name} was initialised without a fence, and the copy may not see it")
    if result.stage.state == COMING:
        raise Hazard(f"{where}: {result.stage.name} has a copy on its way already")
    if task.guard not in (None, barrier):
        task.guard.guarded[result.stage.name] = result.stage
    result.stage.poison(COMING)
    found = descriptor.box(corner)
    task.machine.copies.append(Copy(task, where, found, barrier, result, descriptor.bytes))


class Product:
    """A product that was issued, and the accumulator it adds to. Its value may be used after a wait that covers it."""

    def __init__(self, task: Task, left: View, right: View, before: object) -> None:
        self.task, self.where, self.operands, self.before = task, line(), (left, right), before
        self.done, self.sum = False, None

    def __str__(self) -> str:
        return self.where

    def stages(self) -> list[Stage]:
        return [operand.stage for operand in self.operands]

    def happen(self) -> None:
        """The hardware reads both operands."""
        self.done = True
        self.task.machine.multiplied += 1
        for stage in self.stages():
            if stage.state != THERE:
                raise Hazard(f"{self.where}: {stage.name} is read, but its data is {stage.state}")
        left, right = (operand.data for operand in self.operands)
        before = self.before.sum if isinstance(self.before, Product) else raw(self.before)
        self.sum = before + left @ right

    def __getattr__(self, name: str) -> object:  # as of a tensor
        raise Hazard(f"{self.where}: the product is used before a wait that covers it")


def multiply(a: View, b: View, acc: object, *, use_acc: bool = True, is_async: bool = False) -> object:
    if not isinstance(a, View) or not isinstance(b, View):
        raise Fault(f"{line()}: both operands are wanted in shared memory")
    if not use_acc:
        acc = Tensor(np.zeros((a.shape[0], b.shape[1]), np.float32))
    product = Product(me(), a, b, acc)
    me().products.append(product)
    me().pause()
    return product if is_async else wait_for_products(0, [product])


def wait_for_products(num_outstanding: int = 0, deps: Sequence[object] = ()) -> object:
    """All but the last ``num_outstanding`` are done; of ``deps`` those that are covered become tensors."""
    products = me().products
    while len(products) > num_outstanding:
        first = products.pop(0)
        if not first.done:
            first.happen()
    found = [Tensor(d.sum) if isinstance(d, Product) and d not in products else d for d in deps]
    return found[0] if len(found) == 1 else tuple(found)


def fence() -> None:
    """What was done to shared memory so far is seen by copies too."""
    for barrier in me().program.barriers:
        barrier.fenced = barrier.count > 0


mbarrier = SimpleNamespace(
    init=Barrier.init,
    expect=Barrier.expect,
    arrive=Barrier.arrive,
    wait=Barrier.wait,
    MBarrierLayout=lambda: "barriers",
)
tma = SimpleNamespace(async_copy_global_to_shared=copy_box)
