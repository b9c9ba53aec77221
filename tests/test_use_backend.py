"""``use_backend``: a block belongs to its thread or task, a plain statement to the process, whatever overlaps."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dsts_kernels import backends
from dsts_kernels.backends import choose, explain, use_backend

AUTOMATIC = choose("tap_sums", torch.device("cpu"), torch.float32).name


def chosen() -> str:
    return choose("tap_sums", torch.device("cpu"), torch.float32).name


def elsewhere(work=chosen):
    """What ``work`` finds in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def nothing_stays():
    assert chosen() == AUTOMATIC and elsewhere() == AUTOMATIC
    yield
    use_backend(None)
    assert chosen() == AUTOMATIC and elsewhere() == AUTOMATIC


@pytest.mark.parametrize("first_out", [0, 1])
def test_blocks_of_two_threads_overlap(first_out):
    """Each sees its own from start to end, in whatever order they end; afterwards nothing is left."""
    inside, turns = threading.Barrier(3), [threading.Event(), threading.Event()]
    seen = {}

    def run(index: int, name: str) -> None:
        with use_backend(name):
            inside.wait(10)
            seen[index] = chosen()
            assert turns[index].wait(10)
            seen[index, "late"] = chosen()
        seen[index, "after"] = chosen()

    threads = [threading.Thread(target=run, args=(i, n)) for i, n in enumerate(("eager", AUTOMATIC))]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert chosen() == AUTOMATIC
    for index in (first_out, 1 - first_out):
        turns[index].set()
        threads[index].join()
    assert seen[0] == seen[0, "late"] == "eager" and seen[1] == seen[1, "late"] == AUTOMATIC
    assert seen[0, "after"] == seen[1, "after"] == AUTOMATIC


def test_a_statement_holds_for_the_process():
    """For threads that run already and for new ones, not for blocks; ``None`` takes it back."""
    go, done, seen = threading.Event(), threading.Event(), []

    def running() -> None:
        assert go.wait(10)
        seen.append(chosen())
        with use_backend(None):
            seen.append(chosen())
        done.set()

    thread = threading.Thread(target=running)
    thread.start()
    use_backend("eager")
    go.set()
    assert done.wait(10) and seen == ["eager", AUTOMATIC]
    assert chosen() == "eager" and elsewhere() == "eager"
    with use_backend(AUTOMATIC):
        assert chosen() == AUTOMATIC and elsewhere() == "eager"
    elsewhere(lambda: use_backend(None) and None)
    assert chosen() == AUTOMATIC
    for _ in range(1000):
        use_backend("eager")
    assert len(backends._settings) == 1


def test_no_thread_sees_a_block_of_another_begin():
    """Between construction and entry, too: an object that is kept is for good in its own thread, once used in all."""
    kept = use_backend("eager")
    assert elsewhere() == AUTOMATIC
    with kept:
        assert chosen() == "eager" and elsewhere() == AUTOMATIC
    assert chosen() == AUTOMATIC
    kept = use_backend("eager")
    assert chosen() == "eager", "its own thread has it at once"
    assert elsewhere() == "eager", "and by then it is no block"
    with kept:
        assert elsewhere() == AUTOMATIC
    assert chosen() == AUTOMATIC, "as before it was made"
    kept = use_backend("eager")
    del kept
    assert elsewhere() == "eager"


def test_objects_are_entered_again():
    """One object, within itself, after itself and in two threads at once."""
    block = use_backend("eager")
    with block:
        with block, use_backend(AUTOMATIC):
            assert chosen() == AUTOMATIC
            with block:
                assert chosen() == "eager"
            assert chosen() == AUTOMATIC
        assert chosen() == "eager"

        def run() -> tuple:
            with block:
                inner = chosen()
            return inner, chosen()

        assert elsewhere(run) == ("eager", AUTOMATIC)
        assert chosen() == "eager"
    assert chosen() == AUTOMATIC
    with block:
        assert chosen() == "eager"


