"""Threads of programs and their partitions: one runs at a time, and who goes on is drawn."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Deadlock, Fault, Hazard

SPEEDS = (1e-5, 0.03, 0.3, 1.0, 4.0)  # of a thread, of its products, of copies: one of each is drawn


class Ended(BaseException):
    """Raised in the threads of a machine that has stopped."""


class Task(threading.Thread):
    """A partition of a program: its default one, or a worker."""

    def __init__(self, machine: Machine, program: Program, title: str, body: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.machine, self.program, self.title, self.body = machine, program, title, body
        self.turn = threading.Lock()
        self.turn.acquire()
        self.speed, self.product_speed = machine.draw_speed(), machine.draw_speed()
        self.ended = False
        self.may_go: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = str
        self.products: list[Any] = []  # issued, and covered by no wait: hopper.Product
        self.phases: dict[Any, int] = {}  # the last one waited for, by barrier
        self.guard: Any = None  # the last barrier waited for
        self.stored: list[tuple[Any, np.ndarray, np.ndarray, list[bool]]] = []  # what others do not see yet

    def run(self) -> None:
        self.turn.acquire()
        try:
            if self.machine.fault is not None:
                return
            self.body()
            if self.products:
                raise Hazard(f"program {self.program.number} {self.title} ends before its product: {self.products[0]}")
            self.ended = True
            self.machine.next_turn(self)
        except Ended:
            pass
        except BaseException as fault:  # whatever a kernel raises is told to who launched it
            self.machine.stop(fault)

    def pause(self, may_go: Callable[[], bool] | None = None, waits_for: Callable[[], str] = str) -> None:
        """Others may go first; on from here only when ``may_go()``."""
        self.may_go, self.waits_for = may_go, waits_for
        self.machine.next_turn(self)
        self.may_go = None

    def publish(self, memory: Any = None) -> None:
        """What was stored and gathered by a barrier is in memory for all; with ``memory`` all of what went there."""
        kept = []
        for entry in self.stored:
            where, at, value, gathered = entry
            if where is memory or (memory is None and gathered[0]):
                where.flat[at] = value
            else:
                kept.append(entry)
        self.stored = kept


class Program:
    """One program (CTA) of a launch."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.barriers: list[Any] = []


class Machine:
    """A launch. ``landed`` copies, ``multiplied`` products and ``turns`` are counted."""

    def __init__(self, programs: int, seed: int) -> None:
        self.random, self.programs = random.Random(seed), programs
        self.copy_speed = self.draw_speed()
        self.tasks: list[Task] = []
        self.copies: list[Any] = []  # on their way: hopper.Copy
        self.fault: BaseException | None = None
        self.over = threading.Event()
        self.landed = self.multiplied = self.turns = 0

    def draw_speed(self) -> float:
        return self.random.choice(SPEEDS)

    def start(self, program: Program, title: str, body: Callable[[], object]) -> Task:
        task = Task(self, program, title, body)
        self.tasks.append(task)
        task.start()
        return task

    def choices(self) -> tuple[list[Any], list[float]]:
        """Who may be next: threads, copies that land, products that read."""
        who: list[Any] = list(self.copies)
        speeds = [self.copy_speed] * len(who)
        for task in self.tasks:
            if not task.ended and (task.may_go is None or task.may_go()):
                who.append(task)
                speeds.append(task.speed)
            for product in task.products:  # in order
                if not product.done:
                    who.append(product)
                    speeds.append(task.product_speed)
                    break
        return who, speeds

    def next_turn(self, running: Task | None) -> None:
        """Lets the hardware do as much as is drawn, then the thread that is; returns when ``running`` is drawn."""
        while True:
            who, speeds = self.choices()
            if not who:
                self.nobody()
                break
            chosen = self.random.choices(who, speeds)[0] if len(who) > 1 else who[0]
            self.turns += 1
            if isinstance(chosen, Task):
                if chosen is running:
                    return
                chosen.turn.release()
                break
            chosen.happen()
        if running is not None and not running.ended:
            if self.fault is None:
                running.turn.acquire()
            if self.fault is not None:
                raise Ended

    def nobody(self) -> None:
        """All have ended, or all wait."""
        waiting = [task for task in self.tasks if not task.ended]
        if waiting:
            lines = [f"  program {task.program.number} {task.title}: {task.waits_for()}" for task in waiting]
            self.stop(Deadlock("\n".join(["everybody waits", *lines])))
        self.over.set()

    def stop(self, fault: BaseException) -> None:
        self.fault = self.fault or fault
        for task in self.tasks:
            if task is not threading.current_thread() and task.turn.locked():
                task.turn.release()
        self.over.set()


def me() -> Task:
    """The thread that runs."""
    task = threading.current_thread()
    if not isinstance(task, Task):
        raise Fault("a kernel's function was called outside of a launch")
    return task


def run(programs: int, seed: int, body: Callable[[], object]) -> Machine:
    """``body()`` in every program to its end; raises what any of them raised."""
    machine = Machine(programs, seed)

    def whole(program: Program) -> None:
        body()
        for barrier in program.barriers:
            barrier.check_end()

    for number in range(programs):
        program = Program(number)
        machine.start(program, "default", lambda program=program: whole(program))
    machine.next_turn(None)
    machine.over.wait()
    if machine.fault is not None:
        raise machine.fault
    for task in machine.tasks:
        for memory in {id(entry[0]): entry[0] for entry in task.stored}.values():
            task.publish(memory)
    return machine
