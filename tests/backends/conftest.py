"""Fixtures of the GPU backends' tests: what runs their kernels on a CPU, which is found by ``gpu/support.py``."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch

TRITON = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[None]:
    """The interpreter, three times as fast as it comes, on one thread and with uninitialised memory of NaN.

    As it comes it replaces the language's functions anew at every call of a device function, where once a launch is
    enough, works out overflow checks that it reports only in debug mode, and copies tensors to where they already are.
    """
    from triton.runtime import interpreter as module

    patched: set[int] = set()

    def call(self, *args, **kwargs):
        language = id(self.fn.__globals__.get("core"))  # that of Triton's own functions, or none
        if language not in patched:
            module._patch_lang(self.fn)
            patched.add(language)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise module.InterpreterError(repr(error)) from error

    builder, threads = module.interpreter_builder, torch.get_num_threads()
    monkeypatch.setattr(module.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(module.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Emulated kernels run as on every architecture in turn."""
    if "emulation" in metafunc.fixturenames and not TRITON:
        from .gpu.emulation import ARCHS

        metafunc.parametrize("emulation", ARCHS, ids=lambda arch: f"sm_{arch // 10}", indirect=True)


@pytest.fixture
def emulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[None]:
    """What kernels run in on a CPU, with uninitialised memory of NaN: Triton's interpreter, or ``tests/emulator``."""
    if TRITON:
        request.getfixturevalue("interpreter")
        yield
        return
    from .gpu.emulation import build, compiled
    from .gpu.support import BACKEND

    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    BACKEND.emulate(request.param, monkeypatch)
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if (reason := BACKEND.why_not("", torch.device("cpu"), dtype)) is not None:
        pytest.skip(reason)
    yield
    compiled(request.param).emulator.reset()


def run_in_any_order() -> None:
    """Blocks of emulated launches run in another order, two at a time, and so do their threads."""
    from .gpu.emulation import compiled
    from .gpu.support import BACKEND

    emulator = compiled(BACKEND.arch).emulator
    emulator.seed(int(torch.randint(2**31, ())))
    emulator.workers(2)


@pytest.fixture
def in_any_order(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``in_any_order()``: from now on the programs of a launch run in an order drawn at random."""
    if not TRITON:
        return run_in_any_order
    from triton.runtime.interpreter import interpreter_builder

    def shuffle() -> None:
        place = type(interpreter_builder).set_grid_idx
        orders: dict[tuple, list[tuple]] = {}

        def set_grid_idx(x: int, y: int, z: int) -> None:
            grid = tuple(interpreter_builder.grid_dim)
            if (x, y, z) == (0, 0, 0):
                orders[grid] = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
                random.Random(int(torch.randint(2**31, ()))).shuffle(orders[grid])
            place(interpreter_builder, *orders[grid][(x * grid[1] + y) * grid[2] + z])

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return shuffle