def test_ends_out_of_order_and_errors():
    """The outer block ends first: the inner one goes on, then nothing is left. Errors pass and end their blocks."""
    outer, inner = use_backend(AUTOMATIC), use_backend("eager")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert chosen() == "eager"
    inner.__exit__(None, None, None)
    assert chosen() == AUTOMATIC
    inner.__exit__(None, None, None)
    assert chosen() == AUTOMATIC
    with pytest.raises(ZeroDivisionError), ExitStack() as stack:
        stack.enter_context(use_backend("eager"))
        stack.enter_context(use_backend(None))
        assert chosen() == AUTOMATIC
        raise ZeroDivisionError
    for name, error in (("none-such", ValueError), (3, ValueError)):
        with pytest.raises(error, match=r"use_backend\(name\): got"):
            use_backend(name)
    assert chosen() == AUTOMATIC and "runs on" in explain("tap_sums", "cpu")


def test_tasks():
    """Two asyncio tasks in one thread take turns, each in its own block; a task inherits the block it starts in."""

    async def work(name: str, turns: list) -> None:
        with use_backend(name):
            for _ in range(3):
                turns.append((name, chosen()))
                await asyncio.sleep(0)

    async def both() -> tuple:
        turns = []
        await asyncio.gather(work("eager", turns), work(AUTOMATIC, turns))

        async def child() -> str:
            await asyncio.sleep(0)
            return chosen()

        with use_backend("eager"):
            started = asyncio.create_task(child())
        return turns, chosen(), await started

    turns, after, inherited = asyncio.run(both())
    assert len(turns) == 6 and all(name == found for name, found in turns)
    assert after == AUTOMATIC and inherited == "eager"


def reported(queue) -> None:
    queue.put(chosen())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_forked_processes_inherit():
    """As the workers of a DataLoader, which ask for batches while the block may be over."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with use_backend("eager"):
        process = context.Process(target=reported, args=(queue,))
        process.start()
    assert queue.get(timeout=30) == "eager"
    process.join()


DEVICE_THREADS = """
import os, sys, threading, torch
from torch._C import _acc
from dsts_kernels import backends
from dsts_kernels.backends import choose, use_backend

class Hooks(_acc.PrivateUse1Hooks):
    def is_available(self): return True
    def is_built(self): return True
    def has_primary_context(self, index): return True

class Guard(_acc.DeviceGuard):
    def type_(self): return torch._C._autograd.DeviceType.PrivateUse1

class Device:  # nothing computes on it, but autograd has a thread for it
    is_available = is_initialized = staticmethod(lambda: True)
    device_count, current_device = staticmethod(lambda: 1), staticmethod(lambda: 0)
    get_amp_supported_dtype, _is_in_bad_fork = staticmethod(lambda: []), staticmethod(lambda: False)

_acc.register_python_privateuseone_hook(Hooks())
_acc.register_python_privateuseone_device_guard(Guard())
torch.utils.rename_privateuse1_backend("fake")
torch._register_device_module("fake", Device)
if sys.argv[1] == "older":  # versions of torch that do not hand on the context of the call
    torch._C._is_key_in_tls = lambda key: False
fresh, seen, told = lambda: _acc.create_empty_tensor((2,), torch.float32), [], []

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return fresh()
    @staticmethod
    def backward(ctx, grad):
        told.append(torch._C._is_key_in_tls("context"))
        seen.append((threading.get_ident(), choose("tap_sums", torch.device("cpu"), torch.float32).name))
        return torch.zeros(2)

def backward():
    Function.apply(torch.ones(2, requires_grad=True)).backward(fresh())
    thread, name = seen.pop()
    assert thread != threading.get_ident()
    return name

automatic = choose("tap_sums", torch.device("cpu"), torch.float32).name
assert backward() == automatic
with use_backend("eager"):
    assert backward() == "eager"
    if all(told):  # whose call of backward() it is
        thread = threading.Thread(target=lambda: seen.append(backward()))
        thread.start(); thread.join()
        assert seen.pop() == automatic, "another thread's call"
assert backward() == automatic
use_backend("eager")
assert backward() == "eager"
# Autograd's thread may be inside the guard above, which is Python: an interpreter that ends stops it there, in C++.
os._exit(0)
"""


@pytest.mark.parametrize("torch_is", ["newer", "older"])
@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this torch has no devices written in Python")
def test_a_block_around_backward_reaches_autograds_threads(torch_is):
    """A GPU's backward pass runs in a thread of autograd's own."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICE_THREADS, torch_is], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
